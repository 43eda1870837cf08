"""Which prefill worker holds which prompt prefix: an inverted index from chunk hash to a set of workers.

A set of workers is an ``int`` with one bit a worker. To look a prompt up, its leading chunks are walked and the sets
intersected until nobody is left: the cost depends on the prompt's length alone, not on the number of workers or on
how much they hold.
"""

from collections.abc import Iterable, Sequence

MAX_CHUNKS = 1 << 17  # a worker: 16M tokens of 128 a chunk; what it reports beyond is ignored


class PrefixIndex:
    """Filled from the workers' digests; all calls from one thread.

    Memory is about 150 bytes for each chunk of each worker.
    """

    def __init__(self, *, max_chunks: int = MAX_CHUNKS) -> None:
        self._max_chunks = max_chunks
        self._holders: dict[int, int] = {}
        self._slots: dict[str, int] = {}
        self._free: list[int] = []
        self._chunks: dict[str, set[int]] = {}
        self.ignored = 0

    def __len__(self) -> int:
        """Distinct chunks."""
        return len(self._holders)

    def chunks(self, worker: str) -> int:
        """How many chunks ``worker`` holds."""
        return len(self._chunks.get(worker, ()))

    def update(self, worker: str, *, added: Iterable[int] = (), removed: Iterable[int] = ()) -> None:
        """A delta of the worker's digest; what is known already or not at all does no harm."""
        bit = 1 << self._slot(worker)
        held, holders = self._chunks[worker], self._holders
        for chunk in removed:
            if chunk in held:
                held.remove(chunk)
                self._clear(chunk, bit)
        for chunk in added:
            if chunk in held:
                continue
            if len(held) >= self._max_chunks:
                self.ignored += 1
                continue
            held.add(chunk)
            others = holders.get(chunk)
            holders[chunk] = bit if others is None else others | bit

    def replace(self, worker: str, chunks: Iterable[int]) -> None:
        """A full digest: forget what was known of the worker."""
        self.forget(worker)
        self.update(worker, added=chunks)

    def forget(self, worker: str) -> None:
        """The worker is gone or has restarted."""
        slot = self._slots.pop(worker, None)
        if slot is None:
            return
        self._free.append(slot)
        bit = 1 << slot
        for chunk in self._chunks.pop(worker):
            self._clear(chunk, bit)

    def overlap(self, hashes: Sequence[int]) -> dict[str, int]:
        """Leading chunks of a prompt that each worker holds; a worker with none is missing.

        Args:
            hashes: The prompt's, from ``prefix_hash.prefix_hashes``.
        """
        counts = self._matched(hashes)
        return {worker: count for worker, slot in self._slots.items() if (count := counts[slot])} if counts else {}

    def overlap_tokens(self, hashes: Sequence[int], workers: Sequence[str], *, chunk_tokens: int) -> tuple[int, ...]:
        """The same in tokens and in the order of ``workers``, as a policy's snapshot wants it."""
        counts = self._matched(hashes)
        if not counts:
            return (0,) * len(workers)
        counts.append(0)  # of a worker that never reported
        slots, nobody = self._slots, len(counts) - 1
        return tuple([counts[slots.get(worker, nobody)] * chunk_tokens for worker in workers])

    def _matched(self, hashes: Sequence[int]) -> list[int]:
        """Leading chunks by slot, or an empty list if nobody holds the first."""
        if not hashes:
            return []
        holders = self._holders
        left = holders.get(hashes[0], 0)
        if not left:
            return []
        counts = [0] * (len(self._slots) + len(self._free))
        for count, chunk in enumerate(hashes):
            still = left & holders.get(chunk, 0)
            if still != left:
                _fill(counts, left ^ still, count)
                left = still
                if not left:
                    return counts
        _fill(counts, left, len(hashes))
        return counts

    def _slot(self, worker: str) -> int:
        if (slot := self._slots.get(worker)) is None:
            slot = self._slots[worker] = self._free.pop() if self._free else len(self._slots)
            self._chunks[worker] = set()
        return slot

    def _clear(self, chunk: int, bit: int) -> None:
        left = self._holders[chunk] & ~bit
        if left:
            self._holders[chunk] = left
        else:
            del self._holders[chunk]


def _fill(counts: list[int], workers: int, count: int) -> None:
    """Set ``counts`` of every worker in a set."""
    while workers:
        lowest = workers & -workers
        counts[lowest.bit_length() - 1] = count
        workers ^= lowest
