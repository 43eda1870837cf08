"""Whether the KV of two engines may be mixed: checked at the handshake, never assumed. Pure."""

from dataclasses import dataclass

from disagg_plugin.control.messages import PROTOCOL_VERSION, Hello, ModelIdentity, Welcome
from disagg_plugin.kv.geometry import KVGeometry, senders_per_receiver

OLDEST_PROTOCOL = PROTOCOL_VERSION  # N talks to N-1 from version 2 on
FLOAT_DTYPES = frozenset({"float32", "bfloat16", "float16"})


@dataclass(frozen=True, slots=True)
class Party:
    """What one side of a handshake says about itself."""

    protocol: int
    model: ModelIdentity
    geometry: KVGeometry
    tensor_parallel: int


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Why two engines must not exchange KV; ``reason`` is a word for counters, the rest is for people."""

    reason: str
    ours: str
    theirs: str

    def __str__(self) -> str:
        return f"{self.reason} differs: ours {self.ours}, theirs {self.theirs}"


def party_of(introduction: Hello | Welcome) -> Party:
    """Who introduces itself."""
    return Party(
        introduction.protocol,
        introduction.model,
        introduction.geometry,
        tensor_parallel=len(introduction.endpoints),
    )


def find_mismatch(ours: Party, theirs: Party) -> Mismatch | None:
    """The first thing that forbids an exchange, or None.

    Block size, cache layout, slot size, tensor parallelism and the float dtype of the cache may differ: the wire form
    depends on none of them. A quantized cache travels as it is and therefore needs the same dtype on both sides.
    """
    if theirs.protocol < OLDEST_PROTOCOL:
        return Mismatch("protocol", f">= {OLDEST_PROTOCOL}", str(theirs.protocol))
    checks: list[tuple[str, object, object]] = [
        ("config_fingerprint", ours.model.config_fingerprint, theirs.model.config_fingerprint),
        ("weights_digest", ours.model.weights_digest, theirs.model.weights_digest),
        ("layers", ours.geometry.layers, theirs.geometry.layers),
        ("kv_heads", ours.geometry.kv_heads, theirs.geometry.kv_heads),
        ("head_dim", ours.geometry.head_dim, theirs.geometry.head_dim),
        ("sides", ours.geometry.sides, theirs.geometry.sides),
    ]
    if not {ours.geometry.dtype, theirs.geometry.dtype} <= FLOAT_DTYPES:
        checks.append(("kv_dtype", ours.geometry.dtype, theirs.geometry.dtype))
    for reason, mine, other in checks:
        if mine != other:
            return Mismatch(reason, str(mine), str(other))
    return None


def find_lane_mismatch(prefill: Party, decode: Party, *, region_slots: int) -> Mismatch | None:
    """Why the ranks of the two cannot exchange heads, or None; said from the prefill side.

    Args:
        region_slots: Of each decode rank's ring, for this prefill engine: shared by the ranks that write to it.
    """
    sizes = (prefill.tensor_parallel, decode.tensor_parallel)
    try:
        senders = senders_per_receiver(prefill.geometry.kv_heads, *sizes)
    except ValueError as error:
        return Mismatch("tensor_parallel", f"{sizes[0]} ({error})", str(sizes[1]))
    if senders > region_slots:
        return Mismatch("region_slots", f"{senders} ranks that write to each of theirs", str(region_slots))
    return None
