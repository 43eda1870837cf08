"""The prefill role inside a scheduler process: recognises offered prompts, exports their KV, holds their blocks.

No I/O, no engine types. Call order, all in the scheduler's thread:

    new_request()   a request arrived over HTTP; with a transfer id that was offered, it is ours
    hold()          ... or for a router, which does not say for whom: held under a lease when it ends
    scheduled()     each step in which the engine computes some of its tokens
    preempted()     the engine took its blocks away; it will start over
    finished()      it ended; the answer says whether its blocks must stay
    step()          each step: commands for the worker ranks
    reports()       each step: what the ranks said
"""

import math
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from disagg_plugin.config import DisaggSettings
from disagg_plugin.control.events import (
    AdapterChecked,
    Held,
    Leaving,
    PeerJoined,
    PeerLeft,
    PrefillEvent,
    TicketCancelled,
    TicketOffered,
    TicketReady,
    TicketRenewed,
)
from disagg_plugin.control.offload_call import prompt_digest, room_of
from disagg_plugin.control.prefill_ticket import PrefillTicket
from disagg_plugin.kv.commands import (
    AddPeer,
    Command,
    Computed,
    DropSend,
    OpenSend,
    RankReport,
    ReleaseWhenStaged,
    RemovePeer,
)
from disagg_plugin.kv.lifecycle import LOADING, OVER, Event, State, advance
from disagg_plugin.observability.journal import Journal

RECENT_TRANSFERS = 256
REMEMBERED_ROOMS = 1024


class PrefillPort(Protocol):
    """What the I/O thread offers to this role; every call returns at once."""

    def started(self, transfer_id: bytes, peer: str) -> None: ...
    def cancel(self, transfer_id: bytes, peer: str, reason: str) -> None: ...

    def all_sent(self, transfer_id: bytes, peer: str, *, wire_bytes: int, wire_s: float) -> None:
        """All of it is at the peer; how long the wire was busy with it is what the peer plans with."""
        ...

    def arrived(self, transfer_id: bytes) -> None: ...

    def check_adapter(self, transfer_id: bytes, folder: str, digest: str) -> None:
        """Whether the adapter in ``folder`` has this digest; answered by an event."""
        ...

    def held(self, transfer_id: bytes, held: Held) -> None:
        """KV of this prompt is kept for whoever offers to take it, until ``hold_ended``."""
        ...

    def hold_ended(self, transfer_id: bytes) -> None: ...
    def drain(self) -> Iterable[PrefillEvent]: ...


