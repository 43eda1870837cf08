"""The sending half of a worker rank: paged cache → staging slot → the peer's slot.

Two classes, two threads, joined by deques of immutable values:

    Stager                 engine's thread      gathers and encodes what was computed into free staging slots, keeps
                                                the accounts of each transfer, says when nothing needs its blocks
    Poster (kv/poster.py)  data-plane thread    checksum, write, notification; the peer's answers; deadlines

**Credit.** Staging slot *i* of a link and slot *i* of the peer's region are one unit: taken when a chunk is staged,
given back with ``ACK``, ``DISCARD`` or the second ``NACK``, or when the write itself failed. A chunk past its deadline
costs its transfer, but its slot stays taken (*quarantined*) until one of these happens or the peer is replaced: the
write may still be reading it.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from disagg_plugin.kv.codec import SectionCodec
from disagg_plugin.kv.commands import Computed, DropSend, OpenSend, ReleaseWhenStaged, SendTiming
from disagg_plugin.kv.encoder import Encoders, Source
from disagg_plugin.kv.geometry import DTYPE_BYTES, HeadRange
from disagg_plugin.kv.ring import Region, SlotArena, SlotPool
from disagg_plugin.kv.wire import ChunkHeader, Kind, Notification, write_header

logger = logging.getLogger(__name__)

REMEMBERED_TRANSFERS = 4096  # ended ones, so that a late Computed does not begin them anew


@dataclass(frozen=True, slots=True, eq=False)
class SendLink:
    """The way to one rank of one epoch of a peer. Identity is equality: a new epoch is a new link."""

    peer: str
    epoch: int
    agent: str
    region: Region  # of the staging arena
    remote_address: int  # first byte of our region in the peer's ring
    remote_slot_bytes: int
    chunk_limit_bytes: int  # the smaller of the two sides' slots
    slots: SlotPool  # indices within the region; engine's thread only
    heads: HeadRange  # that go this way


@dataclass(frozen=True, slots=True)
class StagedChunk:
    """Engine → data plane: a finished chunk but for its checksum."""

    link: SendLink
    slot: int
    transfer_id: bytes
    nonce: int
    sequence: int
    nbytes: int

    def notification(self, attempt: int) -> Notification:
        return Notification(Kind.CHUNK, self.slot, self.sequence, attempt, self.nonce, self.nbytes)


@dataclass(frozen=True, slots=True)
class ChunkDone:
    """Data plane → engine: the slot is free. ``failure`` is ``None`` if the chunk was acknowledged."""

    link: SendLink
    slot: int
    transfer_id: bytes
    failure: str | None
    at_s: float
    wire_s: float = 0.0  # in which the wire worked on this chunk and not on one before it


@dataclass(frozen=True, slots=True)
class SendBroken:
    """Data plane → engine: the transfer is lost, the slot is not free yet."""

    transfer_id: bytes
    reason: str


@dataclass(slots=True)
class Outflow:
    """What of one transfer goes over one link: to a rank of the peer, its heads."""

    link: SendLink
    next_token: int  # everything before it is staged
    sequence: int = 0
    in_flight: int = 0


@dataclass(slots=True)
class SendState:
    """Accounts of one transfer, in the engine's thread."""

    transfer_id: bytes
    ticket: OpenSend | None = None
    outflows: tuple[Outflow, ...] = ()
    computed_tokens: int = 0
    block_ids: tuple[int, ...] = ()
    wire_bytes: int = 0
    wire_s: float = 0.0
    first_chunk_s: float = 0.0
    last_computed_s: float | None = None
    acknowledged_s: float = 0.0
    release_requests: list[str] = field(default_factory=list)
    staged: bool = False

    @property
    def available(self) -> int:
        """Exclusive end of what could be staged now."""
        return 0 if self.ticket is None else min(self.computed_tokens, self.ticket.end_token)

    @property
    def in_flight(self) -> int:
        return sum([outflow.in_flight for outflow in self.outflows])

    def staged_to(self, end: int) -> bool:
        """Whether everything before ``end`` is staged, on all links."""
        return all(outflow.next_token >= end for outflow in self.outflows)


@dataclass(slots=True)
class SendOutcomes:
    """What the next report says; emptied by whoever reads it."""

    staged: list[bytes] = field(default_factory=list)
    sent: list[bytes] = field(default_factory=list)
    failed: list[tuple[bytes, str]] = field(default_factory=list)
    timings: list[SendTiming] = field(default_factory=list)
    released: list[str] = field(default_factory=list)


