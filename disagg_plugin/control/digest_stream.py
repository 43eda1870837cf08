"""A prefix digest on its way to one decode engine: numbered parts, each small, and how a missing one is noticed.

A part that says ``full`` begins anew; every other one follows the part numbered one less. A follower that sees a gap
ignores what comes until the next full part, and asks for it (``DigestRequest``). Pure: both ends are fed and answer.
"""

import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from disagg_plugin.control.messages import DigestPart
from disagg_plugin.control.prefix_digest import DigestDelta

PART_CHUNKS = 8192  # 64 KiB: far below a message's limit, and applied in a few milliseconds
HASH_BYTES = 8


def pack(hashes: Sequence[int]) -> bytes:
    """Unsigned 64-bit words, little-endian."""
    words = array("Q", hashes)
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()


def unpack(data: bytes) -> list[int]:
    """The words again.

    Raises:
        ValueError: The length is no multiple of 8.
    """
    words = array("Q")
    words.frombytes(data)
    if sys.byteorder == "big":
        words.byteswap()
    return words.tolist()


class DigestSender:
    """What one decode engine was told; in P's I/O thread."""

    def __init__(self) -> None:
        self._sequence = 0
        self._full_wanted = True

    def start_over(self) -> None:
        """The follower knows nothing, or a part did not get through: the next parts are everything."""
        self._full_wanted = True

    def parts(self, delta: DigestDelta | None, full: Callable[[], DigestDelta]) -> Iterator[DigestPart]:
        """What to send now, in order, made one by one; nothing if nothing changed.

        Args:
            delta: The digest's change since the last call.
            full: Everything that the digest holds, with that change.
        """
        if self._full_wanted:
            delta = full()
        if delta is None:
            return
        self._full_wanted = False
        if delta.full:
            yield self._part(full=True, added=delta.added[:PART_CHUNKS])
        for at in range(0, len(delta.removed), PART_CHUNKS):
            yield self._part(removed=delta.removed[at : at + PART_CHUNKS])
        for at in range(PART_CHUNKS if delta.full else 0, len(delta.added), PART_CHUNKS):
            yield self._part(added=delta.added[at : at + PART_CHUNKS])

    def _part(self, *, full: bool = False, added: Sequence[int] = (), removed: Sequence[int] = ()) -> DigestPart:
        self._sequence += 1
        return DigestPart(self._sequence, full, pack(added), pack(removed))


@dataclass(frozen=True, slots=True)
class DigestChange:
    """What a follower applies; ``full``: forget everything before."""

    full: bool
    added: list[int]
    removed: list[int]


class DigestFollower:
    """What one prefill worker told us; in D's I/O thread.

    Attributes:
        synced: Nothing is missing; False before the first full part and after a gap.
        gaps: Parts that did not fit.
    """

    def __init__(self) -> None:
        self.synced = False
        self.gaps = 0
        self._next = 0

    def take(self, part: DigestPart) -> DigestChange | None:
        """The change to apply, or None: something is missing, ask for everything."""
        try:
            change = DigestChange(part.full, unpack(part.added), unpack(part.removed))
        except ValueError:
            change = None
        if change is None or not (part.full or (self.synced and part.sequence == self._next)):
            self.gaps += 1
            self.synced = False
            return None
        self.synced, self._next = True, part.sequence + 1
        return change
