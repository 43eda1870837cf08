"""Which codec a link uses, and what a token of KV takes on the wire then; pure."""

from disagg_plugin.config import CodecChoice, is_loopback
from disagg_plugin.kv.geometry import KVGeometry

SCALE_BYTES = 2  # int8: one bf16 or fp16 scale a vector


def wire_codec(choice: CodecChoice, worker_host: str, kv_dtype: str) -> str:
    """The codec for a link: ``auto`` is raw within one host, where a copy beats the encoder, and int8 between hosts.

    A quantized cache always travels as it is.
    """
    if kv_dtype not in ("float32", "bfloat16", "float16"):
        return "raw"
    if choice != "auto":
        return choice
    return "raw" if is_loopback(worker_host) else "int8"


def wire_bytes_per_token(geometry: KVGeometry, codec: str, *, ranks: int) -> float:
    """KV of one token on the wire, all layers and ranks; heads that several of our ranks hold travel several times."""
    copies = max(1, ranks // geometry.kv_heads)
    if codec == "raw":
        return float(copies * geometry.raw_token_bytes())
    return float(copies * geometry.layers * geometry.sides * geometry.kv_heads * (geometry.head_dim + SCALE_BYTES))
