"""Messages of the side channel with any values that their types allow, and bytes that are almost messages."""

import types
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from hypothesis import strategies as st

from disagg_plugin.control import messages
from disagg_plugin.control.messages import (
    PROTOCOL_VERSION,
    Accepted,
    Cancel,
    DigestPart,
    DigestRequest,
    Heartbeat,
    Hello,
    LoadReport,
    Message,
    ModelIdentity,
    Offer,
    PrefillSpeed,
    Ready,
    Refused,
    Rejected,
    Renew,
    Sent,
    Started,
    Welcome,
)
from disagg_plugin.kv.commands import RankEndpoint
from disagg_plugin.kv.geometry import KVGeometry

NUMBERS = st.one_of(
    st.integers(-4, 40), st.sampled_from([-(2**63), -1, 0, 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
)
FLOATS = st.one_of(st.floats(), st.sampled_from([0.0, -1.0, 1e300, float("nan"), float("inf"), float("-inf")]))
TEXTS = st.one_of(st.text(max_size=20), st.sampled_from(["", "d", "p", "raw", "int8", "queue_full", "\0", "a" * 2_000]))
IDS = st.sampled_from([b"", b"x", bytes(16), b"0123456789abcdef", b"y" * 300])
BYTES = st.one_of(IDS, st.binary(max_size=40))
KINDS = [getattr(messages, name) for name in dir(messages)]
KINDS = [kind for kind in KINDS if isinstance(kind, type) and issubclass(kind, Message) and kind is not Message]


def value_of(hint: Any) -> st.SearchStrategy[Any]:
    """Any value of an annotated type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return st.lists(value_of(arguments[0]), max_size=3).map(tuple)
        return st.tuples(*map(value_of, arguments))
    if isinstance(hint, types.UnionType):
        return st.one_of(*map(value_of, arguments))
    plain: dict[Any, st.SearchStrategy[Any]] = {
        int: NUMBERS,
        float: FLOATS,
        str: TEXTS,
        bytes: BYTES,
        bool: st.booleans(),
        type(None): st.none(),
    }
    return plain[hint] if hint in plain else st.deferred(lambda: structs(hint))


def structs(kind: type) -> st.SearchStrategy[Any]:
    """Instances of a struct or dataclass, valid by type alone."""
    fields = {name: value_of(hint) for name, hint in get_type_hints(kind).items() if not name.startswith("_")}
    if kind is KVGeometry:
        fields["dtype"] = st.sampled_from(["float32", "bfloat16", "uint8", "nonsense"])
    return st.builds(kind, **fields)


THE_TRANSFER = b"the transfer of "  # whoever runs the messages may put a real one's id here
_MODEL = ModelIdentity("config", "weights", "m")
_SHAPE = KVGeometry(layers=4, kv_heads=2, head_dim=64, dtype="float32")
_RANKS = (RankEndpoint(0, "agent", b"metadata", 4096, 1 << 20, 16),)
SANE: tuple[Any, ...] = (
    Offer(THE_TRANSFER, 1, 1_000, 0, 10.0, "raw"),
    Ready(THE_TRANSFER, 0, 999),
    Cancel(THE_TRANSFER, "because"),
    Renew((THE_TRANSFER,)),
    Accepted(THE_TRANSFER, 0.5),
    Refused(THE_TRANSFER, "queue_full"),
    Started(THE_TRANSFER),
    Sent(THE_TRANSFER, 1_000, 0.1),
    LoadReport(1, 1, 100, 1, 0.5, 1e4, PrefillSpeed(0.01, 1e-4, 1e-9, 20, 0.1), DigestPart(0, True, bytes(16), b"")),
    Hello(PROTOCOL_VERSION, (), "d", 2, _MODEL, _SHAPE, _RANKS, 0, 8),
    Welcome(PROTOCOL_VERSION, (), "p", 2, _MODEL, _SHAPE, _RANKS, 4_000, 8),
    Rejected("unknown_peer", "1", "2"),
    Heartbeat(1),
    DigestRequest(),
)


@st.composite
def nearly_sane(draw: st.DrawFn) -> Any:
    """A message that makes sense, but for at most two of its fields."""
    message = draw(st.sampled_from(SANE))
    hints = [(name, hint) for name, hint in get_type_hints(type(message)).items() if not name.startswith("_")]
    changed = draw(st.lists(st.sampled_from(hints), max_size=2)) if hints else []
    return msgspec.structs.replace(message, **{name: draw(value_of(hint)) for name, hint in changed})


MESSAGES = st.one_of(nearly_sane(), nearly_sane(), nearly_sane(), *map(structs, KINDS))


@st.composite
def almost_messages(draw: st.DrawFn) -> bytes:
    """An encoded message, with bytes changed, lost or added."""
    encoded = bytearray(msgspec.msgpack.encode(draw(MESSAGES)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(len(encoded) - 1, 0)))
        match draw(st.sampled_from(["change", "lose", "add", "cut"])):
            case "change" if encoded:
                encoded[at] = draw(st.integers(0, 255))
            case "lose":
                del encoded[at : at + draw(st.integers(0, 8))]
            case "add":
                encoded[at:at] = draw(st.binary(max_size=8))
            case "cut":
                del encoded[at:]
    return bytes(encoded)
