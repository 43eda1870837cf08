"""What anybody can send us, thrown at who reads it: no exception, no wrong KV, nothing that grows.

Each target is a strategy and a check of one value. ``tests/fuzz/test_fuzz.py`` runs a fixed selection of values,
``benchmarks/fuzzing.py`` as many as fit into a time.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import numpy as np
from fuzz.messages import BYTES, MESSAGES, THE_TRANSFER, almost_messages
from hypothesis import strategies as st
from unit.control.test_impostors import GEOMETRY as MODEL_GEOMETRY
from unit.control.test_impostors import MODEL, RANKS, Service, hello
from unit.kv.test_dataplane import D_BLOCKS, NONCE, TOKENS, Rig

from disagg_plugin.config import load_settings
from disagg_plugin.control.channel import ChannelState
from disagg_plugin.control.decode_port import NotYet, OfferCall, PromptView
from disagg_plugin.control.decode_side import DecodeSide
from disagg_plugin.control.events import PrefillAccepted
from disagg_plugin.control.messages import PROTOCOL_VERSION, Accepted, AnyMessage, Hello, LoadReport, Offer, Welcome
from disagg_plugin.control.offload_call import transfer_id_of
from disagg_plugin.control.prefill_side import PrefillSide
from disagg_plugin.control.prefill_workers import PrefillWorkers
from disagg_plugin.control.router_flow import handed_over, is_handed_over, wants_hold
from disagg_plugin.control.sockets import decode
from disagg_plugin.errors import CodecError, WireError
from disagg_plugin.kv.wire import Kind, Notification, parse_chunk, parse_notification, seal

Check = Callable[[Any], None]
WELCOME = Welcome(PROTOCOL_VERSION, (), "p", 1, MODEL, MODEL_GEOMETRY, RANKS, 4_000, 8)


# -- side channel ------------------------------------------------------------------------------------------------


def decodes_or_not(payload: bytes) -> None:
    """Bytes are a message, or are counted and dropped."""
    counters = {"messages_in": 0, "malformed": 0, "oversized": 0}
    message = decode(payload, counters)
    assert sum(counters.values()) == 1
    if message is not None:
        prefill_role_survives([message])


def prefill_role_survives(sequence: list[AnyMessage]) -> None:
    """A peer that was let in says what it likes, in any order; the role goes on stepping."""
    service = Service()
    side = PrefillSide(
        load_settings({"role": "prefill"}), service.half, ranks=1, kv_capacity_tokens=10_000, clock=lambda: service.now
    )
    service.hears(b"d", "key", hello("d"))
    for message in sequence:
        service.hears(b"d", "key", message)
        side.step()
    offers = [message for message in sequence if isinstance(message, Offer)]
    for offer in offers:
        side.new_request("r", offer.transfer_id, offer.prompt_tokens)
    side.step()
    service.now += 100_000.0
    for _ in range(3):
        service.half.sweep()
        side.finished("r", completed=False)
        side.step()
    assert side.snapshot()["open"] == [], "a ticket that never ends"
    assert service.half.snapshot()["awaited"] == 0


class _Client:
    """A worker's end of the side channel, played by the fuzzer."""

    def __init__(self, **details: Any) -> None:
        self.deliver, self.enter = details["on_message"], details["on_state"]

    async def start(self) -> None: ...
    async def close(self) -> None: ...
    def send(self, message: AnyMessage) -> bool:
        return True


class _Answer:
    """What ``Offloads`` would wait for."""

    def __init__(self) -> None:
        self.given: object = None

    def done(self) -> bool:
        return self.given is not None

    def set_result(self, given: object) -> None:
        self.given = given

    def set_exception(self, error: Exception) -> None:
        self.given = error


