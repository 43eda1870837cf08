"""The side channel on real loopback sockets: round trips, every way to fail authentication, hostile traffic."""

import asyncio
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg_plugin.control import channel, messages, sockets
from disagg_plugin.control.channel import ChannelState, SideChannelClient, SideChannelServer, check_exposure
from disagg_plugin.control.keys import KeyRing, generate, generate_next_server
from disagg_plugin.control.messages import MAX_MESSAGE_BYTES, AnyMessage
from disagg_plugin.errors import ConfigError, PeerError
from disagg_plugin.kv.commands import RankEndpoint
from disagg_plugin.kv.geometry import KVGeometry

NOTICED_S = 5.0  # authentication failures must show by then
HELLO = messages.Heartbeat(epoch=1)

_identity = messages.ModelIdentity("config", "weights", "a model")
_shape = (KVGeometry(28, 8, 128, "bfloat16"), (RankEndpoint(0, "agent", b"\x00\xffmetadata", 2**47, 16 << 20, 64),))
EVERY_MESSAGE: list[AnyMessage] = [
    messages.Hello(1, ("a", "b"), "engine", 7, _identity, *_shape, region_first_slot=8, region_slots=8),
    messages.Welcome(1, (), "engine", 2**63, _identity, *_shape, max_prompt_tokens=4096, prefill_queue_max=8),
    messages.Rejected("weights", "abc", "def"),
    messages.Renew((b"\x00" * 16, b"\xff" * 16)),
    messages.Offer(b"\x00" * 16, 2**64 - 1, 3000, 16, 30.0, "int8c", priority=-1),
    messages.Accepted(b"\xff" * 16, 0.25),
    messages.Refused(b"id", "queue_full"),
    messages.Started(b"id"),
    messages.Ready(b"id", 16, 2999),
    messages.Sent(b"id", 4_096, 0.25),
    messages.Cancel(b"id", "deadline"),
    HELLO,
    messages.LoadReport(1, 2, 3000, 4, 0.5, 1e4),
    messages.LoadReport(
        1,
        *(2, 3000, 4, 0.5, 1e4),
        prefill=messages.PrefillSpeed(0.01, 1e-4, 1e-9, 20, 0.1),
        digest=messages.DigestPart(7, True, b"\xff" * 16, b""),
    ),
    messages.DigestRequest(),
    messages.SnapshotRequest(),
    messages.Snapshot('{"peers": [], "text": "Grüße"}'),
]


class End:
    """A server or client under test with what its callbacks got; ``until`` waits for a condition, woken by them."""

    def __init__(self) -> None:
        self.got: list[Any] = []
        self.states: list[tuple[ChannelState, str]] = []
        self.channel: Any = None

    @property
    def counters(self) -> dict[str, int]:
        counters: dict[str, int] = self.channel.counters
        return counters

    async def is_(self, state: ChannelState) -> str:
        await until(lambda: self.channel.state is state, what=f"{state} instead of {self.channel.state}")
        return str(self.channel.reason)


async def until(condition: Callable[[], bool], *, what: str = "", limit_s: float = NOTICED_S) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"not within {limit_s} s: {what}"
        await asyncio.sleep(0.002)


@asynccontextmanager
async def serving(keys: KeyRing | None, *, port: int = 0, echo: bool = False, **more: Any) -> AsyncIterator[End]:
    end = End()

    def on_message(identity: bytes, message: AnyMessage) -> None:
        end.got.append((identity, message))
        if echo:
            end.channel.send(identity, message)

    end.channel = SideChannelServer(host="127.0.0.1", port=port, keys=keys, on_message=on_message, **more)
    try:
        end.port = await end.channel.start()
        yield end
    finally:
        await end.channel.close()


@asynccontextmanager
async def connecting(port: int, keys: KeyRing | None, *, identity: bytes = b"d-0", **more: Any) -> AsyncIterator[End]:
    end = End()
    more.setdefault("on_message", end.got.append)
    more.setdefault("on_state", lambda state, reason: end.states.append((state, reason)))
    more.setdefault("host", "127.0.0.1")
    end.channel = SideChannelClient(port=port, keys=keys, identity=identity, **more)
    try:
        await end.channel.start()
        yield end
    finally:
        await end.channel.close()