class PrefillSide:
    """Tickets and exports of one prefill engine's scheduler process."""

    def __init__(
        self,
        settings: DisaggSettings,
        port: PrefillPort,
        *,
        ranks: int,
        kv_capacity_tokens: int,
        clock: Callable[[], float] = time.monotonic,
        journal: Journal | None = None,
    ) -> None:
        self._settings = settings
        self._journal = journal or Journal()
        self._port = port
        self._ranks = ranks
        self._capacity_tokens = kv_capacity_tokens
        self._clock = clock
        self._tickets: dict[bytes, PrefillTicket] = {}
        self._by_request: dict[str, PrefillTicket] = {}
        self._commands: list[Command] = []
        self._peers: dict[str, AddPeer] = {}
        self._ranks_busy = False
        self.totals: Counter[str] = Counter()
        self.drops: Counter[str] = Counter()
        self.recent: deque[dict[str, object]] = deque(maxlen=RECENT_TRANSFERS)
        self.rank_counters: dict[int, dict[str, float]] = {}
        self._withdrawn: dict[int, None] = {}  # rooms, in order

    # -- the engine's scheduler tells ------------------------------------------------------------------------------

    def offered_in_room(self, room: int) -> bytes | None:
        """The transfer whose prompt arrives under this number, where HTTP cannot carry a whole transfer id."""
        self._drain()
        waiting = (t for t in self._tickets.values() if not t.request_id and t.state not in OVER)
        return next((t.offer.transfer_id for t in waiting if room_of(t.offer.transfer_id) == room), None)

    def withdrawn_in_room(self, room: int) -> bool:
        """Whether the offer under this number ended before its prompt came: it will not come again."""
        return room in self._withdrawn

    def new_request(
        self,
        request_id: str,
        transfer_id: bytes,
        prompt_tokens: int,
        *,
        prompt: Sequence[int] = (),
        adapter: str = "",
    ) -> bool:
        """Bind an HTTP request to its ticket; False if no such prompt was offered (it is then an ordinary one).

        Args:
            prompt: Its token ids, compared with the offer's digest where that has one.
            adapter: Folder of the LoRA adapter that computes it, likewise.
        """
        self._drain()
        self._port.arrived(transfer_id)
        ticket = self._tickets.get(transfer_id)
        if ticket is None or ticket.request_id or ticket.state in OVER:
            self.totals["unknown_transfer_ids"] += 1
            return False
        digest = ticket.offer.prompt_digest
        if ticket.offer.prompt_tokens != prompt_tokens or (digest and digest != prompt_digest(prompt)):
            self._drop(ticket, Event.FAIL, "prompt_differs", tell=True)
            return False
        if bool(adapter) != bool(ticket.offer.adapter):
            self._drop(ticket, Event.FAIL, "adapter_differs", tell=True)
            return False
        if adapter:
            ticket.verified = False
            self._port.check_adapter(transfer_id, adapter, ticket.offer.adapter)
        ticket.request_id = request_id
        self._journal.prefills_for_another(request_id)
        self._by_request[request_id] = ticket
        return True

    def hold(self, request_id: str, held: Held) -> None:
        """Prefill a prompt for a router: nobody has offered it, a decode engine will ask for its KV later."""
        transfer_id = secrets.token_bytes(16)
        offer = TicketOffered(transfer_id, 0, "", len(held.prompt), "raw", math.inf, held=True)
        ticket = PrefillTicket(offer, self._clock(), request_id=request_id, routed=held)
        self._tickets[transfer_id] = self._by_request[request_id] = ticket
        self._journal.prefills_for_another(request_id)
        self.totals["held"] += 1

    def held_as(self, request_id: str) -> bytes | None:
        """Under which transfer id the KV of an ended request is held for a router's decode engine."""
        ticket = self._by_request.get(request_id)
        return ticket.offer.transfer_id if ticket is not None and ticket.state is State.HELD else None

    def is_ours(self, request_id: str) -> bool:
        """Whether this request's KV goes to a decode engine."""
        return request_id in self._by_request

    def scheduled(self, request_id: str, computed_tokens: int, block_ids: Sequence[int]) -> None:
        """After the step now being built, ``[0, computed_tokens)`` of the request stands in ``block_ids``."""
        ticket = self._by_request.get(request_id)
        if ticket is None or ticket.state in OVER:
            return
        ticket.started_s = ticket.started_s or self._clock()  # Ready may have come before
        if ticket.state is State.ACCEPTED:
            ticket.state = advance(ticket.state, Event.START)
            if ticket.offer.peer and ticket.verified:
                self._port.started(ticket.offer.transfer_id, ticket.offer.peer)
        ticket.computed_tokens = min(computed_tokens, ticket.offer.prompt_tokens)
        self._commands.append(Computed(ticket.offer.transfer_id, ticket.computed_tokens, tuple(block_ids)))

    def preempted(self, request_id: str) -> None:
        """The engine freed the request's blocks; it will be computed again from the start."""
        ticket = self._by_request.get(request_id)
        if ticket is not None and ticket.state not in OVER:
            ticket.computed_tokens = 0
            self.totals["preempted"] += 1
            self._commands.append(Computed(ticket.offer.transfer_id, 0, ()))

    def finished(self, request_id: str, *, completed: bool) -> bool:
        """The request ended. Returns True if the engine must keep its blocks until the ranks release them."""
        ticket = self._by_request.get(request_id)
        if ticket is None:
            return False
        ticket.request_ended_s = self._clock()
        ticket.hold_until_s = ticket.request_ended_s + self._settings.transfer.hold_s
        if ticket.state in OVER or self._is_staged(ticket):
            self._forget_if_over(ticket)
            return False
        if not completed:
            self._drop(ticket, Event.ABORT, "prefill_aborted", tell=True)
            self._forget_if_over(ticket)
            return False
        if (
            self._held_tokens() + ticket.computed_tokens
            > self._settings.transfer.hold_kv_fraction * max(self._capacity_tokens, 1)
            and self._holds_any
        ):
            self._drop(ticket, Event.FAIL, "hold_full", tell=True)
            self._forget_if_over(ticket)
            return False
        if ticket.state is State.STARTED and ticket.routed is not None:
            ticket.state = advance(ticket.state, Event.HOLD)
            self._port.held(ticket.offer.transfer_id, ticket.routed)
        ticket.holding = True
        self._commands.append(ReleaseWhenStaged(ticket.offer.transfer_id, request_id))
        return True

    def step(self) -> list[Command]:
        """Commands for the worker ranks; called once per scheduler step, at its end."""
        self._drain()
        now = self._clock()
        for ticket in list(self._tickets.values()):
            if ticket.state in OVER:
                continue
            if ticket.holding and now > ticket.hold_until_s and not self._is_staged(ticket):
                self._drop(ticket, Event.DEADLINE, "hold_expired", tell=True)
            elif now > ticket.offered_s + ticket.offer.deadline_s:
                self._drop(ticket, Event.DEADLINE, "deadline", tell=True)
        commands, self._commands = self._commands, []
        return commands

    def reports(self, reports: Iterable[RankReport]) -> None:
        """What the worker ranks said after a step."""
        busy = False
        for report in reports:
            busy = busy or report.busy
            if report.counters:
                self.rank_counters[report.rank] = report.counters
            for transfer_id in report.staged:
                if (ticket := self._tickets.get(transfer_id)) is not None:
                    ticket.staged_ranks.add(report.rank)
            for timing in report.send_timings:
                if (ticket := self._tickets.get(timing.transfer_id)) is not None:
                    ticket.chunks += timing.chunks
                    ticket.wire_bytes += timing.wire_bytes
                    ticket.wire_s = max(ticket.wire_s, timing.wire_s)
                    ticket.last_computed_s = max(ticket.last_computed_s, timing.last_computed_s)
                    ticket.acknowledged_s = max(ticket.acknowledged_s, timing.acknowledged_s)
            for transfer_id in report.sent:
                if (ticket := self._tickets.get(transfer_id)) is not None:
                    self._sent(ticket, report.rank)
            for transfer_id, reason in report.send_failed:
                if (ticket := self._tickets.get(transfer_id)) is not None:
                    self._drop(ticket, Event.FAIL, reason, tell=True)
        self._ranks_busy = busy

    def released(self, request_id: str) -> None:
        """The ranks released a held request; the engine frees its blocks."""
        ticket = self._by_request.get(request_id)
        if ticket is not None:
            ticket.holding = False
            self._forget_if_over(ticket)

    @property
    def needs_steps(self) -> bool:
        """Whether the engine must go on stepping although it has no request to compute.

        A prompt that is still to be computed asks for none: the engine steps for it anyway, unless it was paused, and
        what was paused is to come to rest.
        """
        return bool(self._commands) or self._ranks_busy or any(t.needs_steps for t in self._tickets.values())

    @property
    def holds_blocks(self) -> bool:
        """Whether ended requests keep blocks that will be free soon: not those that wait for a router's second half."""
        return any(ticket.holding and ticket.state is not State.HELD for ticket in self._tickets.values())

    # -- inside ------------------------------------------------------------------------------------------------

    @property
    def _holds_any(self) -> bool:
        return any(ticket.holding for ticket in self._tickets.values())

    def _sent(self, ticket: PrefillTicket, rank: int) -> None:
        ticket.sent_ranks.add(rank)
        if len(ticket.sent_ranks) == self._ranks and ticket.state in LOADING:
            ticket.state = advance(ticket.state, Event.COMPLETE)
            self.totals["sent"] += 1
            offer = ticket.offer
            self._port.all_sent(offer.transfer_id, offer.peer, wire_bytes=ticket.wire_bytes, wire_s=ticket.wire_s)
            self._forget_if_over(ticket)

    def _is_staged(self, ticket: PrefillTicket) -> bool:
        return len(ticket.staged_ranks) == self._ranks

    def _held_tokens(self) -> int:
        return sum(t.computed_tokens for t in self._tickets.values() if t.holding)

    def _drop(self, ticket: PrefillTicket, event: Event, reason: str, *, tell: bool) -> None:
        if ticket.state in OVER:
            return
        ticket.state = advance(ticket.state, event)
        ticket.failure = reason
        self.drops[reason] += 1
        self._commands.append(DropSend(ticket.offer.transfer_id, reason))
        if ticket.offer.held:
            self._port.hold_ended(ticket.offer.transfer_id)
        if tell:
            self._port.cancel(ticket.offer.transfer_id, ticket.offer.peer, reason)
        self._forget_if_over(ticket)

    def _forget_if_over(self, ticket: PrefillTicket) -> None:
        """A ticket stays as long as the engine may still ask about its request."""
        if ticket.state not in OVER or ticket.holding or (ticket.request_id and not ticket.request_ended_s):
            return
        if self._tickets.pop(ticket.offer.transfer_id, None) is None:
            return
        self._by_request.pop(ticket.request_id, None)
        if not ticket.request_id:
            self._withdrawn[room_of(ticket.offer.transfer_id)] = None
            if len(self._withdrawn) > REMEMBERED_ROOMS:
                del self._withdrawn[next(iter(self._withdrawn))]
        row = ticket.row()
        self.recent.append(row)
        self._journal.transfer_over("prefill", row)

    def _drain(self) -> None:
        for event in self._port.drain():
            match event:
                case PeerJoined(add):
                    self._peers[add.peer] = add
                    self._commands.append(add)
                case PeerLeft(peer, reason):
                    if self._peers.pop(peer, None) is not None:
                        self._commands.append(RemovePeer(peer))
                    for ticket in list(self._tickets.values()):
                        if ticket.offer.peer == peer:
                            self._drop(ticket, Event.PEER_LOST, reason, tell=False)
                case TicketOffered(held=True):
                    self._claimed(event)
                case AdapterChecked(transfer_id, same):
                    if (checked := self._tickets.get(transfer_id)) is not None:
                        self._adapter_checked(checked, same)
                case TicketRenewed(transfer_id):
                    if (renewed := self._tickets.get(transfer_id)) is not None:
                        renewed.hold_until_s = self._clock() + self._settings.transfer.hold_s
                case Leaving():
                    self._hand_back()
                case TicketOffered():
                    self._withdrawn.pop(room_of(event.transfer_id), None)
                    self._tickets[event.transfer_id] = PrefillTicket(event, self._clock(), verified=not event.adapter)
                    self.totals["offered"] += 1
                case TicketReady():
                    self._ready(event)
                case TicketCancelled(transfer_id, reason):
                    if (ticket_or_none := self._tickets.get(transfer_id)) is not None:
                        self._drop(ticket_or_none, Event.ABORT, reason, tell=False)

    def _hand_back(self) -> None:
        """What waits for its turn here is sooner done elsewhere; what has begun, or is held for a router, is not."""
        for ticket in list(self._tickets.values()):
            if ticket.offer.peer and not ticket.offer.held and not ticket.started_s:
                self._drop(ticket, Event.ABORT, "draining", tell=True)

    def _claimed(self, event: TicketOffered) -> None:
        """A decode engine has the request whose KV is held. It may come too late: the lease may have just ended."""
        ticket = self._tickets.get(event.transfer_id)
        if ticket is None or ticket.state is not State.HELD or ticket.offer.peer:
            self._port.cancel(event.transfer_id, event.peer, "hold_expired")
            return
        now = self._clock()
        ticket.offer, ticket.offered_s, ticket.hold_until_s = event, now, now + self._settings.transfer.hold_s
        ticket.state = advance(ticket.state, Event.ACCEPT)
        self.totals["claimed"] += 1

    def _ready(self, event: TicketReady) -> None:
        ticket = self._tickets.get(event.transfer_id)
        if ticket is None or ticket.state in OVER or ticket.opened or not ticket.offer.peer:
            return
        if not 0 <= event.first_token < event.end_token <= ticket.offer.prompt_tokens:
            self._drop(ticket, Event.FAIL, "bad_range", tell=True)
            return
        ticket.state = advance(ticket.state, Event.READY)
        ticket.hold_until_s = max(ticket.hold_until_s, self._clock() + self._settings.transfer.hold_s)
        ticket.opened = True
        ticket.ready = event
        self._open(ticket, event)

    def _adapter_checked(self, ticket: PrefillTicket, same: bool) -> None:
        if not same:
            self._drop(ticket, Event.FAIL, "adapter_differs", tell=True)
            return
        ticket.verified = True
        if ticket.started_s:
            self._port.started(ticket.offer.transfer_id, ticket.offer.peer)
        if ticket.ready is not None and ticket.state in LOADING:
            self._open(ticket, ticket.ready)

    def _open(self, ticket: PrefillTicket, event: TicketReady) -> None:
        if not ticket.verified:
            return
        self._commands.append(
            OpenSend(
                transfer_id=event.transfer_id,
                nonce=ticket.offer.nonce,
                peer=ticket.offer.peer,
                first_token=event.first_token,
                end_token=event.end_token,
                codec=ticket.offer.codec,
            )
        )

    def snapshot(self) -> dict[str, object]:
        """The debug view; may be called from another thread (reads only, copies first)."""
        return {
            **self.figures(),
            "open": [t.row() for t in list(self._tickets.values())],
            "recent": list(self.recent),
        }

    def figures(self) -> dict[str, object]:
        """The part of it that metrics are made from, several times a second."""
        tickets = list(self._tickets.values())
        return {
            "totals": dict(self.totals),
            "drops": dict(self.drops),
            "open_transfers": len(tickets),
            "held_requests": sum(t.holding for t in tickets),
            "held_tokens": sum(t.computed_tokens for t in tickets if t.holding),
            "peers": {peer: add.epoch for peer, add in list(self._peers.items())},
            "ranks": {str(rank): counters for rank, counters in list(self.rank_counters.items())},
        }
