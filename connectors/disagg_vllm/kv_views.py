"""vLLM's paged KV cache of one worker, read and written as canonical KV.

vLLM hands over one tensor a layer, logically ``[blocks, heads, N, K|V]``; the strides say how it lies in memory. All
backends for GPUs keep each token's K and V side by side, in two orders (NHD, HND). The CPU backend uses the memory of
one block and head differently: first all K, transposed to ``[head_dim, N]``, then all V, ``[N, head_dim]``. Either way
one side of one layer is a strided view ``[blocks, heads, N, head_dim]``, and that is all the rest of this file sees.

``N`` is the attention kernel's block size. It may be a fraction of the block size in which the scheduler allocates
and in which block ids are given to us: block ``b`` then is the kernel's blocks ``b * r`` to ``b * r + r - 1``.

FP8 caches are copied as bytes; their scales are part of the weights.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from disagg_plugin.errors import DisaggError
from disagg_plugin.kv.geometry import DTYPE_BYTES, HeadRange, KVGeometry, heads_of_rank

_FP8 = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}


class UnsupportedCache(DisaggError):
    """This engine's KV cache is not laid out as we know it: serve every prompt locally, and say so once."""


class _Plan(NamedTuple):
    """Where the tokens of one range lie; the same for all layers and sides."""

    pieces: tuple[tuple[int, int, int], ...]  # (kernel block, first and end offset in it), in token order
    sizes: list[int]


