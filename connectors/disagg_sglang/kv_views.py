"""SGLang's KV pool of one rank, read and written as canonical KV.

The pool is one tensor a layer and side, ``[slots, heads, head_dim]``, as ``kv.slot_view`` has it; page 0 is padding and
belongs to no request. Other layouts (HND, 5-D, quantized, MLA, sliding window) are refused by name.
"""

from typing import Any

from disagg_plugin.errors import ConfigError
from disagg_plugin.kv.geometry import DTYPE_BYTES, KVGeometry
from disagg_plugin.kv.slot_view import SlotView


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
