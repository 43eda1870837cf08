"""Which prefill worker holds which prompt prefix: an inverted index from chunk hash to a set of workers.

A set of workers is an ``int`` with one bit a worker. To look a prompt up, its leading chunks are walked and the sets
intersected until nobody is left: the cost depends on the prompt's length alone, not on the number of workers or on
how much they hold.

One thread writes, another may look up meanwhile, without a lock. A lookup takes the map of workers to bits as it finds
it and ignores bits beyond; single look-ups in a dict are whole. In the middle of an update it may find half of a
delta, or a worker's chunks under the name that had its bit before: an estimate that is wrong once.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

MAX_CHUNKS = 1 << 17  # a worker: 16M tokens of 128 a chunk; what it reports beyond is ignored


@dataclass(frozen=True, slots=True)
class _Bits:
    """Which bit stands for which worker; replaced as a whole."""

    slots: Mapping[str, int]
    size: int
    mask: int


@dataclass(frozen=True, slots=True)
class _Order:
    """Slots in the order in which a caller names its workers; ``size`` stands for one that never reported."""

    workers: tuple[str, ...]
    bits: _Bits
    slots: tuple[int, ...]


class PrefixIndex:
    """Filled from the workers' digests by one thread; ``overlap`` and ``overlap_tokens`` by one other at most.

    Memory is about 150 bytes for each chunk of each worker.
    """

    def __init__(self, *, max_chunks: int = MAX_CHUNKS) -> None:
        self._max_chunks = max_chunks
        self._holders: dict[int, int] = {}
        self._bits = _Bits({}, 0, 0)
        self._order = _Order((), self._bits, ())  # the reader's
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
        slots = dict(self._bits.slots)
        slot = slots.pop(worker, None)
        if slot is None:
            return
        self._bits = _Bits(slots, self._bits.size, self._bits.mask)
        bit = 1 << slot
        for chunk in self._chunks.pop(worker):
            self._clear(chunk, bit)
        self._free.append(slot)

    def overlap(self, hashes: Sequence[int]) -> dict[str, int]:
        """Leading chunks of a prompt that each worker holds; a worker with none is missing.

        Args:
            hashes: The prompt's, from ``prefix_hash.prefix_hashes``.
        """
        bits = self._bits
        counts = self._matched(bits, hashes, 1)
        return {worker: count for worker, slot in bits.slots.items() if (count := counts[slot])} if counts else {}

    def overlap_tokens(self, hashes: Sequence[int], workers: Sequence[str], *, chunk_tokens: int) -> tuple[int, ...]:
        """The same in tokens and in the order of ``workers``, as a policy's snapshot wants it."""
        bits = self._bits
        counts = self._matched(bits, hashes, chunk_tokens)
        if not counts:
            return (0,) * len(workers)
        order = self._order
        if order.bits is not bits or order.workers != workers:  # the same as last time, nearly always
            slots = tuple([bits.slots.get(worker, bits.size) for worker in workers])
            order = self._order = _Order(tuple(workers), bits, slots)
        return tuple([counts[slot] for slot in order.slots])

    def _matched(self, bits: _Bits, hashes: Sequence[int], each: int) -> list[int]:
        """Leading chunks by slot, times ``each``, and a 0 behind; or an empty list if nobody holds the first."""
        if not hashes:
            return []
        holders = self._holders.get
        left = holders(hashes[0], 0) & bits.mask
        if not left:
            return []
        counts = [0] * (bits.size + 1)
        count = 0
        for chunk in hashes:
            still = left & holders(chunk, 0)
            if still != left:
                _fill(counts, left ^ still, count)
                left = still
                if not left:
                    return counts
            count += each
        _fill(counts, left, count)
        return counts

    def _slot(self, worker: str) -> int:
        if (slot := self._bits.slots.get(worker)) is None:
            slot = self._free.pop() if self._free else self._bits.size
            self._chunks[worker] = set()
            size = max(self._bits.size, slot + 1)
            self._bits = _Bits({**self._bits.slots, worker: slot}, size, (1 << size) - 1)
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
