"""SGLang's KV pool of one rank, read and written as canonical KV.

The pool is one tensor a layer and side, ``[slots, heads, head_dim]``; page ``p`` is slots ``p * page_size`` on. Page 0
is padding and belongs to no request. Other layouts (HND, 5-D, quantized, MLA, sliding window) are refused by name.
"""

from collections.abc import Sequence
from typing import Any

import torch

from disagg_plugin.errors import ConfigError
from disagg_plugin.kv.geometry import DTYPE_BYTES, HeadRange, KVGeometry


class SlotView:
    """A pool of token slots as a ``KVCacheView``; block ids are page numbers."""

    def __init__(
        self, sides: Sequence[tuple[torch.Tensor, torch.Tensor]], *, geometry: KVGeometry, page_size: int
    ) -> None:
        """View buffers ``[slots, heads, head_dim]``, for each layer K and V."""
        self.geometry = geometry
        self.heads = HeadRange(0, geometry.kv_heads)
        self.block_size = page_size
        self._sides = sides
        self._offsets = torch.arange(page_size)
        self._key: tuple[int, int, tuple[int, ...]] | None = None
        self._slots = torch.empty(0, dtype=torch.int64)

    def gather(self, layer: int, side: int, block_ids: Sequence[int], start: int, end: int) -> torch.Tensor:
        """Tokens ``[start, end)`` as ``[heads, tokens, head_dim]``, contiguous."""
        return self._sides[layer][side][self._locate(block_ids, start, end)].transpose(0, 1).contiguous()

    def scatter(self, layer: int, side: int, block_ids: Sequence[int], start: int, end: int, kv: torch.Tensor) -> None:
        """Write what ``gather`` returns to tokens ``[start, end)``, and nothing else."""
        buffer = self._sides[layer][side]
        buffer[self._locate(block_ids, start, end)] = kv.transpose(0, 1).to(device=buffer.device, dtype=buffer.dtype)

    def _locate(self, block_ids: Sequence[int], start: int, end: int) -> torch.Tensor:
        """Slot numbers, on the pool's device, kept from the last call: callers go through all layers with one range."""
        size = self.block_size
        first, stop = start // size, -(-end // size)
        if not 0 <= start < end <= len(block_ids) * size:
            raise ValueError(f"tokens [{start}, {end}) do not lie in {len(block_ids)} pages of {size}")
        key = (start, end, tuple(block_ids[first:stop]))
        if key != self._key:
            pages = torch.tensor(key[2], dtype=torch.int64)
            slots = (pages[:, None] * size + self._offsets).flatten()[start - first * size : end - first * size]
            self._key, self._slots = key, slots.to(self._sides[0][0].device)
        return self._slots


def build_view(pool: Any, total_kv_heads: int) -> SlotView:
    """View SGLang's pool.

    Raises:
        ConfigError: It is not laid out as this module says.
    """
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    if type(pool) is not MHATokenToKVPool:
        raise ConfigError(f"disagg cannot transfer SGLang's {type(pool).__name__}: only plain MHA and GQA pools")
    keys, values = pool.k_buffer, pool.v_buffer
    dtype = str(keys[0].dtype).removeprefix("torch.")
    checks = (
        (pool.kv_cache_layout != "nhd", f"layout {pool.kv_cache_layout}, not nhd"),
        (bool(pool.is_quantized_kv_cache) or pool.dtype != keys[0].dtype, f"a quantized cache ({pool.dtype})"),
        (dtype not in DTYPE_BYTES, f"dtype {dtype}"),
        (pool.head_dim != pool.v_head_dim, f"head_dim {pool.head_dim} for keys, {pool.v_head_dim} for values"),
        (pool.head_num != total_kv_heads, f"{pool.head_num} of {total_kv_heads} KV heads"),
        (any(b.dim() != 3 or b.shape != keys[0].shape for b in (*keys, *values)), "layers of different shapes"),
    )
    if problem := next((what for holds, what in checks if holds), None):
        raise ConfigError(f"disagg cannot transfer this KV pool: {problem}")
    geometry = KVGeometry(layers=len(keys), kv_heads=pool.head_num, head_dim=pool.head_dim, dtype=dtype)
    return SlotView(list(zip(keys, values, strict=True)), geometry=geometry, page_size=pool.page_size)
