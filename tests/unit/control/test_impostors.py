"""Nobody but who proved it is a decode engine, and nobody but who offered a prompt has a say in it."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from disagg_plugin.config import load_settings
from disagg_plugin.control.channel import ChannelState, SideChannelClient, SideChannelServer
from disagg_plugin.control.compatibility import Party
from disagg_plugin.control.events import PeerJoined, TicketCancelled, TicketOffered, TicketReady
from disagg_plugin.control.keys import KeyRing, generate
from disagg_plugin.control.messages import (
    PROTOCOL_VERSION,
    Accepted,
    AnyMessage,
    Cancel,
    Heartbeat,
    Hello,
    ModelIdentity,
    Offer,
    Ready,
    Refused,
    Rejected,
    Renew,
    Welcome,
)
from disagg_plugin.control.prefill_service import PrefillService
from disagg_plugin.kv.commands import RankEndpoint
from disagg_plugin.kv.geometry import KVGeometry

GEOMETRY = KVGeometry(layers=4, kv_heads=2, head_dim=64, dtype="float32")
MODEL = ModelIdentity("config", "weights", "m")
RANKS = (RankEndpoint(0, "agent", b"metadata", 4096, 1 << 20, 16),)
ID = b"0123456789abcdef"
OFFER = Offer(ID, 1, 1_000, 0, 10.0, "raw")


def hello(engine: str, epoch: int = 1) -> Hello:
    return Hello(PROTOCOL_VERSION, (), engine, epoch, MODEL, GEOMETRY, RANKS, 0, 8)


class Service:
    """The prefill role's half, with keys by identity in the test's hands."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, AnyMessage]] = []
        self.now = 100.0
        self.keys: dict[bytes, str] = {}
        self.half = PrefillService(
            load_settings({"role": "prefill"}),
            Welcome(PROTOCOL_VERSION, (), "p", 1, MODEL, GEOMETRY, RANKS, 4_000, 8),
            Party(PROTOCOL_VERSION, MODEL, GEOMETRY, 1),
            send=lambda identity, message: not self.sent.append((identity, message)),
            post=lambda call, *args: call(*args),
            later=lambda *_: None,  # type: ignore[arg-type,return-value]
            key_of=lambda identity: self.keys.get(identity, ""),
            clock=lambda: self.now,
        )

    def hears(self, identity: bytes, key: str, *messages: AnyMessage) -> None:
        self.keys[identity] = key
        for message in messages:
            self.half.on_message(identity, message)

    def answers(self, identity: bytes) -> list[type]:
        return [type(message) for to, message in self.sent if to == identity]

    def events(self, kind: type) -> list[Any]:
        return [event for event in self.half.drain() if isinstance(event, kind)]


def test_another_key_cannot_take_a_living_engines_name() -> None:
    service = Service()
    service.hears(b"true", "key-1", hello("d"))
    service.hears(b"false", "key-2", hello("d", epoch=99))
    assert service.answers(b"false") == [Rejected]
    assert len(service.events(PeerJoined)) == 1, "the ranks never hear of the impostor's endpoints"
    service.hears(b"false", "key-2", OFFER)
    assert service.answers(b"false") == [Rejected, Refused]
    service.hears(b"true", "key-1", OFFER)
    assert Accepted in service.answers(b"true")


def test_a_name_is_free_again_once_its_owner_is_silent() -> None:
    service = Service()
    service.hears(b"old", "key-1", hello("d"))
    for _ in range(10):
        service.now += 0.5
        service.half.sweep()
    service.hears(b"new", "key-2", hello("d", epoch=2))
    assert service.answers(b"new")[0] is Welcome


def test_an_engine_that_reconnects_is_known_by_its_new_identity_only() -> None:
    service = Service()
    service.hears(b"one", "key", hello("d"))
    service.hears(b"two", "key", hello("d"), OFFER)
    service.hears(b"one", "key", OFFER)
    assert service.answers(b"two")[-1] is Accepted
    assert service.answers(b"one")[-1] is Refused


@pytest.mark.parametrize(
    "message", [Ready(ID, 0, 10), Cancel(ID, "because"), Renew((ID,))], ids=lambda m: type(m).__name__
)
def test_only_who_offered_a_prompt_has_a_say_in_it(message: AnyMessage) -> None:
    service = Service()
    service.hears(b"one", "key", hello("d1"), OFFER)
    service.hears(b"two", "key", hello("d2"), message)
    assert [type(event) for event in service.half.drain()] == [PeerJoined, TicketOffered, PeerJoined]
    service.hears(b"one", "key", message)
    assert len(list(service.half.drain())) == 1


def test_a_transfer_id_is_offered_once() -> None:
    service = Service()
    service.hears(b"one", "key", hello("d1"), OFFER)
    service.hears(b"two", "key", hello("d2"), OFFER)
    assert service.answers(b"two")[-1] is Refused
    (ticket,) = service.events(TicketOffered)
    assert ticket.peer == "d1"


def test_messages_about_unknown_transfers_are_not_kept() -> None:
    service = Service()
    service.hears(b"one", "key", hello("d1"))
    for number in range(5_000):
        one = number.to_bytes(16, "big")
        service.hears(b"one", "key", Ready(one, 0, 10), Cancel(one, "x"), Renew((one,)))
    assert service.events((TicketReady, TicketCancelled)) == []  # type: ignore[arg-type]
    assert service.half.counters["unexpected_messages"] == 10_000


@dataclass
class Client:
    """One end of a real side channel."""

    up: asyncio.Event = field(default_factory=asyncio.Event)
    got: list[AnyMessage] = field(default_factory=list)
    channel: SideChannelClient | None = None

    async def start(self, port: int, keys: KeyRing, identity: bytes) -> None:
        def on_state(state: ChannelState, _reason: str) -> None:
            if state is ChannelState.UP:
                self.up.set()
            else:
                self.up.clear()

        self.channel = SideChannelClient(
            host="127.0.0.1", port=port, keys=keys, identity=identity, on_message=self.got.append, on_state=on_state
        )
        await self.channel.start()
        await asyncio.wait_for(self.up.wait(), 10)


def test_an_identity_is_bound_to_the_key_that_it_came_with(tmp_path: Path) -> None:
    """The impostor has keys that are allowed, and even knows the identity."""
    server_keys, other_keys = (generate(tmp_path / name, fleet=False, name=name) for name in ("one", "two"))
    (server_keys.directory / "allowed" / "two.pub").write_bytes((other_keys.directory / "client.pub").read_bytes())
    (other_keys.directory / "servers" / "one.pub").write_bytes((server_keys.directory / "server.pub").read_bytes())
    heard: list[tuple[bytes, AnyMessage]] = []

    async def story() -> None:
        async with AsyncExitStack() as stack:
            server = SideChannelServer(
                host="127.0.0.1", port=0, keys=server_keys, on_message=lambda *message: heard.append(message)
            )
            port = await server.start()
            stack.push_async_callback(server.close)
            true, false = Client(), Client()
            await true.start(port, server_keys, b"the engine")
            assert true.channel is not None
            stack.push_async_callback(true.channel.close)
            true.channel.send(Heartbeat(1))
            await until(lambda: bool(heard))
            assert server.key_of(b"the engine") == server_keys.client.public.decode()
            await true.channel.close()
            await false.start(port, other_keys, b"the engine")
            assert false.channel is not None
            stack.push_async_callback(false.channel.close)
            false.channel.send(Heartbeat(2))
            await until(lambda: server.counters["impostors"] > 0)

    async def until(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.005)

    asyncio.run(story())
    assert [message for _, message in heard] == [Heartbeat(1)]