@pytest.fixture
def fleet(tmp_path: Path) -> KeyRing:
    return generate(tmp_path / "fleet", fleet=True)


@pytest.fixture
def stranger(tmp_path: Path) -> KeyRing:
    """Has keys, but not ours."""
    return generate(tmp_path / "stranger", fleet=True)


def run(scenario: Awaitable[None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(60):
            await scenario

    asyncio.run(limited(), debug=False)


def warnings_of(caplog: pytest.LogCaptureFixture, text: str) -> list[str]:
    return [record.message for record in caplog.records if text in record.message]


@pytest.mark.parametrize("keyed", [True, False], ids=["with keys", "without keys"])
def test_every_message_makes_the_round_trip_unchanged_and_in_order(fleet: KeyRing, keyed: bool):
    keys = fleet if keyed else None

    async def scenario() -> None:
        async with serving(keys, echo=True) as server, connecting(server.port, keys, identity=b"d#1") as client:
            await client.is_(ChannelState.UP)
            for message in EVERY_MESSAGE:
                assert client.channel.send(message)
            await until(lambda: len(client.got) == len(EVERY_MESSAGE), what="all answers")
            assert server.got == [(b"d#1", message) for message in EVERY_MESSAGE]
            assert client.got == EVERY_MESSAGE
            assert client.counters["messages_in"] == server.counters["messages_out"] == len(EVERY_MESSAGE)

    assert {type(message) for message in EVERY_MESSAGE} == set(AnyMessage.__args__)
    run(scenario())


def test_a_client_may_speak_as_soon_as_it_hears_that_it_is_up(fleet: KeyRing):
    async def scenario() -> None:
        async with serving(fleet) as server:
            heard: list[bool] = []

            def on_state(state: ChannelState, _: str) -> None:
                if state is ChannelState.UP:
                    heard.append(client.channel.send(HELLO))

            async with connecting(server.port, fleet, on_state=on_state) as client:
                await until(lambda: server.got == [(b"d-0", HELLO)], what="the first message")
                assert heard == [True]

    run(scenario())


def test_a_context_can_be_shared_and_is_not_closed(fleet: KeyRing):
    async def scenario() -> None:
        with zmq.asyncio.Context() as context:
            async with (
                serving(fleet, echo=True, context=context) as server,
                connecting(server.port, fleet, context=context) as client,
            ):
                await client.is_(ChannelState.UP)
                client.channel.send(HELLO)
                await until(lambda: client.got == [HELLO], what="the answer")
            assert not context.closed

    run(scenario())


def test_the_largest_message_passes_and_a_larger_one_is_refused_at_the_sender(fleet: KeyRing):
    overhead = len(msgspec.msgpack.encode(messages.Snapshot(""))) + 4  # a long string's header is 5 bytes, not 1

    async def scenario() -> None:
        async with serving(fleet, echo=True) as server, connecting(server.port, fleet) as client:
            await client.is_(ChannelState.UP)
            largest = messages.Snapshot("x" * (MAX_MESSAGE_BYTES - overhead))
            larger = messages.Snapshot("x" * (MAX_MESSAGE_BYTES - overhead + 1))
            with pytest.raises(PeerError, match="over the limit of 4194304"):
                client.channel.send(larger)
            with pytest.raises(PeerError, match="a Snapshot of 4194305 bytes"):
                server.channel.send(b"d-0", larger)
            client.channel.send(largest)
            await until(lambda: client.got == [largest], what="the largest message")
            assert client.channel.state is ChannelState.UP
            assert client.counters["oversized"] == server.counters["oversized"] == 1

    run(scenario())


async def refused_on_both_ends(server: End, client: End, caplog: pytest.LogCaptureFixture, line: str) -> str:
    began = time.monotonic()
    reason = await client.is_(ChannelState.AUTHENTICATION_FAILED)
    await until(lambda: server.counters["rejected_auth"] >= 1, what="counted by the server")
    assert time.monotonic() - began < NOTICED_S
    await until(lambda: client.counters["auth_failures"] >= 4, what="the client goes on trying")
    lines = warnings_of(caplog, "side channel: authentication of ")
    assert 1 <= len(lines) <= 2, "one line per address; in a race it may be unknown"
    assert line in lines[0]
    assert not client.channel.send(HELLO)
    assert {state for state, _ in client.states} == {ChannelState.AUTHENTICATION_FAILED}
    assert 1 <= len(client.states) <= 2, "once; once more if a vague reason became certain"
    assert len(warnings_of(caplog, "side channel: authentication failed: ")) == len(client.states)
    assert server.got == []
    return reason


def test_an_unknown_client_key_shows_on_both_ends(fleet: KeyRing, stranger: KeyRing, caplog: pytest.LogCaptureFixture):
    (stranger.directory / "server.pub").write_bytes(fleet.server.public)

    async def scenario() -> None:
        async with serving(fleet) as server, connecting(server.port, stranger) as client:
            line = f"127.0.0.1 failed: its client key {stranger.client.public.decode()} is not accepted here"
            assert "copy our client.pub" in await refused_on_both_ends(server, client, caplog, line)

    run(scenario())


def test_a_wrong_server_key_shows_on_both_ends(fleet: KeyRing, stranger: KeyRing, caplog: pytest.LogCaptureFixture):
    async def scenario() -> None:
        async with serving(fleet) as server, connecting(server.port, stranger) as client:
            line = "failed: it expects another server key: give it this node's server.pub"
            assert "is its server.pub in our servers/?" in await refused_on_both_ends(server, client, caplog, line)

    run(scenario())


@pytest.mark.parametrize("server_keyed", [True, False], ids=["the server", "the client"])
def test_keys_on_one_end_only_show_on_both_ends(fleet: KeyRing, caplog: pytest.LogCaptureFixture, server_keyed: bool):
    ends = (fleet, None) if server_keyed else (None, fleet)

    async def scenario() -> None:
        async with serving(ends[0]) as server, connecting(server.port, ends[1]) as client:
            line = "failed: only one end uses keys: set side_channel.keys_dir on both"
            assert "127.0.0.1" in await refused_on_both_ends(server, client, caplog, line)

    run(scenario())


def test_a_client_without_any_key_for_that_server_says_so(fleet: KeyRing, tmp_path: Path):
    node = generate(tmp_path / "node", fleet=False, name="d")
    for path in (node.directory / "servers" / "d.pub", node.directory / "server.pub"):
        path.unlink()

    async def scenario() -> None:
        async with serving(fleet) as server, connecting(server.port, node) as client:
            assert "no server key for 127.0.0.1" in await client.is_(ChannelState.AUTHENTICATION_FAILED)
            (node.directory / "servers" / "127.0.0.1.pub").write_bytes(fleet.server.public)
            await until(lambda: "does not accept our client key" in client.channel.reason, what="the next reason")
            (fleet.directory / "allowed" / "d.pub").write_bytes(node.client.public)
            await client.is_(ChannelState.UP)

    run(scenario())


def test_a_client_key_added_at_run_time_connects_and_once_removed_connects_no_more(fleet: KeyRing, stranger: KeyRing):
    (stranger.directory / "server.pub").write_bytes(fleet.server.public)
    accepted = fleet.directory / "allowed" / "late.pub"

    async def scenario() -> None:
        async with serving(fleet) as server:
            async with connecting(server.port, stranger) as client:
                await client.is_(ChannelState.AUTHENTICATION_FAILED)
                accepted.write_bytes(stranger.client.public)
                await client.is_(ChannelState.UP)
                client.channel.send(HELLO)
                await until(lambda: server.got == [(b"d-0", HELLO)], what="the message")
            accepted.unlink()
            async with connecting(server.port, stranger) as client:
                await client.is_(ChannelState.AUTHENTICATION_FAILED)

    run(scenario())


def test_a_server_key_is_rotated_while_clients_know_the_current_and_the_next(fleet: KeyRing, tmp_path: Path):
    generate_next_server(fleet.directory)
    rotated = tmp_path / "rotated"
    rotated.mkdir(mode=0o700)
    for path in fleet.directory.glob("*.*"):
        (rotated / path.name.replace("server-next", "server")).write_bytes(
            (fleet.directory / path.name.replace("server.", "server-next.")).read_bytes()
        )
    for path in rotated.glob("*.key"):
        path.chmod(0o600)
    new = KeyRing.load(rotated)
    assert new.server != fleet.server

    async def scenario() -> None:
        async with serving(fleet) as server, connecting(server.port, fleet) as client:
            await client.is_(ChannelState.UP)
            await server.channel.close()
            await client.is_(ChannelState.DOWN)
            async with serving(new, port=server.port):
                await client.is_(ChannelState.UP)
                assert ChannelState.AUTHENTICATION_FAILED not in [state for state, _ in client.states]

    run(scenario())


def test_a_server_that_restarts_is_found_again_and_what_was_sent_meanwhile_is_dropped(fleet: KeyRing):
    async def scenario() -> None:
        async with serving(fleet) as server, connecting(server.port, fleet) as client:
            await client.is_(ChannelState.UP)
            await server.channel.close()
            assert "lost" in await client.is_(ChannelState.DOWN)
            assert [client.channel.send(HELLO) for _ in range(3)] == [False] * 3
            assert client.counters["dropped"] == 3
            async with serving(fleet, port=server.port) as again:
                await client.is_(ChannelState.UP)
                assert client.channel.send(EVERY_MESSAGE[0])
                await until(lambda: again.got == [(b"d-0", EVERY_MESSAGE[0])], what="only the new message")

    run(scenario())


def test_nobody_listening_is_down_and_not_an_authentication_failure(fleet: KeyRing):
    async def scenario() -> None:
        with closing(socket.create_server(("127.0.0.1", 0))) as reserved:
            port = reserved.getsockname()[1]
        async with connecting(port, fleet) as client:
            assert "connection refused at 127.0.0.1" in await client.is_(ChannelState.DOWN)
        async with connecting(port, fleet, host="no-such-host.invalid") as client:
            assert "cannot resolve 'no-such-host.invalid'" in await client.is_(ChannelState.DOWN)

    run(scenario())


def test_a_server_that_accepts_but_never_answers_is_down(fleet: KeyRing, monkeypatch: pytest.MonkeyPatch):
    for module in (sockets, channel):
        monkeypatch.setattr(module, "HANDSHAKE_S", 0.5)

    async def scenario() -> None:
        with closing(socket.create_server(("127.0.0.1", 0))) as silent:
            async with connecting(silent.getsockname()[1], fleet) as client:
                assert "does not answer the handshake" in await client.is_(ChannelState.DOWN)

    run(scenario())


def test_a_host_name_works_on_both_ends(fleet: KeyRing):
    async def scenario() -> None:
        end = SideChannelServer(host="localhost", port=0, keys=fleet, on_message=lambda *_: None)
        port = await end.start()
        async with connecting(port, fleet, host="localhost") as client:
            await client.is_(ChannelState.UP)
        await end.close()

    run(scenario())


def test_messages_to_a_vanished_client_are_dropped_and_counted(fleet: KeyRing):
    async def scenario() -> None:
        async with serving(fleet, echo=True) as server:
            assert not server.channel.send(b"never seen", HELLO)
            async with connecting(server.port, fleet) as client:
                await client.is_(ChannelState.UP)
                client.channel.send(HELLO)
                await until(lambda: client.got == [HELLO], what="the answer")
            await until(lambda: not server.channel.send(b"d-0", HELLO), what="the client is gone")
            assert server.counters["dropped"] == 2

    run(scenario())


def test_a_client_that_reads_nothing_costs_bounded_memory():
    async def scenario() -> None:
        async with serving(None) as server, connecting(server.port, None) as client:
            await client.is_(ChannelState.UP)
            client.channel.send(HELLO)
            await until(lambda: len(server.got) == 1, what="introduced")
            big = messages.Snapshot("x" * 100_000)
            accepted = sum(server.channel.send(b"d-0", big) for _ in range(5000))  # the client's loop never runs here
            assert accepted < 2000
            assert server.counters["dropped"] == 5000 - accepted

    run(scenario())


def test_a_client_that_reconnects_with_its_identity_replaces_its_former_self(fleet: KeyRing):
    async def scenario() -> None:
        async with serving(fleet, echo=True) as server, connecting(server.port, fleet) as old:
            await old.is_(ChannelState.UP)
            async with connecting(server.port, fleet) as new:
                await new.is_(ChannelState.UP)
                new.channel.send(EVERY_MESSAGE[0])
                await until(lambda: new.got == [EVERY_MESSAGE[0]], what="the answer goes to the new one")
                assert old.got == []

    run(scenario())


def raw_dealer(context: "zmq.Context[Any]", port: int, keys: KeyRing | None) -> "zmq.Socket[bytes]":
    dealer = context.socket(zmq.DEALER)
    dealer.linger = 0
    if keys is not None:
        dealer.curve_serverkey = keys.server.public
        dealer.curve_publickey, dealer.curve_secretkey = keys.client.public, keys.client.secret
    dealer.connect(f"tcp://127.0.0.1:{port}")
    return dealer


def test_malformed_messages_of_an_authenticated_peer_are_counted_and_dropped(fleet: KeyRing):
    bad = [
        b"",
        b"\xc1",
        b"\x01",
        b"\x81\xa1t\xa7unknown",
        b"\x81\xa1t\xa5offer",
        b"\x82\xa1t\xa8snapshot\xa4json\xa2\xff\xff",
        b"\x82\xa1t\xa7started\xa1x" + b"\x91" * 200_000,
        os.urandom(1000),
    ]

    async def scenario() -> None:
        async with serving(fleet) as server:
            with zmq.Context() as context, raw_dealer(context, server.port, fleet) as dealer:
                for payload in bad:
                    dealer.send(payload)
                dealer.send_multipart([b"two", b"frames"])
                dealer.send(b"\xc0" * (MAX_MESSAGE_BYTES + 1))
                dealer.send(msgspec.msgpack.encode(HELLO))
                await until(lambda: len(server.got) == 1, what="the good message after the bad ones")
            assert server.counters["malformed"] == len(bad) + 1
            assert server.counters["oversized"] == 1

    run(scenario())


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_no_bytes_whatever_get_through_the_decoder_as_an_exception(payload: bytes):
    counters = {"malformed": 0, "messages_in": 0, "oversized": 0}
    sockets.decode(payload, counters)
    assert sum(counters.values()) == 1


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(EVERY_MESSAGE), st.integers(0, 2**16), st.integers(1, 255))
def test_no_single_damaged_byte_gets_through_the_decoder_as_an_exception(message: AnyMessage, at: int, flip: int):
    payload = bytearray(msgspec.msgpack.encode(message))
    payload[at % len(payload)] ^= flip
    counters = {"malformed": 0, "messages_in": 0, "oversized": 0}
    sockets.decode(bytes(payload), counters)
    assert sum(counters.values()) == 1


def test_a_callback_that_raises_is_logged_once_per_kind_and_the_reader_goes_on(
    fleet: KeyRing, caplog: pytest.LogCaptureFixture
):
    seen: list[AnyMessage] = []

    def fragile(message: AnyMessage) -> None:
        seen.append(message)
        raise KeyError("fragile") if len(seen) % 2 else ValueError("fragile")

    async def scenario() -> None:
        async with serving(fleet, echo=True) as server, connecting(server.port, fleet, on_message=fragile) as client:
            await client.is_(ChannelState.UP)
            for _ in range(6):
                client.channel.send(HELLO)
            await until(lambda: len(seen) == 6, what="all messages")
            assert client.counters["callback_errors"] == 6
            assert len(warnings_of(caplog, "raised; logged once per kind")) == 2

    run(scenario())


GREETING = b"\xff" + b"\0" * 8 + b"\x7f\x03\x00"
HOSTILE = {
    "garbage": os.urandom(500),
    "garbage that begins like a greeting": b"\xff" + os.urandom(500),
    "HTTP": b"GET /v1/models HTTP/1.1\r\nHost: p-0:5600\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + os.urandom(300),
    "an old ZMTP peer": b"\x01\x00\x05hello",
    "a greeting without CURVE": GREETING + b"NULL".ljust(20, b"\0") + b"\0" * 32 + b"\x04\x19\x05READY",
    "a greeting with CURVE and then garbage": GREETING + b"CURVE".ljust(20, b"\0") + b"\0" * 32 + os.urandom(300),
    "half a greeting": GREETING[:7],
}


@pytest.mark.parametrize("keyed", [True, False], ids=["with keys", "without keys"])
@pytest.mark.parametrize("traffic", HOSTILE)
def test_the_server_goes_on_serving_after(fleet: KeyRing, traffic: str, keyed: bool):
    keys = fleet if keyed else None

    async def scenario() -> None:
        async with serving(keys, echo=True) as server:
            for _ in range(20):
                with closing(socket.create_connection(("127.0.0.1", server.port))) as attacker:
                    attacker.sendall(HOSTILE[traffic])
                    with suppress(OSError):  # hung up already
                        attacker.shutdown(socket.SHUT_WR)
                    attacker.setblocking(False)
                    await until(lambda: gone(attacker), what="the server hangs up")
            async with connecting(server.port, keys) as client:
                await client.is_(ChannelState.UP)
                client.channel.send(HELLO)
                await until(lambda: client.got == [HELLO], what="the answer")
            assert server.got == [(b"d-0", HELLO)]

    run(scenario())


def gone(raw: socket.socket) -> bool:
    try:
        return raw.recv(4096) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def test_500_half_open_connections_neither_stop_the_server_nor_stay(
    fleet: KeyRing, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(sockets, "HANDSHAKE_S", 1.0)
    caplog.set_level(logging.WARNING)

    async def scenario() -> None:
        async with serving(fleet, echo=True) as server:
            raw = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(500)]
            try:
                async with connecting(server.port, fleet) as client:
                    await client.is_(ChannelState.UP)
                    client.channel.send(HELLO)
                    await until(lambda: client.got == [HELLO], what="the answer")
                await until(lambda: server.counters["handshake_failed"] == 500, what="all are hung up on", limit_s=15)
            finally:
                for each in raw:
                    each.close()
        assert caplog.records == [], "port scans and health checks are no news"

    run(scenario())


def test_a_port_in_use_is_one_line_that_names_the_setting(fleet: KeyRing):
    async def scenario() -> None:
        async with serving(fleet) as server:
            with pytest.raises(ConfigError) as raised:
                async with serving(fleet, port=server.port):
                    pass
            assert str(raised.value) == f"port {server.port} on 127.0.0.1 is in use: set side_channel.port"

    run(scenario())


@pytest.mark.parametrize(
    ("host", "line"),
    [("192.0.2.1", "192.0.2.1 is not an address of this machine"), ("no-such-host.invalid", "cannot resolve")],
)
def test_an_address_that_cannot_be_bound_is_one_line(host: str, line: str):
    async def scenario() -> None:
        with pytest.raises(ConfigError, match=line):
            await SideChannelServer(host=host, port=0, keys=None, on_message=lambda *_: None).start()

    run(scenario())


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str):
    check_exposure(host, None, insecure=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "*", "::", "10.0.0.1", "p-0.prefill", ""])
