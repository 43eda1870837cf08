"""The data-plane thread's half of receiving: copy, verify, answer.

Every CHUNK notification is judged once, and answered once unless it is nonsense:

    used                                      copied, verified, handed to the engine's thread      ACK
    seen before (same nonce and sequence)     counted                                              ACK
    damaged, or the slot holds another chunk  asked for once more; the second time the transfer    NACK
                                              is lost
    transfer closed, or another peer's        counted                                              DISCARD
    no private buffer free                    waits                                                later
    nonce never seen, or agent not known yet  parked for half a stall time-out, then               DISCARD
    slot outside the region                   counted                                              none

No torch here: copies by numpy and checksums by xxhash leave the GIL to the engine.
"""

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from disagg_plugin.errors import CodecError, PeerLost, TransportError, WireError
from disagg_plugin.kv.commands import OpenReceive
from disagg_plugin.kv.geometry import HeadRange, KVGeometry
from disagg_plugin.kv.receiver import Landed, ReceiveBroken, ReceiveLink, TokenRanges
from disagg_plugin.kv.ring import SlotMemory
from disagg_plugin.kv.transport import Transport
from disagg_plugin.kv.wire import HEADER_BYTES, ChunkHeader, Kind, Notification, parse_chunk

logger = logging.getLogger(__name__)

REMEMBERED_NONCES = 4096
PARKED_MAX = 1024
REMEMBERED_REPEATS = 256
REPEATS_MAX = 2


@dataclass(slots=True)
class Inflow:
    """What came for one transfer over one link."""

    link: ReceiveLink
    progress_s: float  # opened, or last verified chunk
    sequences: set[int] = field(default_factory=set)
    accepted: TokenRanges = field(default_factory=TokenRanges)


@dataclass(slots=True)
class Ticket:
    """What the data-plane thread knows of one open transfer."""

    command: OpenReceive
    inflows: dict[str, Inflow]  # by agent name: one for each rank of the peer that sends to us
    broken: bool = False

    def stalled(self, since_s: float) -> bool:
        """Whether any rank that still owes tokens has brought none since."""
        first, end = self.command.first_token, self.command.end_token
        return any(i.progress_s < since_s and i.accepted.prefix_end(first) < end for i in self.inflows.values())


@dataclass(frozen=True, slots=True)
class Parked:
    """A notification that waits for its ticket or its peer to become known."""

    agent: str
    notification: Notification
    until_s: float


