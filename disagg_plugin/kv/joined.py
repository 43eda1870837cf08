"""Several transfers of one request that the engine must see as one. Pure; one rank, one direction.

A request's KV may come from two places at once (a store beside the engine, and a prefill worker), and may be wanted by
two (a store, and a decode engine). Engines count reports: one too many kills them, one too few hangs the request, one
too early uses KV that is still on its way. So each request is opened with the parts it waits for, and is reported once,
when the last of them has ended, with the invalid blocks of all.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from enum import StrEnum


class Part(StrEnum):
    """Who moves KV of a request."""

    STORE = "store"
    WIRE = "wire"


@dataclass(frozen=True, slots=True)
class Join:
    """What a request waits for.

    Attributes:
        block_ids: Blocks that its loads fill, nobody else's; none for what is only read.
        store_block_ids: Those of them that the store fills.
        kept_block_ids: Blocks before them, which the engine has filled already and may share with other requests.
    """

    request_id: str
    parts: frozenset[Part]
    block_ids: tuple[int, ...] = ()
    store_block_ids: tuple[int, ...] = ()
    kept_block_ids: tuple[int, ...] = ()


@dataclass(slots=True)
class _Waiting:
    join: Join
    missing: set[Part]
    invalid: set[int] = field(default_factory=set)


class Joined:
    """Requests whose parts have not all ended."""

    def __init__(self) -> None:
        self._waiting: dict[str, _Waiting] = {}
        self._complete: list[str] = []
        self._invalid: set[int] = set()
        self.unexpected = 0  # reports that nobody waits for: dropped, or the engine would die of them

    def open(self, join: Join) -> None:
        """From now on the request is reported when all of its parts have ended."""
        if join.request_id in self._waiting or not join.parts:
            self.unexpected += 1
            return
        self._waiting[join.request_id] = _Waiting(join, set(join.parts))

    def invalid(self, block_ids: Collection[int]) -> None:
        """These blocks hold no valid KV; told with the request that they belong to."""
        left = set(block_ids)
        for waiting in self._waiting.values():
            own = left.intersection(waiting.join.block_ids)
            waiting.invalid |= own
            left -= own
        self._invalid |= left

    def store_invalid(self, block_ids: Collection[int]) -> set[str]:
        """The same, as the store says it: by whole chunks of its own, which may begin in blocks that were not loaded.

        Returns:
            The requests that it failed.
        """
        left = set(block_ids)
        failed = set()
        for request_id, waiting in self._waiting.items():
            if own := left.intersection(waiting.join.store_block_ids):
                waiting.invalid |= own
                left -= own
                failed.add(request_id)
        kept = {block for waiting in self._waiting.values() for block in waiting.join.kept_block_ids} if left else set()
        self._invalid |= left - kept
        return failed

    def ended(self, part: Part, request_ids: Iterable[str]) -> None:
        """A part of each of these requests has ended, well or not."""
        for request_id in request_ids:
            waiting = self._waiting.get(request_id)
            if waiting is None or part not in waiting.missing:
                self.unexpected += 1
                continue
            waiting.missing.discard(part)
            if not waiting.missing:
                del self._waiting[request_id]
                self._complete.append(request_id)
                self._invalid |= waiting.invalid

    def store_failed(self, request_ids: Iterable[str] | None = None) -> set[str]:
        """The store's part of these requests, or of all, came to nothing; which of them waited for it."""
        wanted = set(self._waiting) if request_ids is None else set(request_ids)
        failed = {r for r in wanted if r in self._waiting and Part.STORE in self._waiting[r].missing}
        for request_id in failed:
            self._waiting[request_id].invalid.update(self._waiting[request_id].join.store_block_ids)
        self.ended(Part.STORE, sorted(failed))
        return failed

    def take(self) -> tuple[list[str], set[int]]:
        """Requests whose parts have all ended since the last call, and the blocks of theirs that are invalid."""
        complete, self._complete = self._complete, []
        invalid, self._invalid = self._invalid, set()
        return complete, invalid

    @property
    def open_requests(self) -> int:
        """How many are waited for."""
        return len(self._waiting)
