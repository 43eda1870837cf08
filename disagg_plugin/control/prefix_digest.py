"""Which prompt prefixes a prefill engine probably holds, and how its decode engines learn of changes.

The engine's own block hashes differ between processes, so both sides hash prompts with the same function
(``serving.prefix_hash``). This is an estimate: the least recently used chunks are dropped at the size of the engine's
cache; what the engine evicted earlier stays listed until then. A wrong entry costs a worse placement, never a wrong
token.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DigestDelta:
    """A change since the previous one; ``full``: forget everything before."""

    full: bool
    added: tuple[int, ...]
    removed: tuple[int, ...]


class PrefixDigest:
    """Chunk hashes in the order of their last use; all calls from one thread, P's I/O thread."""

    def __init__(self, capacity_chunks: int) -> None:
        self._capacity = max(1, capacity_chunks)
        self._chunks: OrderedDict[int, None] = OrderedDict()
        self._added: dict[int, None] = {}
        self._removed: dict[int, None] = {}
        self._cleared = False

    def __len__(self) -> int:
        return len(self._chunks)

    def touch(self, hashes: Iterable[int]) -> None:
        """A prompt with these chunks was computed; they are the most recently used ones now."""
        for chunk in hashes:
            if chunk in self._chunks:
                self._chunks.move_to_end(chunk)
                continue
            self._chunks[chunk] = None
            if chunk in self._removed:
                del self._removed[chunk]
            else:
                self._added[chunk] = None
        while len(self._chunks) > self._capacity:
            oldest, _ = self._chunks.popitem(last=False)
            if oldest in self._added:
                del self._added[oldest]
            else:
                self._removed[oldest] = None

    def clear(self) -> None:
        """The engine's cache was reset."""
        self._chunks.clear()
        self._added.clear()
        self._removed.clear()
        self._cleared = True

    def full(self) -> DigestDelta:
        """Everything, for a peer that knows nothing or missed something."""
        return DigestDelta(True, tuple(self._chunks), ())

    def take_delta(self) -> DigestDelta | None:
        """What changed since the last call, or None."""
        if not self._added and not self._removed and not self._cleared:
            return None
        delta = DigestDelta(self._cleared, tuple(self._added), tuple(self._removed))
        self._added, self._removed, self._cleared = {}, {}, False
        return delta
