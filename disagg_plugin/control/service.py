"""Everything of the plugin that does I/O in a scheduler process, put together: thread, sockets, both roles' halves."""

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import zmq

from disagg_plugin.config import DisaggSettings
from disagg_plugin.control.channel import ChannelState, SideChannelClient, SideChannelServer, check_exposure
from disagg_plugin.control.compatibility import Party
from disagg_plugin.control.io_thread import IoThread
from disagg_plugin.control.keys import KeyRing
from disagg_plugin.control.leaving import LeavingWord
from disagg_plugin.control.messages import (
    HELD,
    PRIORITY,
    PROTOCOL_VERSION,
    AnyMessage,
    EngineKind,
    Hello,
    ModelIdentity,
    Snapshot,
    SnapshotRequest,
    Welcome,
)
from disagg_plugin.control.prefill_service import PrefillService
from disagg_plugin.control.prefill_workers import PrefillWorkers
from disagg_plugin.kv.commands import RankEndpoint
from disagg_plugin.kv.geometry import KVGeometry

logger = logging.getLogger(__name__)

FEATURES: tuple[str, ...] = (HELD,)
WILDCARDS = frozenset({"0.0.0.0", "::", "*"})


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What this engine tells its peers about itself.

    Attributes:
        prefix_capacity_tokens: KV tokens that its prefix cache can hold; 0: it keeps none.
        dp_rank: Data-parallel rank; each has its own scheduler process and side-channel port.
        http_dp_rank: By what number the engine's HTTP API knows this rank; None: there is no choice.
        max_prompt_tokens: Longest prompt that still leaves room for one output token.
        by_priority: It schedules requests by priority.
        kind, bootstrap_port: See ``Welcome``.
    """

    model: ModelIdentity
    geometry: KVGeometry
    endpoints: tuple[RankEndpoint, ...]
    max_prompt_tokens: int
    dp_rank: int = 0
    http_dp_rank: int | None = None
    prefix_capacity_tokens: int = 0
    by_priority: bool = False
    kind: EngineKind = "vllm"
    bootstrap_port: int = 0


class ControlService:
    """The side channel and the offload calls of one scheduler process."""

    def __init__(
        self,
        settings: DisaggSettings,
        facts: EngineFacts,
        *,
        snapshot: Callable[[], dict[str, object]],
        word: LeavingWord | None = None,
    ) -> None:
        """
        Args:
            word: Where the server's other processes say that this engine is to leave.
        """
        channel = settings.side_channel
        self._settings = settings
        self._snapshot = snapshot
        self._word = word
        self._word_stood = False
        self._io = IoThread()
        self._keys = KeyRing.load(Path(channel.keys_dir)) if channel.keys_dir else None
        check_exposure(channel.host, self._keys, channel.insecure)
        self._context: zmq.Context[Any] | None = None
        self.port = channel.port + facts.dp_rank if channel.port else 0
        self.engine = f"{socket.gethostname()}:{self.port}"
        self.epoch = time.time_ns()
        party = Party(PROTOCOL_VERSION, facts.model, facts.geometry, len(facts.endpoints))
        self._identity: object = msgspec.to_builtins(party)
        self._server: SideChannelServer | None = None
        self.prefill: PrefillService | None = None
        self.decode: PrefillWorkers | None = None
        if settings.role in ("prefill", "both"):
            self.prefill = self._prefill_service(facts)
        if settings.role in ("decode", "both"):
            self.decode = self._prefill_workers(facts)

    @property
    def advertised_host(self) -> str:
        """Where a router's decode engine finds us."""
        host = self._settings.side_channel.host
        return self._settings.router.advertise_host or (socket.gethostname() if host in WILDCARDS else host)

    def start(self) -> None:
        """Bind, connect, and return once the side channel listens.

        Raises:
            ConfigError: The port is in use, or a key is unusable.
        """
        self._io.start(self._open)

    def close(self) -> None:
        """End the thread and every socket; idempotent."""
        self._io.close(self._close)

    async def _open(self) -> None:
        self._context = zmq.Context(io_threads=1)  # own: LMCache and the engine have theirs
        self._server = SideChannelServer(
            host=self._settings.side_channel.host,
            port=self.port,
            keys=self._keys,
            on_message=self._on_message,
            context=self._context,
        )
        try:
            self.port = await self._server.start()
        except BaseException:  # not swallowed: the context has a thread of its own
            self._context.term()
            raise
        if self.decode is not None:
            await self.decode.start()
        self._io.spawn(self._sweep())

    async def _close(self) -> None:
        if self.prefill is not None:
            self.prefill.close()
        if self.decode is not None:
            await self.decode.close()
        if self._server is not None:
            await self._server.close()
        if self._context is not None:
            self._context.term()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self._settings.side_channel.heartbeat_s)
            if self.prefill is not None:
                self._look_at_word(self.prefill)
                self.prefill.sweep()
            if self.decode is not None:
                self.decode.sweep()

    def _look_at_word(self, prefill: PrefillService) -> None:
        stands = self._word is not None and self._word.stands
        if stands is not self._word_stood:  # a change only: SIGTERM says the same
            self._word_stood = stands
            (prefill.leave if stands else prefill.stay)()

    def _on_message(self, identity: bytes, message: AnyMessage) -> None:
        if isinstance(message, SnapshotRequest):
            self._send(identity, Snapshot(json.dumps(self.snapshot(), default=str)))
        elif self.prefill is not None:
            self.prefill.on_message(identity, message)

    def _send(self, identity: bytes, message: AnyMessage) -> bool:
        return self._server is not None and self._server.send(identity, message)

    def snapshot(self) -> dict[str, object]:
        """The debug view of the whole process."""
        return {
            "engine": self.engine,
            "epoch": self.epoch,
            "role": self._settings.role,
            "threads": sorted(thread.name for thread in threading.enumerate()),
            "identity": self._identity,
            **self._snapshot(),
            **self._links(),
        }

    def figures(self) -> dict[str, object]:
        """The part of it that metrics are made from, several times a second."""
        view: dict[str, object] = {}
        if self._server is not None:
            view["side_channel"] = dict(self._server.counters)
        if self.prefill is not None:
            view["prefill_service"] = dict(self.prefill.counters)
            view["draining"] = self.prefill.leaving
        if self.decode is not None:
            view["prefill_workers"] = self.decode.figures()
        return view

    def _links(self) -> dict[str, object]:
        view: dict[str, object] = {}
        if self._server is not None:
            view["side_channel"] = dict(self._server.counters)
        if self.prefill is not None:
            view["prefill_service"] = self.prefill.snapshot()
        if self.decode is not None:
            view["prefill_workers"] = self.decode.snapshot()
        return view

    def _prefill_service(self, facts: EngineFacts) -> PrefillService:
        return PrefillService(
            self._settings,
            Welcome(
                protocol=PROTOCOL_VERSION,
                features=(*FEATURES, PRIORITY) if facts.by_priority else FEATURES,
                engine=self.engine,
                epoch=self.epoch,
                model=facts.model,
                geometry=facts.geometry,
                endpoints=facts.endpoints,
                max_prompt_tokens=facts.max_prompt_tokens,
                prefill_queue_max=self._settings.split_policy.prefill_queue_max,
                kind=facts.kind,
                bootstrap_port=facts.bootstrap_port,
                http_dp_rank=facts.http_dp_rank,
            ),
            Party(PROTOCOL_VERSION, facts.model, facts.geometry, len(facts.endpoints)),
            send=self._send,
            post=self._io.post,
            later=self._io.later,
            key_of=lambda identity: self._server.key_of(identity) if self._server is not None else "",
            kv_capacity_tokens=facts.prefix_capacity_tokens,
        )

    def _prefill_workers(self, facts: EngineFacts) -> PrefillWorkers:
        def make_client(**details: object) -> SideChannelClient:
            return SideChannelClient(keys=self._keys, context=self._context, **details)  # type: ignore[arg-type]

        return PrefillWorkers(
            self._settings,
            Hello(
                protocol=PROTOCOL_VERSION,
                features=FEATURES,
                engine=self.engine,
                epoch=self.epoch,
                model=facts.model,
                geometry=facts.geometry,
                endpoints=facts.endpoints,
                region_first_slot=0,
                region_slots=self._settings.transfer.region_slots,
            ),
            make_client=make_client,
            post=self._io.post,
        )


async def fetch_snapshot(host: str, port: int, keys: KeyRing | None, *, timeout_s: float = 5.0) -> dict[str, object]:
    """The debug view of a running engine, over its side channel.

    Raises:
        TimeoutError: It did not answer in time.
    """
    answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def on_message(message: AnyMessage) -> None:
        if isinstance(message, Snapshot) and not answer.done():
            answer.set_result(message.json)

    def on_state(state: ChannelState, _reason: str) -> None:
        if state is ChannelState.UP:
            client.send(SnapshotRequest())

    client = SideChannelClient(
        host=host,
        port=port,
        keys=keys,
        identity=f"snapshot-{time.time_ns()}".encode(),
        on_message=on_message,
        on_state=on_state,
    )
    await client.start()
    try:
        view: dict[str, object] = json.loads(await asyncio.wait_for(answer, timeout_s))
        return view
    finally:
        await client.close()
