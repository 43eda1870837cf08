"""Which codec a link uses, and what a token of KV takes on the wire then; pure."""

from collections.abc import Sequence

from disagg_plugin.config import CodecChoice, is_loopback
from disagg_plugin.kv.commands import RankEndpoint
from disagg_plugin.kv.geometry import KVGeometry
from disagg_policies.snapshots import CodecChoices, Link

QUANTIZABLE = ("float32", "bfloat16", "float16")
SCALE_BYTES = 2  # int8: one bf16 or fp16 scale a vector


def wire_codec(choice: CodecChoice, worker_host: str, kv_dtype: str) -> str:
    """The codec for a link: ``auto`` is raw within one host, where a copy beats the encoder, and int8 between hosts.

    Between hosts that holds until the codec policy was asked (``codec_choices``). A quantized cache always travels as
    it is.
    """
    if kv_dtype not in QUANTIZABLE:
        return "raw"
    if choice != "auto":
        return choice
    return "raw" if is_loopback(worker_host) else "int8"


def codec_choices(
    link: Link, codec: str, geometry: KVGeometry, *, senders: Sequence[RankEndpoint], receivers: Sequence[RankEndpoint]
) -> CodecChoices | None:
    """What a codec policy compares for one link, or None where the senders' codec was not measured.

    Args:
        codec: In use on the link.
    """
    encode_bytes_per_s = sum([e.encode_bytes_per_s for e in senders])
    if encode_bytes_per_s <= 0 or geometry.dtype not in QUANTIZABLE:
        return None
    decode_bytes_per_s = sum([e.decode_bytes_per_s for e in receivers])
    ranks = len(receivers)
    return CodecChoices(
        link=link,
        raw_bytes_per_token=wire_bytes_per_token(geometry, "raw", ranks=ranks),
        int8_bytes_per_token=wire_bytes_per_token(geometry, "int8", ranks=ranks),
        encode_bytes_per_s=encode_bytes_per_s,
        decode_bytes_per_s=decode_bytes_per_s or None,
        previous=codec if link.samples else None,
    )


def wire_bytes_per_token(geometry: KVGeometry, codec: str, *, ranks: int) -> float:
    """KV of one token on the wire, all layers and ranks; heads that several of our ranks hold travel several times."""
    copies = max(1, ranks // geometry.kv_heads)
    if codec == "raw":
        return float(copies * geometry.raw_token_bytes())
    return float(copies * geometry.layers * geometry.sides * geometry.kv_heads * (geometry.head_dim + SCALE_BYTES))