class Stager:
    """Engine's thread: decides what goes into which slot. No call waits; a full link leaves the rest for later."""

    def __init__(
        self,
        source: Source,
        *,
        encoders: Encoders,
        arena: SlotArena,
        post: Callable[[StagedChunk], None],
        clock: Callable[[], float],
        counters: dict[str, float],
    ) -> None:
        self._source = source
        self._encoders = encoders
        self._arena = arena
        self._post = post
        self._clock = clock
        self._counters = counters
        self._links: dict[str, tuple[SendLink, ...]] = {}  # by peer: one for each of its ranks that wants our heads
        self._sends: dict[bytes, SendState] = {}
        self._ended: dict[bytes, None] = {}  # in order of their end
        self.outcomes = SendOutcomes()

    @property
    def open_sends(self) -> int:
        return sum(state.ticket is not None for state in self._sends.values())

    @property
    def slots_in_use(self) -> int:
        return sum(link.slots.in_use for links in self._links.values() for link in links)

    @property
    def busy(self) -> bool:
        """Something to stage, or an acknowledgement outstanding."""
        return any(state.in_flight or not state.staged_to(state.available) for state in self._sends.values())

    # what the scheduler says

    def connect(self, peer: str, links: tuple[SendLink, ...]) -> None:
        """Use these links for the peer from now on; transfers over their predecessors are lost."""
        self.disconnect(peer, "peer_restarted")
        self._links[peer] = links

    def disconnect(self, peer: str, reason: str) -> None:
        """Fail what goes to this peer."""
        links = self._links.pop(peer, ())
        for state in list(self._sends.values()):
            if any(outflow.link in links for outflow in state.outflows):
                self.fail(state.transfer_id, reason)

    def open(self, ticket: OpenSend) -> None:
        if ticket.transfer_id in self._ended:
            self._counters["late_commands"] += 1
            return
        state = self._sends.setdefault(ticket.transfer_id, SendState(ticket.transfer_id))
        if state.ticket is not None:
            self._counters["late_commands"] += 1
            return
        state.ticket = ticket
        links = self._links.get(ticket.peer)
        if links is None:
            self.fail(ticket.transfer_id, "peer_lost")
            return
        state.outflows = tuple([Outflow(link, ticket.first_token) for link in links])
        self._settle(state)

    def computed(self, command: Computed) -> None:
        """Remember where the tokens stand; a preempted prompt starts lower again, what was staged stays staged."""
        if command.transfer_id in self._ended:
            return
        state = self._sends.setdefault(command.transfer_id, SendState(command.transfer_id))
        state.computed_tokens = command.computed_tokens
        state.block_ids = command.block_ids

    def release(self, command: ReleaseWhenStaged) -> None:
        state = self._sends.get(command.transfer_id)
        if state is None or state.staged:
            self.outcomes.released.append(command.request_id)
        elif command.request_id not in state.release_requests:
            state.release_requests.append(command.request_id)
            self._settle(state)

    def drop(self, command: DropSend) -> None:
        state = self._sends.get(command.transfer_id)
        if state is not None:
            self._end(state)
        else:
            self._remember(command.transfer_id)

    # what the data plane says

    def chunk_done(self, event: ChunkDone) -> None:
        event.link.slots.give(event.slot)
        state = self._sends.get(event.transfer_id)
        if state is None:
            return
        if event.failure is not None:
            self.fail(event.transfer_id, event.failure)
            return
        for outflow in state.outflows:
            if outflow.link is event.link:
                outflow.in_flight -= 1
        state.acknowledged_s = event.at_s
        state.wire_s += event.wire_s
        self._settle(state)

    def fail(self, transfer_id: bytes, reason: str) -> None:
        """The transfer is lost; reported once, its blocks are free at once. Chunks under way keep their slots."""
        state = self._sends.get(transfer_id)
        if state is not None:
            self._counters["send_failures"] += 1
            self.outcomes.failed.append((transfer_id, reason))
            self._end(state)

    # what the engine's step does

    def stage(self) -> None:
        """Fill free slots, oldest transfer first."""
        now = self._clock()
        for state in list(self._sends.values()):
            if state.ticket is None:
                continue
            if state.last_computed_s is None and state.computed_tokens >= state.ticket.end_token:
                state.last_computed_s = now
            if not state.staged_to(state.available):
                self._stage_within_boundary(state, state.ticket)

    def _stage_within_boundary(self, state: SendState, ticket: OpenSend) -> None:
        try:
            for outflow in state.outflows:
                self._stage_outflow(state, ticket, outflow)
        except Exception:  # the boundary of one transfer: an exception here would end the engine
            logger.exception("transfer %s cannot be staged", state.transfer_id.hex())
            self.fail(state.transfer_id, "gather_failed")
        else:
            self._settle(state)

    def _stage_outflow(self, state: SendState, ticket: OpenSend, outflow: Outflow) -> None:
        link = outflow.link
        while outflow.next_token < state.available:
            slot = link.slots.take()
            if slot is None:
                self._counters["credit_waits"] += 1
                return
            try:
                chunk = self._stage_chunk(state, ticket, outflow, slot)
            except BaseException:  # not swallowed: a slot that was taken is given back
                link.slots.give(slot)
                raise
            outflow.sequence += 1
            outflow.in_flight += 1
            state.wire_bytes += chunk.nbytes
            self._post(chunk)

    def _stage_chunk(self, state: SendState, ticket: OpenSend, outflow: Outflow, slot: int) -> StagedChunk:
        link = outflow.link
        memory = self._arena.tensor(link.region.slot(slot))[: link.chunk_limit_bytes]
        start = outflow.next_token
        encoder = self._encoders.of(link.heads)
        end, codecs = encoder.encode(state.block_ids, start, state.available, self._wanted(ticket), memory)
        geometry = self._source.geometry
        header = ChunkHeader(
            transfer_id=state.transfer_id,
            nonce=ticket.nonce,
            sequence=outflow.sequence,
            token_start=start,
            token_end=end,
            layers=geometry.layers,
            sides=geometry.sides,
            heads=link.heads,
            head_dim=geometry.head_dim,
            dtype=geometry.dtype,
            codecs=codecs,
        )
        nbytes = write_header(header, memory.numpy())
        state.first_chunk_s = state.first_chunk_s or self._clock()
        outflow.next_token = end
        self._counters["chunks_sent"] += 1
        self._counters["wire_bytes_sent"] += nbytes
        self._counters["raw_bytes_sent"] += geometry.raw_token_bytes(link.heads.count) * (end - start)
        return StagedChunk(link, slot, state.transfer_id, ticket.nonce, outflow.sequence, nbytes)

    def _wanted(self, ticket: OpenSend) -> SectionCodec:
        """``auto`` is resolved by the scheduler, which knows the link; here it means RAW, as for quantized caches."""
        if ticket.codec == "auto" or DTYPE_BYTES[self._source.geometry.dtype] == 1:
            return SectionCodec.RAW
        return SectionCodec[ticket.codec.upper()]

    # accounts

    def _settle(self, state: SendState) -> None:
        """Draw the consequences of whatever just changed."""
        ticket = state.ticket
        if ticket is None:
            return
        if not state.staged and state.staged_to(ticket.end_token):
            state.staged = True
            self.outcomes.staged.append(state.transfer_id)
            self._release_blocks(state)
        if state.staged and state.in_flight == 0:
            self.outcomes.sent.append(state.transfer_id)
            self.outcomes.timings.append(_timing(state))
            self._end(state)
        elif state.release_requests and state.staged_to(state.available):
            self.fail(state.transfer_id, "incomplete")  # its request ended: nothing more will be computed

    def _release_blocks(self, state: SendState) -> None:
        self.outcomes.released += state.release_requests
        state.release_requests.clear()

    def _end(self, state: SendState) -> None:
        self._release_blocks(state)
        del self._sends[state.transfer_id]
        self._remember(state.transfer_id)

    def _remember(self, transfer_id: bytes) -> None:
        self._ended[transfer_id] = None
        if len(self._ended) > REMEMBERED_TRANSFERS:
            del self._ended[next(iter(self._ended))]


def _timing(state: SendState) -> SendTiming:
    return SendTiming(
        transfer_id=state.transfer_id,
        first_chunk_s=state.first_chunk_s,
        last_computed_s=state.last_computed_s or state.first_chunk_s,
        acknowledged_s=state.acknowledged_s,
        chunks=sum([outflow.sequence for outflow in state.outflows]),
        wire_bytes=state.wire_bytes,
        wire_s=state.wire_s,
    )
