"""Which region of the landing ring each prefill worker writes to; pure.

A worker that comes back gets its former region if that is still free. Otherwise the region goes next that has been free
longest: a write of its former owner that lands late costs a chunk (it is verified), never a token.
"""

from collections import deque


class RingRegions:
    """Regions of ``slots_each`` slots in a ring of ``ring_slots``."""

    def __init__(self, *, ring_slots: int, slots_each: int) -> None:
        self._slots_each = slots_each
        self._free = deque(range(ring_slots // slots_each))
        self._taken: dict[str, int] = {}
        self._former: dict[int, str] = {}
        self.total = len(self._free)

    def take(self, worker: str) -> int | None:
        """First slot of the worker's region, or None: none is left. Idempotent."""
        if (region := self._taken.get(worker)) is None:
            if not self._free:
                return None
            region = next((r for r in self._free if self._former.get(r) == worker), self._free[0])
            self._free.remove(region)
            self._taken[worker] = region
            self._former[region] = worker
        return region * self._slots_each

    def give(self, worker: str) -> None:
        """The worker left; one that has no region has none to give."""
        if (region := self._taken.pop(worker, None)) is not None:
            self._free.append(region)
