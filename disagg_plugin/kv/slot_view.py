"""A KV cache that is one tensor of token slots a layer and side, read and written as canonical KV.

``[slots, heads, head_dim]``; page ``p`` is slots ``p * page_size`` on.
"""

from collections.abc import Sequence

import torch

from disagg_plugin.kv.geometry import HeadRange, KVGeometry


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