class PagedView:
    """One worker rank's cache as canonical KV.

    Attributes:
        geometry: Of the whole model, all ranks together.
        heads: The heads that this rank holds.
        block_size: Tokens in a block of the scheduler, to which the block ids below refer.
    """

    def __init__(
        self,
        sides: Sequence[tuple[torch.Tensor, torch.Tensor]],
        *,
        geometry: KVGeometry,
        heads: HeadRange,
        block_size: int,
    ) -> None:
        """View caches that are split already.

        Args:
            sides: For each layer, in the model's order, the K and the V view, ``[blocks, heads, N, head_dim]``, of
                the geometry's dtype or, where that has one byte, ``uint8``.
        """
        self.geometry = geometry
        self.heads = heads
        self.block_size = block_size
        self._sides = sides
        self._kernel_block = int(sides[0][0].shape[2])
        self._dtype: torch.dtype = getattr(torch, geometry.dtype)
        self._on_cpu = sides[0][0].device.type == "cpu"
        self._key: tuple[int, int, tuple[int, ...]] | None = None
        self._plan = _Plan((), [])
        self._index: tuple[torch.Tensor, torch.Tensor] | None = None

    def gather(self, layer: int, side: int, block_ids: Sequence[int], start: int, end: int) -> torch.Tensor:
        """Copy tokens ``[start, end)`` of a request out of the cache.

        Args:
            side: 0 for keys, 1 for values.
            block_ids: The request's blocks from its first token on.

        Returns:
            ``[heads, end - start, head_dim]``, contiguous, in the geometry's dtype.
        """
        plan = self._locate(block_ids, start, end)
        view = self._sides[layer][side]
        if self._on_cpu:
            kv = torch.cat([view[block, :, first:stop] for block, first, stop in plan.pieces], dim=1)
        else:  # untested on a GPU; checked on the CPU against the same strides
            kv = view.transpose(1, 2)[self._token_index(plan, view.device)].transpose(0, 1).contiguous()
        return kv if kv.dtype == self._dtype else kv.view(self._dtype)

    def scatter(self, layer: int, side: int, block_ids: Sequence[int], start: int, end: int, kv: torch.Tensor) -> None:
        """Write ``kv``, as ``gather`` returns it, to tokens ``[start, end)``, and nothing else."""
        plan = self._locate(block_ids, start, end)
        view = self._sides[layer][side]
        kv = kv.view(torch.uint8) if view.dtype == torch.uint8 else kv.to(view.dtype)
        if self._on_cpu:
            for (block, first, stop), piece in zip(plan.pieces, kv.split(plan.sizes, dim=1), strict=True):
                view[block, :, first:stop].copy_(piece)
        else:
            view.transpose(1, 2)[self._token_index(plan, view.device)] = kv.transpose(0, 1)

    def _locate(self, block_ids: Sequence[int], start: int, end: int) -> _Plan:
        """The plan of this range, kept from the last call: callers go through all layers with one range.

        Raises:
            ValueError: The range is empty, or longer than the blocks.
        """
        first, stop = start // self.block_size, -(-end // self.block_size)
        key = (start, end, tuple(block_ids[first:stop]))
        if key == self._key:
            return self._plan
        if not 0 <= start < end <= len(block_ids) * self.block_size:
            raise ValueError(f"tokens [{start}, {end}) do not lie in {len(block_ids)} blocks of {self.block_size}")
        size, ratio = self._kernel_block, self.block_size // self._kernel_block
        pieces = []
        for at in range(start // size, -(-end // size)):
            block = key[2][at // ratio - first] * ratio + at % ratio
            pieces.append((block, max(start - at * size, 0), min(end - at * size, size)))
        self._plan = _Plan(tuple(pieces), [stop - first for _, first, stop in pieces])
        self._key, self._index = key, None
        return self._plan

    def _token_index(self, plan: _Plan, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(kernel block, offset) of every token, on the cache's device."""
        if self._index is None:
            blocks = torch.tensor([piece[0] for piece in plan.pieces])
            blocks = blocks.repeat_interleave(torch.tensor(plan.sizes))
            first = plan.pieces[0][1]
            offsets = torch.arange(first, first + len(blocks)) % self._kernel_block
            self._index = blocks.to(device), offsets.to(device)
        return self._index


def build_view(
    vllm_config: Any, kv_cache_config: Any, kv_caches: dict[str, torch.Tensor], rank: int, tp_size: int
) -> PagedView:
    """View what vLLM registers with its connectors; on the CPU, first try it against the backend's own writes.

    Args:
        kv_caches: Layer name to tensor, ``[blocks, heads, N, K|V]``; layers that share a cache count once.
        rank: Tensor-parallel rank.

    Raises:
        UnsupportedCache: The tensors are not as this file's docstring says.
    """
    caches = _in_model_order(kv_caches)
    if not caches:
        raise UnsupportedCache("the engine has no KV cache")
    cache_dtype = str(vllm_config.cache_config.cache_dtype)
    first = next(iter(caches.values()))
    dtype = _FP8.get(cache_dtype) or str(first.dtype).removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise UnsupportedCache(f"the KV cache has dtype {dtype}")
    spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    kv_heads = vllm_config.model_config.get_total_num_kv_heads()
    try:
        heads = heads_of_rank(kv_heads, rank, tp_size)
        geometry = KVGeometry(layers=len(caches), kv_heads=kv_heads, head_dim=spec.head_size, dtype=dtype)
    except ValueError as error:
        raise UnsupportedCache(str(error)) from error
    for name, cache in caches.items():
        _check_shape(name, cache, heads.count, geometry.head_dim, spec.block_size, first)
    split = split_gpu_cache
    if first.device.type == "cpu":
        split = split_cpu_cache
        probe_cpu_backend(first, _cpu_isa(vllm_config, spec, caches), cache_dtype)
    return PagedView(
        [split(_as_bytes(cache)) for cache in caches.values()],
        geometry=geometry,
        heads=heads,
        block_size=spec.block_size,
    )


def split_gpu_cache(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of ``[blocks, heads, N, K|V]`` where each token's two halves lie side by side."""
    head_dim = cache.shape[3] // 2
    return cache[..., :head_dim], cache[..., head_dim:]


def split_cpu_cache(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of the CPU backend's cache, whose blocks hold K transposed and then V."""
    tokens, head_dim = cache.shape[2], cache.shape[3] // 2
    halves = cache.flatten(2).unflatten(2, (2, tokens * head_dim))
    keys = halves[:, :, 0].unflatten(2, (head_dim, tokens)).transpose(2, 3)
    return keys, halves[:, :, 1].unflatten(2, (tokens, head_dim))


def probe_cpu_backend(cache: torch.Tensor, isa: str, cache_dtype: str = "auto") -> None:
    """Let the CPU backend write known K and V into a scratch cache, and compare with what we read and write.

    Its layout depends on the instruction set that it picked, and may change with its version.

    Raises:
        UnsupportedCache: They differ, or the backend cannot be called as in the tested vLLM.
    """
    _, heads, tokens, width = cache.shape
    head_dim = width // 2
    dtype = torch.float32 if cache.dtype == torch.uint8 or cache.dtype.itemsize == 1 else cache.dtype
    count = tokens + tokens // 2 + 1  # one block and a part of the next one
    # values that every cache dtype holds exactly, and neighbours that differ along each axis
    numbers = torch.arange(2 * count * heads * head_dim, dtype=torch.int64)
    numbers = (numbers * 7 + numbers // head_dim + numbers // (head_dim * heads)) % 15 - 7
    key, value = numbers.to(dtype).view(2, count, heads, head_dim)
    theirs = torch.zeros(4, heads, tokens, width, dtype=cache.dtype)
    slots = torch.cat([torch.arange(2 * tokens, 3 * tokens), torch.arange(tokens, count)])
    _write_by_backend(theirs, key, value, slots, isa, cache_dtype)
    ours = torch.zeros_like(theirs)
    for scratch, reading in ((theirs, True), (ours, False)):
        stored_dtype = str(_as_bytes(scratch).dtype).removeprefix("torch.")
        geometry = KVGeometry(layers=1, kv_heads=heads, head_dim=head_dim, dtype=stored_dtype)
        view = PagedView(
            [split_cpu_cache(_as_bytes(scratch))], geometry=geometry, heads=HeadRange(0, heads), block_size=tokens
        )
        for side, kv in enumerate((key, value)):
            stored = _as_stored(kv.transpose(0, 1).contiguous(), cache.dtype, cache_dtype)
            if not reading:
                view.scatter(0, side, (2, 1), 0, count, stored)
            elif not torch.equal(view.gather(0, side, (2, 1), 0, count), stored):
                raise UnsupportedCache(f"the CPU attention backend ({isa}) keeps {cache.dtype} KV in an unknown layout")
    if not torch.equal(_as_bytes(ours), _as_bytes(theirs)):
        raise UnsupportedCache(f"the CPU attention backend ({isa}) keeps more than K and V in its cache")


def _write_by_backend(
    cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, isa: str, cache_dtype: str
) -> None:
    """As ``CPUAttentionBackendImpl.do_kv_cache_update`` does it."""
    from vllm import _custom_ops as ops

    blocks, heads, tokens, _ = cache.shape
    key_cache, value_cache = cache.view(blocks, heads, tokens * 2, -1).chunk(2, dim=2)
    try:
        ops.cpu_attn_reshape_and_cache(
            key, value, key_cache, value_cache, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype=cache_dtype
        )
    except (AttributeError, RuntimeError, TypeError) as error:
        raise UnsupportedCache(f"the CPU attention backend cannot be probed: {error}") from error


def _as_stored(kv: torch.Tensor, dtype: torch.dtype, cache_dtype: str) -> torch.Tensor:
    if cache_dtype in _FP8:
        return kv.to(getattr(torch, _FP8[cache_dtype])).view(torch.uint8)
    return kv.to(dtype)


def _as_bytes(cache: torch.Tensor) -> torch.Tensor:
    return cache.view(torch.uint8) if cache.dtype.itemsize == 1 else cache


def _in_model_order(kv_caches: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sorted by the numbers in the layers' names; a cache that several layers share stands once."""
    ordered: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name in sorted(kv_caches, key=lambda name: ([int(number) for number in re.findall(r"\d+", name)], name)):
        if kv_caches[name].data_ptr() not in seen:
            seen.add(kv_caches[name].data_ptr())
            ordered[name] = kv_caches[name]
    return ordered


def _check_shape(
    name: str, cache: torch.Tensor, heads: int, head_dim: int, block_size: int, first: torch.Tensor
) -> None:
    found = f"{name}: {tuple(cache.shape)}, strides {tuple(cache.stride())}, {cache.dtype}"
    if cache.dim() != 4 or cache.shape[1] != heads or cache.shape[3] != 2 * head_dim or cache.stride(3) != 1:
        raise UnsupportedCache(f"expected a cache of [blocks, {heads}, N, {2 * head_dim}], got {found}")
    if block_size % cache.shape[2] != 0:
        raise UnsupportedCache(f"blocks of {block_size} tokens do not divide into the kernel's: {found}")
    if cache.shape != first.shape or cache.dtype != first.dtype or cache.device != first.device:
        raise UnsupportedCache(f"layers have different caches: {tuple(first.shape)}, {first.dtype}, but {found}")


def _cpu_isa(vllm_config: Any, spec: Any, caches: dict[str, torch.Tensor]) -> str:
    """The instruction set that the backend's layers were given; else what it would pick for this cache."""
    name, cache = next(iter(caches.items()))
    layer = vllm_config.compilation_config.static_forward_context.get(name)
    isa = getattr(layer, "isa", None)
    if isinstance(isa, str):
        return isa
    try:
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        found = _get_attn_isa(
            vllm_config.model_config.dtype, cache.shape[2], spec.head_size, vllm_config.cache_config.cache_dtype
        )
    except (ImportError, TypeError, NotImplementedError) as error:
        raise UnsupportedCache(f"the CPU attention backend is not as expected: {error}") from error
    return str(found)
