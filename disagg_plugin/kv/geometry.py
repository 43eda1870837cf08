"""The shape of a model's KV cache, free of any engine's paging, and who owns which heads.

Canonical KV of tokens ``[a, b)`` of one layer is ``[sides, kv_heads, tokens, head_dim]``: keys after rotary
embedding, heads in the model's own order. It depends on neither block size, nor cache layout, nor tensor
parallelism, so two engines that agree on a :class:`KVGeometry` can exchange KV whatever else differs.
"""

from dataclasses import dataclass

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "uint8": 1}


@dataclass(frozen=True, slots=True)
class KVGeometry:
    """KV of one whole model, all ranks together.

    Attributes:
        sides: 2 for keys and values, 1 for one latent vector a token (MLA).
        dtype: Name of the cache's dtype, a key of ``DTYPE_BYTES``.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    sides: int = 2

    def raw_token_bytes(self, heads: int | None = None) -> int:
        """Bytes of one token in the cache's own dtype, for ``heads`` heads (default: all)."""
        heads = self.kv_heads if heads is None else heads
        return self.layers * self.sides * heads * self.head_dim * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class HeadRange:
    """Global head indices ``[start, start + count)``."""

    start: int
    count: int

    @property
    def stop(self) -> int:
        return self.start + self.count


@dataclass(frozen=True, slots=True)
class Exchange:
    """Prefill rank ``prefill_rank`` sends ``heads`` to decode rank ``decode_rank``."""

    prefill_rank: int
    decode_rank: int
    heads: HeadRange


def heads_of_rank(kv_heads: int, rank: int, tensor_parallel: int) -> HeadRange:
    """Heads that ``rank`` holds; with fewer heads than ranks every head is replicated on several ranks.

    Raises:
        ValueError: Neither of the two numbers divides the other.
    """
    if kv_heads % tensor_parallel == 0:
        count = kv_heads // tensor_parallel
        return HeadRange(rank * count, count)
    if tensor_parallel % kv_heads == 0:
        return HeadRange(rank // (tensor_parallel // kv_heads), 1)
    raise ValueError(f"{kv_heads} KV heads cannot be split over {tensor_parallel} ranks")


def plan_exchanges(kv_heads: int, prefill_tp: int, decode_tp: int) -> tuple[Exchange, ...]:
    """Every (prefill rank, decode rank, heads) triple that moves each head to each decode rank exactly once.

    A head that several prefill ranks hold (replication) is sent by one of them: the ranks that share a head
    take turns by decode rank, so that no replica carries all of the traffic.
    """
    exchanges = []
    for decode_rank in range(decode_tp):
        wanted = heads_of_rank(kv_heads, decode_rank, decode_tp)
        replicas = max(1, prefill_tp // kv_heads)
        for prefill_rank in range(decode_rank % replicas, prefill_tp, replicas):
            held = heads_of_rank(kv_heads, prefill_rank, prefill_tp)
            start = max(wanted.start, held.start)
            stop = min(wanted.start + wanted.count, held.start + held.count)
            if start < stop:
                exchanges.append(Exchange(prefill_rank, decode_rank, HeadRange(start, stop - start)))
    return tuple(exchanges)


def senders_per_receiver(kv_heads: int, prefill_tp: int, decode_tp: int) -> int:
    """Most prefill ranks that any decode rank hears from.

    Raises:
        ValueError: Heads cannot be split over one of the two.
    """
    plan = plan_exchanges(kv_heads, prefill_tp, decode_tp)
    return max(sum(one.decode_rank == rank for one in plan) for rank in range(decode_tp))
