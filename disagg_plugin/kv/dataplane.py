"""One worker rank's data plane: the engine's hooks on one side, the ``disagg-data`` thread on the other.

Each step of the engine, in this order and all from its own thread::

    apply(commands)            before the forward
    after_forward(computed=)   stages what was computed, scatters what landed
    take_completions()         what the engine must be told, exactly once per request
    report()                   what the scheduler side must be told

None of them waits for the network, for a lock held during I/O, or for the other thread, and none raises because of
what a peer, a chunk or a transfer did: such a transfer fails, alone.

The thread owns the transport. It sleeps on a condition while no transfer is open, and polls every <= 1 ms while one
is, and for ``linger_s`` after. Both sides talk through two deques: commands down, events up.

Counters of :meth:`DataPlane.report` (monotonic, but for the gauges): ``chunks_*``, ``wire_bytes_*`` and ``raw_bytes_*``
(``raw`` is what the same tokens take in the cache) ``_sent`` and ``_received``; ``nacks`` (sent), ``nacks_received``,
``chunks_resent``; ``discards`` (sent), ``replays``, ``foreign`` (unknown sender or ticket), ``late`` (ticket closed),
``early`` (parked), ``bad_slots``, ``unparsable``, ``checksum_failures``; ``stale_answers``; ``credit_waits`` (a step
found no free slot), ``buffer_waits`` (a chunk found no private buffer); ``send_deadlines``, ``receive_deadlines``,
``send_failures``, ``receive_failures``, ``abandoned``, ``late_commands``; ``transport_errors``,
``reintroductions`` (of agents that could not be reached), ``internal_errors``, ``hook_errors``.
Gauges: ``open_sends``, ``open_receives``, ``slots_in_use`` (staging), ``slots_quarantined``,
``private_buffers_in_use``, ``unanswered`` (notifications waiting or parked), ``peers``, ``threads``.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from disagg_plugin.config import TransferSettings
from disagg_plugin.errors import ConfigError
from disagg_plugin.kv.codec import KVCodec, SectionCodec
from disagg_plugin.kv.commands import (
    AbandonReceive,
    AddPeer,
    Command,
    Computed,
    DropSend,
    OpenReceive,
    OpenSend,
    RankEndpoint,
    RankReport,
    ReleaseWhenStaged,
    RemovePeer,
    SuspendReceive,
)
from disagg_plugin.kv.encoder import Encoders
from disagg_plugin.kv.geometry import HeadRange, KVGeometry
from disagg_plugin.kv.guard import QuantizationGuard
from disagg_plugin.kv.intake import Intake
from disagg_plugin.kv.lanes import Lane, lanes_of
from disagg_plugin.kv.poster import Poster
from disagg_plugin.kv.pump import (
    COUNTERS,
    CloseTicket,
    Connect,
    Disconnect,
    Event,
    Link,
    LinkLost,
    Pump,
    PumpLoop,
)
from disagg_plugin.kv.receiver import Landed, ReceiveBroken, ReceiveLink, Scatter
from disagg_plugin.kv.ring import Region, RegionTable, SlotMemory, SlotPool
from disagg_plugin.kv.sender import ChunkDone, SendBroken, SendLink, Stager
from disagg_plugin.kv.transport import Transport
from disagg_plugin.kv.wire import require_one_token

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_ENGINE_COUNTERS = (
    *("chunks_sent", "wire_bytes_sent", "raw_bytes_sent", "chunks_received", "wire_bytes_received"),
    *("raw_bytes_received", "credit_waits", "send_failures", "receive_failures", "abandoned", "late_commands"),
    *("hook_errors", "guard_demotions"),
)


class KVCacheView(Protocol):
    """An engine's paged KV cache of one rank, as canonical sections; engine's thread only.

    ``block_ids`` cover the request from token 0; ``start`` and ``end`` are token positions in it.
    """

    geometry: KVGeometry
    heads: HeadRange  # that this rank holds
    block_size: int  # tokens

    def gather(self, layer: int, side: int, block_ids: Sequence[int], start: int, end: int) -> torch.Tensor:
        """``[heads, tokens, head_dim]`` in the cache's dtype; may be a view, and is read before the next call."""
        ...

    def scatter(self, layer: int, side: int, block_ids: Sequence[int], start: int, end: int, kv: torch.Tensor) -> None:
        """Write ``kv [heads, tokens, head_dim]``; its memory is reused after the call."""
        ...