def test_any_other_address_needs_keys_or_insistence(host: str, fleet: KeyRing):
    with pytest.raises(ConfigError, match=r"side_channel\.keys_dir .*side_channel\.insecure"):
        check_exposure(host, None, insecure=False)
    check_exposure(host, None, insecure=True)
    check_exposure(host, fleet, insecure=False)


@pytest.mark.parametrize("identity", [b"", b"\0x", b"x" * 256])
def test_an_identity_that_zeromq_cannot_take_is_refused_at_once(identity: bytes):
    with pytest.raises(ValueError, match="1 to 255 bytes"):
        SideChannelClient(
            host="h", port=1, keys=None, identity=identity, on_message=lambda _: None, on_state=lambda *_: None
        )


def test_an_idle_channel_costs_no_cpu(fleet: KeyRing):
    async def scenario() -> None:
        async with serving(fleet) as server, connecting(server.port, fleet) as client:
            await client.is_(ChannelState.UP)
            began = time.process_time()
            await asyncio.sleep(1.0)  # the thing under test is that nothing happens in it
            assert time.process_time() - began < 0.02

    run(scenario())


def test_a_round_trip_takes_well_under_a_millisecond(fleet: KeyRing):
    async def scenario() -> None:
        answered = asyncio.Event()
        async with (
            serving(fleet, echo=True) as server,
            connecting(server.port, fleet, on_message=lambda _: answered.set()) as client,
        ):
            await client.is_(ChannelState.UP)
            took_s = []
            for _ in range(300):
                answered.clear()
                began = time.perf_counter()
                client.channel.send(HELLO)
                await answered.wait()
                took_s.append(time.perf_counter() - began)
            median_s = sorted(took_s)[150]
            print(f"median {median_s * 1e6:.0f} µs, p99 {sorted(took_s)[297] * 1e6:.0f} µs")
            assert median_s < 2e-3, "the bound for a busy machine"

    run(scenario())