class Intake:
    """Judges every notification of every peer; all calls from the data-plane thread."""

    def __init__(
        self,
        transport: Transport,
        *,
        geometry: KVGeometry,
        heads: HeadRange,
        memory: SlotMemory,
        stall_timeout_s: float,
        emit: Callable[[Landed | ReceiveBroken], None],
        clock: Callable[[], float],
        counters: dict[str, float],
        lost: set[str],
    ) -> None:
        """
        Args:
            lost: Agents that cannot be reached any more are added here.
        """
        self._lost = lost
        self._transport = transport
        self._geometry = geometry
        self._heads = heads
        self._ring = memory.ring
        self._private = memory.private
        self._buffers = memory.buffers
        self._stall_timeout_s = stall_timeout_s
        self._emit = emit
        self._clock = clock
        self._counters = counters
        self._links: dict[str, ReceiveLink] = {}  # by agent name
        self._given_up: set[str] = set()  # agents without a link that can still be answered
        self._tickets: dict[int, Ticket] = {}  # by nonce
        self._closed: dict[int, None] = {}  # nonces, in order of their end
        self._parked: list[Parked] = []
        self._repeats: dict[tuple[str, int, int, int], int] = {}  # how often a peer asked about one chunk again
        self._waiting: deque[tuple[str, Notification]] = deque()  # for a private buffer
        self._unsaid: dict[str, list[bytes]] = {}  # answers that could not be sent, by agent name

    @property
    def waiting(self) -> int:
        """Notifications not answered yet."""
        return len(self._waiting) + len(self._parked)

    @property
    def open_tickets(self) -> int:
        return len(self._tickets)

    # what the engine's thread says

    def connect(self, link: ReceiveLink) -> None:
        self._links[link.agent] = link
        self._given_up.discard(link.agent)
        self._unpark()

    def disconnect(self, link: ReceiveLink, reason: str) -> None:
        """Nothing more is taken from this agent; what it still owes us is lost."""
        if self._links.pop(link.agent, None) is not None:
            self._given_up.add(link.agent)
        self._unsaid.pop(link.agent, None)
        self.break_tickets(link.agent, reason)

    def unloaded(self, agent: str) -> None:
        """The transport does not know this agent any more."""
        self._given_up.discard(agent)

    def reintroduced(self, agent: str) -> None:
        """The connection to this agent is new: say what could not be said.

        Its peer waits for these answers with its slots taken: without them the next transfers would stall as well.
        Where it was not a lost answer that showed the old connection to be dead, or the new one is dead as well, what
        the agent still owes us will not come.
        """
        unsaid = self._unsaid.pop(agent, [])
        try:
            for answer in unsaid:
                self._transport.notify(agent, answer)
        except (PeerLost, TransportError) as error:
            self._counters["transport_errors"] += 1
            logger.warning("no answer to %s over a new connection either: %s", agent, error)
        else:
            if unsaid:
                return
        self.break_tickets(agent, "peer_lost")

    def break_tickets(self, agent: str, reason: str) -> None:
        """What this agent still owes us will not come, or cannot be answered."""
        for ticket in self._tickets.values():
            if agent in ticket.inflows:
                self._break(ticket, reason)

    def open(self, command: OpenReceive) -> None:
        now = self._clock()
        inflows = {agent: Inflow(link, now) for agent, link in self._links.items() if link.peer == command.peer}
        if not inflows or command.nonce in self._tickets:
            self._emit(ReceiveBroken(command.nonce, "nonce_in_use" if inflows else "peer_lost"))
            return
        self._tickets[command.nonce] = Ticket(command, inflows)
        self._unpark()

    def close(self, nonce: int) -> None:
        """The transfer is over, one way or the other: refuse whatever still comes."""
        self._tickets.pop(nonce, None)
        self._closed[nonce] = None
        if len(self._closed) > REMEMBERED_NONCES:
            del self._closed[next(iter(self._closed))]
        self._unpark()

    # what the network says

    def take(self, agent: str, notification: Notification) -> None:
        """Judge one CHUNK notification."""
        link = self._links.get(agent)
        ticket = self._tickets.get(notification.nonce)
        if link is None or (ticket is None and notification.nonce not in self._closed):
            self._park(agent, notification)
        elif notification.slot >= link.region.slots:
            self._counters["bad_slots"] += 1
        elif ticket is None or ticket.broken:
            self._counters["late"] += 1
            self._count_repeats(agent, notification)
            self._answer(agent, notification, Kind.DISCARD)
        elif (inflow := ticket.inflows.get(agent)) is None or inflow.link is not link:
            self._counters["foreign"] += 1
            self._answer(agent, notification, Kind.DISCARD)
        elif notification.sequence in inflow.sequences:
            self._counters["replays"] += 1
            self._count_repeats(agent, notification)
            self._answer(agent, notification, Kind.ACK)
        else:
            self._copy_and_verify(inflow, ticket, notification)

    def _count_repeats(self, agent: str, notification: Notification) -> None:
        """A peer that goes on asking does not get our answers, whatever the transport says: connect anew."""
        key = (agent, notification.nonce, notification.sequence, notification.attempt)
        self._repeats[key] = self._repeats.pop(key, 0) + 1
        if self._repeats[key] > REPEATS_MAX:
            self._repeats = {known: times for known, times in self._repeats.items() if known[0] != agent}
            self._lost.add(agent)
        elif len(self._repeats) > REMEMBERED_REPEATS:
            del self._repeats[next(iter(self._repeats))]

    def pump(self) -> bool:
        """Retry what waited for a buffer, give up what was parked too long, check deadlines; True if any moved."""
        before = self.waiting
        for _ in range(len(self._waiting)):
            if self._buffers.free == 0:
                break
            self.take(*self._waiting.popleft())
        now = self._clock()
        if self._parked and any(now > parked.until_s for parked in self._parked):
            expired = [parked for parked in self._parked if now > parked.until_s]
            self._parked = [parked for parked in self._parked if now <= parked.until_s]
            for parked in expired:
                self._refuse(parked)
        self._check_deadlines(now)
        return self.waiting != before

    def _check_deadlines(self, now: float) -> None:
        held_back = {agent for agent, _ in self._waiting}  # with what else it has to send: its slots are taken
        for ticket in self._tickets.values():
            if not held_back.isdisjoint(ticket.inflows):
                for inflow in ticket.inflows.values():
                    inflow.progress_s = now  # it is us who are slow, not the peer
            elif ticket.stalled(now - self._stall_timeout_s) and not ticket.broken:
                self._counters["receive_deadlines"] += 1
                self._break(ticket, "stalled")

    def _copy_and_verify(self, inflow: Inflow, ticket: Ticket, notification: Notification) -> None:
        link = inflow.link
        if not HEADER_BYTES <= notification.nbytes <= self._ring.slot_bytes:
            self._damaged(link.agent, ticket, notification, f"{notification.nbytes} bytes cannot be a chunk")
            return
        buffer = self._buffers.take()
        if buffer is None:
            self._counters["buffer_waits"] += 1
            self._waiting.append((link.agent, notification))
            return
        copy = self._private.array(buffer)[: notification.nbytes]
        copy[:] = self._ring.array(link.region.slot(notification.slot))[: notification.nbytes]
        try:
            header = parse_chunk(copy)
            self._check_belongs(header, ticket.command, notification, link.heads or self._heads)
        except CodecError as error:
            self._buffers.give(buffer)
            self._counters["checksum_failures"] += isinstance(error, WireError)
            self._damaged(link.agent, ticket, notification, str(error))
            return
        if not inflow.accepted.add(header.token_start, header.token_end):
            self._buffers.give(buffer)
            self._counters["replays"] += 1
            self._answer(link.agent, notification, Kind.DISCARD)
            return
        inflow.sequences.add(notification.sequence)
        inflow.progress_s = self._clock()
        self._emit(Landed(notification.nonce, header, buffer, notification.nbytes, inflow.progress_s))
        self._answer(link.agent, notification, Kind.ACK)

    def _check_belongs(
        self, header: ChunkHeader, command: OpenReceive, notification: Notification, heads: HeadRange
    ) -> None:
        """What an intact chunk must say to be the announced one.

        Raises:
            CodecError: Another transfer's chunk (a late write), another range, or another model's shape.
        """
        geometry = self._geometry
        observed = (header.transfer_id, header.nonce, header.sequence)
        wanted = (command.transfer_id, command.nonce, notification.sequence)
        if observed != wanted:
            raise CodecError(f"the slot holds chunk {header.sequence} of transfer {header.transfer_id.hex()}")
        if not command.first_token <= header.token_start < header.token_end <= command.end_token:
            raise CodecError(
                f"tokens [{header.token_start}, {header.token_end}) of a transfer of "
                f"[{command.first_token}, {command.end_token})"
            )
        shape = (header.layers, header.sides, header.heads, header.head_dim)
        if shape != (geometry.layers, geometry.sides, heads, geometry.head_dim):
            raise CodecError(f"chunk of (layers, sides, heads, head_dim) {shape}, here {geometry}, {heads}")

    def _damaged(self, agent: str, ticket: Ticket, notification: Notification, why: str) -> None:
        """Ask for it once more; the second time the transfer is lost."""
        logger.warning(
            "chunk %d of %s from %s, attempt %d: %s",
            notification.sequence,
            ticket.command.request_id,
            agent,
            notification.attempt,
            why,
        )
        self._counters["nacks"] += 1
        if notification.attempt > 0:
            self._break(ticket, "bad_chunk")
        self._answer(agent, notification, Kind.NACK)

    def _break(self, ticket: Ticket, reason: str) -> None:
        if not ticket.broken:
            ticket.broken = True
            self._emit(ReceiveBroken(ticket.command.nonce, reason))

    def _answer(self, agent: str, notification: Notification, kind: Kind) -> None:
        if kind is Kind.DISCARD:
            self._counters["discards"] += 1
        answer = notification.answer(kind).pack()
        if agent in self._unsaid:  # in the same round
            self._unsaid[agent].append(answer)
            return
        try:
            self._transport.notify(agent, answer)
        except (PeerLost, TransportError) as error:
            self._counters["transport_errors"] += 1
            logger.warning("no answer to %s: %s", agent, error)
            self._unsaid[agent] = [answer]
            self._lost.add(agent)

    def _park(self, agent: str, notification: Notification) -> None:
        if len(self._parked) >= PARKED_MAX:
            self._refuse(self._parked.pop(0))
        self._counters["early"] += 1
        self._parked.append(Parked(agent, notification, self._clock() + self._stall_timeout_s / 2))

    def _unpark(self) -> None:
        """Something became known: judge again; what stays unknown keeps its place and its deadline."""
        parked, self._parked = self._parked, []
        for item in parked:
            nonce = item.notification.nonce
            if item.agent in self._links and (nonce in self._tickets or nonce in self._closed):
                self.take(item.agent, item.notification)
            else:
                self._parked.append(item)

    def _refuse(self, parked: Parked) -> None:
        self._counters["foreign"] += 1
        if parked.agent in self._links or parked.agent in self._given_up:  # or its slots would stay taken
            self._answer(parked.agent, parked.notification, Kind.DISCARD)