def decode_role_survives(sequence: list[AnyMessage]) -> None:
    """A prefill worker says what it likes: the row that decisions see is finite, and a request gets an end."""
    now = [100.0]
    clients: list[_Client] = []
    offered: list[OfferCall] = []

    def make_client(**details: Any) -> _Client:
        clients.append(_Client(**details))
        return clients[-1]

    settings = load_settings(
        {
            "role": "decode",
            "prefill_workers": ["http://10.0.0.1:8000"],
            "policy": {"offload": "threshold", "log_interval_s": None},
            "side_channel": {"host": "0.0.0.0", "insecure": True},
        }
    )
    own = Hello(PROTOCOL_VERSION, (), "d:1", 5, MODEL, MODEL_GEOMETRY, RANKS, 0, 8)
    workers = PrefillWorkers(
        settings,
        own,
        make_client=make_client,  # type: ignore[arg-type]
        post=lambda _call, *args: offered.extend(one for one in args if isinstance(one, OfferCall)),
        clock=lambda: now[0],
    )
    _run(workers._apply(workers._directory.known()))
    side = DecodeSide(settings, workers, engine="d", kv_capacity_tokens=100_000, clock=lambda: now[0])
    (client,) = clients
    client.enter(ChannelState.UP, "connected")
    client.deliver(WELCOME)
    client.deliver(LoadReport(1, 0, 0, 0, 0.0, 1e4))
    prompt = PromptView("r", tuple(range(2_000)))
    side.match(prompt, 0, free_tokens=100_000)
    (transfer_id,) = [call.transfer_id for call in offered]
    (link,) = workers._links.values()
    link.answers[transfer_id] = answer = _Answer()  # type: ignore[assignment]
    for message in sequence:
        if getattr(message, "transfer_id", b"") == THE_TRANSFER:
            message = msgspec.structs.replace(message, transfer_id=transfer_id)  # type: ignore[type-var]
        client.deliver(message)
        if isinstance(answer.given, Accepted):
            workers._events.append(PrefillAccepted(transfer_id, link.name, answer.given.eta_s))
            answer.given = None
        side.match(prompt, 0, free_tokens=100_000)
        side.step()
    for row in workers.workers():
        numbers = [
            row.queued_requests,
            row.kv_usage,
            row.prefill_tokens_per_s,
            row.overhead_s,
            row.queued_prefill_tokens,
        ]
        assert all(math.isfinite(number) and number >= 0 for number in numbers), row
    policies = side.figures()["policies"]
    assert isinstance(policies, dict)
    assert policies["builtin_errors"] == 0
    now[0] += 1_000.0
    assert not isinstance(side.match(prompt, 0, free_tokens=100_000), NotYet), "a request that waits for ever"
    side.step()
    side.finished("r")
    assert side.snapshot()["tracked_requests"] == 0
    side.close()


def _run(coroutine: Any) -> None:
    """A coroutine that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    raise AssertionError("it waits")


# -- data plane --------------------------------------------------------------------------------------------------


def notification_parses_or_not(message: bytes) -> None:
    try:
        parsed = parse_notification(message)
    except WireError:
        return
    assert parsed.pack() == message[:6] + parsed.pack()[6:]


def a_chunk() -> bytes:
    """A real one, from a real transfer."""
    rig = Rig(manual=True)
    rig.begin()
    rig.run(2)
    write = rig.network.pending[0]
    return bytes(rig.p._memory.staging.buffer[: write.nbytes].numpy().tobytes())


CHUNK = a_chunk()
MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["set", "cut", "grow", "word"]), st.integers(0, len(CHUNK) - 1), st.integers(0, 2**32 - 1)
    ),
    min_size=1,
    max_size=4,
)


def mutated(changes: list[tuple[str, int, int]]) -> np.ndarray:
    chunk = bytearray(CHUNK)
    for how, at, value in changes:
        at %= max(len(chunk), 1)
        match how:
            case "set" if chunk:
                chunk[at] = value & 0xFF
            case "cut":
                del chunk[at:]
            case "grow":
                chunk += value.to_bytes(4, "little")
            case "word":  # into the header
                at %= 80
                chunk[at : at + 4] = value.to_bytes(4, "little")
    return np.frombuffer(bytes(chunk), dtype=np.uint8).copy()


def damaged_chunk_is_noticed(changes: list[tuple[str, int, int]]) -> None:
    chunk = mutated(changes)
    if chunk.tobytes() == CHUNK:
        return
    try:
        parse_chunk(chunk)
    except CodecError:
        return
    raise AssertionError("a damaged chunk was taken for whole")


def sealed_chunk_stays_within_its_request(changes: list[tuple[str, int, int]]) -> None:
    """A peer that computes checksums for its nonsense: refused, or it writes to its own request's blocks only."""
    chunk = mutated(changes)
    if len(chunk) >= 80:
        seal(chunk)
    rig = Rig(manual=True)
    rig.begin()
    rig.run(2)
    write = rig.network.pending[0]
    size = min(len(chunk), 4096)
    staging = rig.p._memory.staging.buffer.numpy()
    staging[:size] = chunk[:size]
    write.nbytes = size
    write.notification = dataclasses.replace(parse_notification(write.notification), nbytes=size).pack()
    before = rig.views["d"].cache.clone()
    for pending in list(rig.network.pending):
        rig.network.deliver(pending)
    rig.run(4)
    changed = (rig.views["d"].cache != before).flatten(1).any(1).nonzero().flatten().tolist()
    assert set(changed) <= set(D_BLOCKS[: -(-TOKENS // 8)])
    counters = rig.d.counters()
    assert (counters["internal_errors"], counters["hook_errors"]) == (0, 0)


NOTIFICATIONS = st.lists(
    st.one_of(
        st.binary(max_size=64),
        st.builds(
            lambda *fields: Notification(*fields).pack(),
            st.sampled_from(Kind),
            st.sampled_from([0, 1, 3, 4, 4000, 65535]),
            st.sampled_from([0, 1, 2, 2**32 - 1]),
            st.sampled_from([0, 1, 2]),
            st.sampled_from([0, NONCE, 2**64 - 1]),
            st.sampled_from([0, 79, 80, 4096, 4097, 2**64 - 1]),
        ),
    ),
    max_size=30,
)


def notifications_change_nothing(messages: list[bytes]) -> None:
    """A known agent notifies of anything, at both ends of an open transfer: the KV is right, or it is not used."""
    rig = Rig()
    rig.begin()
    for message in messages:
        for engine in "pd":
            other = "d" if engine == "p" else "p"
            target = rig.planes[engine].endpoint.agent_name
            rig.network.agents[target].notifications.append((rig.planes[other].endpoint.agent_name, message))
        rig.pump(1)
    rig.run()
    rig.now += 100.0
    rig.run(4)
    if "r" in rig.said("d", "received"):
        assert rig.error() == 0.0
    for plane in rig.planes.values():
        counters = plane.counters()
        assert (counters["internal_errors"], counters["hook_errors"]) == (0, 0)
        assert counters["unanswered"] == 0


# -- HTTP --------------------------------------------------------------------------------------------------------

KEYS = st.sampled_from(
    [
        *("disagg", "transfer_id", "do_remote_prefill", "do_remote_decode", "remote_host", "remote_port"),
        *("remote_engine_id", "remote_block_ids", "remote_request_id", "tp_size", "x"),
    ]
)
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=40), st.just("ab" * 16)
)
PARAMETERS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=5)),
    max_leaves=12,
)