@dataclass(frozen=True, slots=True)
class Completions:
    """What the engine must be told after a step.

    Attributes:
        received: Requests to report as received; each once, whole or abandoned.
        invalid_block_ids: Blocks of abandoned ones that hold no valid KV; the engine computes them.
        released: Prefill requests whose blocks nothing needs any more; each once.
    """

    received: tuple[str, ...] = ()
    invalid_block_ids: frozenset[int] = frozenset()
    released: tuple[str, ...] = ()


class DataPlane:
    """The data plane of one worker rank; every method belongs to the engine's thread."""

    def __init__(
        self,
        *,
        engine: str,
        epoch: int,
        rank: int,
        view: KVCacheView,
        transfer: TransferSettings,
        transport: Transport,
        clock: Callable[[], float] = time.monotonic,
        codec: KVCodec | None = None,
        threaded: bool = True,
    ) -> None:
        """Reserve and register the slots, and start the thread.

        Args:
            transport: Fresh, named :func:`agent_name`; it belongs to the data plane from now on.
            codec: Default: a new one, not warmed up; see ``KVCodec.warm_up``.
            threaded: ``False``: no thread, the caller calls :meth:`pump_once` (tests).

        Raises:
            ConfigError: One token does not fit a slot, or one slot not the ring.
            TransportError: The memory cannot be registered.
        """
        self._view = view
        self._transfer = transfer
        self._clock = clock
        self._step_began_s = clock()
        self._name = f"{engine} rank {rank} epoch {epoch}"
        self._memory = memory = SlotMemory.reserve(
            ring_max_bytes=transfer.ring_max_bytes,
            slot_bytes=transfer.slot_bytes,
            private_buffers=transfer.region_slots,
        )
        self._require_one_token(memory.ring.slot_bytes)
        transport.register(memory.ring.buffer)
        transport.register(memory.staging.buffer)
        self.rank = rank
        geometry = view.geometry
        dtype = getattr(torch, geometry.dtype)
        self.codec = codec or KVCodec(head_dim=geometry.head_dim, dtype=dtype, compile=transfer.compile)
        encode_bytes_per_s, decode_bytes_per_s = self.codec.measure()
        self.endpoint = RankEndpoint(
            rank=rank,
            agent_name=transport.agent_name,
            agent_metadata=transport.metadata(),
            ring_address=memory.ring.address,
            slot_bytes=memory.ring.slot_bytes,
            ring_slots=memory.ring.slots,
            encode_bytes_per_s=encode_bytes_per_s,
            decode_bytes_per_s=decode_bytes_per_s,
        )
        self._regions = RegionTable(memory.staging.slots)
        self._links: dict[tuple[str, bool], tuple[Link, ...]] = {}  # by peer, and whether it writes to us
        self._events: deque[Event] = deque()
        self._counters: dict[str, float] = dict.fromkeys(_ENGINE_COUNTERS, 0)
        self._thread_counters: dict[str, float] = dict.fromkeys(COUNTERS, 0)
        self._loop = self._assemble_thread(transport)
        self._assemble_engine_half()
        if threaded:
            self._loop.start()

    def _assemble_thread(self, transport: Transport) -> PumpLoop:
        memory, emit, counters = self._memory, self._events.append, self._thread_counters
        lost: set[str] = set()
        stall_timeout_s = self._transfer.stall_timeout_s
        poster = Poster(
            transport,
            memory.staging,
            stall_timeout_s=stall_timeout_s,
            emit=emit,
            clock=self._clock,
            counters=counters,
            lost=lost,
        )
        intake = Intake(
            transport,
            geometry=self._view.geometry,
            heads=self._view.heads,
            memory=memory,
            stall_timeout_s=stall_timeout_s,
            emit=emit,
            clock=self._clock,
            counters=counters,
            lost=lost,
        )
        self._pump = Pump(transport, poster, intake, emit=emit, counters=counters, lost=lost)
        return PumpLoop(self._pump, linger_s=self._transfer.linger_s)

    def _assemble_engine_half(self) -> None:
        view, memory = self._view, self._memory
        self._encoders = Encoders(view, self.codec, self._new_guard)
        self._stager = Stager(
            view,
            encoders=self._encoders,
            arena=memory.staging,
            post=self._loop.tell,
            clock=self._clock,
            counters=self._counters,
        )
        self._scatter = Scatter(
            view,
            codec=self.codec,
            private=memory.private,
            buffers=memory.buffers,
            close_ticket=lambda nonce: self._loop.tell(CloseTicket(nonce)),
            clock=self._clock,
            counters=self._counters,
        )

    # the engine's hooks

    def apply(self, commands: Sequence[Command]) -> None:
        """Take the scheduler side's commands, in order; at the beginning of a step."""
        self._step_began_s = self._clock()
        self._hear()
        for command in commands:
            self._within_boundary(self._apply, command)
        self._loop.open_transfers = self._stager.open_sends + self._scatter.open_receives

    def after_forward(self, *, computed: bool) -> None:
        """Stage what this step computed, then scatter what landed.

        Args:
            computed: Whether the step ran a forward: it decides how long scattering may take.
        """
        budget_s = self._scatter_budget_s(computed)
        self._hear()
        self._within_boundary(self._stager.stage)
        if demotions := self._encoders.take_demotions():
            self._counters["guard_demotions"] += len(demotions)
            logger.warning(
                "disagg: %s: quantization noise above transfer.guard_limit: %s",
                self._name,
                ", ".join(map(str, demotions)),
            )
        self._within_boundary(self._scatter.scatter, budget_s)
        self._loop.open_transfers = self._stager.open_sends + self._scatter.open_receives

    def _scatter_budget_s(self, computed: bool) -> float:
        """A share of a long step adds little to it; without it, KV would land slower the longer the steps get."""
        transfer = self._transfer
        if not computed:
            return transfer.scatter_idle_budget_ms / 1000
        return max(transfer.scatter_budget_ms / 1000, transfer.scatter_share * (self._clock() - self._step_began_s))

    def take_completions(self) -> Completions:
        """What was completed since the last call."""
        self._hear()
        received = self._scatter.outcomes
        completions = Completions(
            received=_take(received.completed),
            invalid_block_ids=frozenset(received.invalid_block_ids),
            released=_take(self._stager.outcomes.released),
        )
        received.invalid_block_ids.clear()
        return completions

    def report(self) -> RankReport:
        """What happened since the last call, and the counters."""
        self._hear()
        received, sent = self._scatter.outcomes, self._stager.outcomes
        return RankReport(
            rank=self.rank,
            received=_take(received.received),
            receive_failed=_take(received.failed),
            receive_suspended=_take(received.suspended),
            staged=_take(sent.staged),
            sent=_take(sent.sent),
            send_failed=_take(sent.failed),
            receive_timings=_take(received.timings),
            send_timings=_take(sent.timings),
            busy=self._stager.busy or self._scatter.busy or self._owed,
            counters=self.counters(),
        )

    @property
    def _owed(self) -> bool:
        """Chunks of ended transfers are under way: only a step of the engine hears of their slots and buffers."""
        return self._stager.slots_in_use > self._pump.quarantined or self._memory.buffers.in_use > 0

    def counters(self) -> dict[str, float]:
        """Counts since the start and current gauges; see the module."""
        gauges = {
            "open_sends": self._stager.open_sends,
            "open_receives": self._scatter.open_receives,
            "slots_in_use": self._stager.slots_in_use,
            "slots_quarantined": self._pump.quarantined,
            "private_buffers_in_use": self._memory.buffers.in_use,
            "unanswered": self._pump.unanswered,
            "peers": len({peer for peer, _ in self._links}),
            "threads": int(self._loop.alive),
        }
        return {**self._counters, **self._thread_counters, **gauges}

    def pump_once(self) -> bool:
        """One round of the thread's work, for a data plane without thread; True if anything happened."""
        return self._pump.once()

    def close(self) -> None:
        """End the thread and the transport. What is open is lost, and nobody is told: the peers have deadlines."""
        self._loop.stop()
        self._pump.close()

    # peers

    def _add_peer(self, command: AddPeer) -> None:
        lanes = lanes_of(command, kv_heads=self._view.geometry.kv_heads, rank=self.rank, held=self._view.heads)
        wanted = [(command.epoch, lane.endpoint.agent_name) for lane in lanes]
        known = self._links.get((command.peer, command.receives))
        if known is not None and [(link.epoch, link.agent) for link in known] == wanted:
            return
        self._drop_link(command.peer, command.receives, "peer_restarted")
        links = tuple([self._link(command, lane, alone=len(lanes) == 1) for lane in lanes])
        self._links[command.peer, command.receives] = links
        for link, lane in zip(links, lanes, strict=True):
            self._loop.tell(Connect(link, lane.endpoint.agent_metadata))
        if not command.receives:
            self._stager.connect(command.peer, tuple([link for link in links if isinstance(link, SendLink)]))

    def _link(self, command: AddPeer, lane: Lane, *, alone: bool) -> Link:
        if not command.receives:
            return self._send_link(command, lane, alone=alone)
        _require_within(lane.region, self._memory.ring.slots, "our landing ring")
        return ReceiveLink(command.peer, command.epoch, lane.endpoint.agent_name, lane.region, lane.heads)

    def _send_link(self, command: AddPeer, lane: Lane, *, alone: bool) -> SendLink:
        endpoint = lane.endpoint
        _require_within(lane.region, endpoint.ring_slots, "the peer's ring")
        staging_of = command.peer if alone else f"{command.peer} rank {endpoint.rank}"
        limit = min(endpoint.slot_bytes, self._memory.staging.slot_bytes)
        self._require_one_token(limit)
        return SendLink(
            peer=command.peer,
            epoch=command.epoch,
            agent=endpoint.agent_name,
            region=self._regions.region_for(staging_of, lane.region.slots),
            remote_address=endpoint.ring_address + lane.region.first_slot * endpoint.slot_bytes,
            remote_slot_bytes=endpoint.slot_bytes,
            chunk_limit_bytes=limit,
            slots=SlotPool(range(lane.region.slots)),
            heads=lane.heads,
        )

    def _drop_link(self, peer: str, receives: bool, reason: str) -> None:
        links = self._links.pop((peer, receives), None)
        if links is None:
            return
        for link in links:
            self._loop.tell(Disconnect(link, reason))
        if not receives:
            self._stager.disconnect(peer, reason)

    # inside

    def _apply(self, command: Command) -> None:
        match command:
            case AddPeer():
                self._add_peer(command)
            case RemovePeer():
                self._drop_link(command.peer, False, "peer_removed")
                self._drop_link(command.peer, True, "peer_removed")
            case OpenReceive():
                if self._scatter.open(command):
                    self._loop.tell(command)
            case AbandonReceive():
                self._scatter.abandon(command)
            case SuspendReceive():
                self._scatter.suspend(command)
            case OpenSend():
                self._stager.open(command)
            case Computed():
                self._stager.computed(command)
            case ReleaseWhenStaged():
                self._stager.release(command)
            case DropSend():
                self._stager.drop(command)

    def _hear(self) -> None:
        """Draw the consequences of what the thread did meanwhile."""
        while self._events:
            self._within_boundary(self._on_event, self._events.popleft())

    def _on_event(self, event: Event) -> None:
        match event:
            case Landed():
                self._scatter.landed(event)
            case ChunkDone():
                self._stager.chunk_done(event)
            case SendBroken():
                self._stager.fail(event.transfer_id, event.reason)
            case ReceiveBroken():
                self._scatter.broken(event.nonce, event.reason)
            case LinkLost():
                self._forget(event.link)

    def _forget(self, link: Link) -> None:
        receives = isinstance(link, ReceiveLink)
        if link in self._links.get((link.peer, receives), ()):  # one rank of a peer is no use without the others
            self._drop_link(link.peer, receives, "peer_lost")

    def _within_boundary(self, step: Callable[[_T], None] | Callable[[], None], *args: _T) -> None:
        """The boundary of a hook: an exception that passed it would end the engine."""
        try:
            step(*args)
        except ConfigError as error:
            self._counters["hook_errors"] += 1
            logger.error("%s: %s", self._name, error)
        except Exception:  # whatever it is: one transfer may be lost, the engine not
            self._counters["hook_errors"] += 1
            logger.exception("%s: %s", self._name, args)

    def _new_guard(self, wanted: SectionCodec) -> QuantizationGuard:
        geometry, transfer = self._view.geometry, self._transfer
        return QuantizationGuard(
            layers=geometry.layers,
            sides=geometry.sides,
            wanted=wanted,
            tokens_to_measure=transfer.guard_tokens,
            limit=transfer.guard_limit,
        )

    def _require_one_token(self, slot_bytes: int) -> None:
        geometry = self._view.geometry
        require_one_token(
            slot_bytes,
            sections=geometry.layers * geometry.sides,
            heads=self._view.heads.count,
            head_dim=geometry.head_dim,
            dtype=geometry.dtype,
        )


def agent_name(engine: str, rank: int, epoch: int) -> str:
    """``<engine>-<rank>-<epoch>``: a name that no earlier life of this rank had."""
    return f"{engine}-{rank}-{epoch}"


def _require_within(region: Region, slots: int, where: str) -> None:
    if region.first_slot < 0 or region.slots < 1 or region.first_slot + region.slots > slots:
        raise ConfigError(f"slots [{region.first_slot}, +{region.slots}) are outside {where} of {slots} slots")


def _take(values: list[_T]) -> tuple[_T, ...]:
    taken = tuple(values)
    values.clear()
    return taken