def http_parameters_are_read_or_not(params: Any) -> None:
    params = json.loads(json.dumps(params))
    found = transfer_id_of(params)
    assert found is None or len(found) == 16
    wants_hold(params)
    is_handed_over(params)
    handed_over(params)


# ----------------------------------------------------------------------------------------------------------------

TARGETS: Mapping[str, tuple[st.SearchStrategy[Any], Check]] = {
    "side_channel_bytes": (st.one_of(BYTES, almost_messages()), decodes_or_not),
    "prefill_role": (st.lists(MESSAGES, max_size=6), prefill_role_survives),
    "decode_role": (st.lists(MESSAGES, max_size=6), decode_role_survives),
    "notification": (
        st.one_of(st.binary(max_size=64), st.binary(min_size=32, max_size=32)),
        notification_parses_or_not,
    ),
    "notifications": (NOTIFICATIONS, notifications_change_nothing),
    "chunk_damaged": (MUTATIONS, damaged_chunk_is_noticed),
    "chunk_sealed": (MUTATIONS, sealed_chunk_stays_within_its_request),
    "http_parameters": (PARAMETERS, http_parameters_are_read_or_not),
}


NAN, INF = float("nan"), float("inf")
CORPUS: Mapping[str, list[Any]] = {
    "decode_role": [
        [Accepted(THE_TRANSFER, NAN)],
        [Accepted(THE_TRANSFER, INF)],
        [Accepted(THE_TRANSFER, -1e300)],
        [LoadReport(1, -5, 2**63, -1, NAN, 0.0)],
        [msgspec.structs.replace(WELCOME, epoch=9), Accepted(THE_TRANSFER, 0.0)],
        [msgspec.structs.replace(WELCOME, endpoints=())],
    ],
    "prefill_role": [
        [Offer(bytes(16), 2**64 - 1, 10, 0, INF, "raw")],
        [Offer(bytes(16), -1, 10, 0, NAN, "raw")],
        [Offer(b"short", 1, -10, 0, 1.0, "nonsense")],
        [Offer(bytes(16), 1, 10, 0, 1.0, "raw"), Offer(bytes(16), 2, 10, 0, 1.0, "raw")],
        [hello("d", epoch=2), hello("d", epoch=1)],
    ],
    "notifications": [[Notification(Kind.CHUNK, 0, 0, 1, NONCE, 2**64 - 1).pack()] * 8],
    "http_parameters": [{"disagg": {"transfer_id": "ab" * 16, "host": "10.0.0.1"}}, {"disagg": []}, [[]], "disagg"],
}


def quiet() -> None:
    """What is refused is logged; nobody reads a million lines."""
    logging.getLogger("disagg_plugin").setLevel(logging.CRITICAL)
