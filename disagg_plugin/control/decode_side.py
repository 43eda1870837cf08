"""The decode role inside a scheduler process: decides, holds the tickets, and repairs. No I/O, no engine types.

Call order per request, all in the scheduler's thread:

    match()            each step while the request waits: "local", "wait" or "claim n tokens"
    allocated()        once, when the engine gave blocks to a claim
    step()             each step: commands for the worker ranks
    reports()          each step: what the ranks said
    load_completed()   once per claim that got blocks: the engine took the request back from us
    finished()         once per request, however it ended

A request is offered at most once: whatever fails, the next ``match`` says local.
"""

import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from disagg_plugin.config import DisaggSettings
from disagg_plugin.control.events import (
    DecodeEvent,
    PeerJoined,
    PeerLeft,
    PrefillAccepted,
    PrefillEnded,
    PrefillFailed,
    PrefillStarted,
)
from disagg_plugin.control.offload_call import transfer_id_in
from disagg_plugin.kv.commands import (
    AbandonReceive,
    AddPeer,
    Command,
    OpenReceive,
    RankReport,
    ReceiveTiming,
    RemovePeer,
)
from disagg_plugin.kv.lifecycle import LOADING, OVER, Event, IllegalTransition, State, advance
from disagg_policies import offload

RECENT_TRANSFERS = 256


@dataclass(frozen=True, slots=True)
class Route:
    """Somebody else, a router, gives the prompt to ``worker`` and told us under which number."""

    worker: str
    room: int


@dataclass(frozen=True, slots=True)
class PromptView:
    """A request as this role needs it.

    Attributes:
        local_only: Why it must not be offloaded, or None.
        route: Set where the decision was made, and the prompt is posted, elsewhere.
        http_fields: What travels with the offload call besides the prompt (LoRA name, cache salt, priority).
    """

    request_id: str
    token_ids: Sequence[int]
    local_only: str | None = None
    http_fields: tuple[tuple[str, object], ...] = ()
    route: Route | None = None


@dataclass(frozen=True, slots=True)
class PrefillLocally:
    """The engine computes the prompt itself."""

    reason: str


@dataclass(frozen=True, slots=True)
class NotYet:
    """Ask again at the next step; nothing is held."""


@dataclass(frozen=True, slots=True)
class Claim:
    """``tokens`` beyond the cached ones will be delivered; allocate blocks for them."""

    tokens: int


Answer = PrefillLocally | NotYet | Claim


@dataclass(frozen=True, slots=True)
class OfferCall:
    """An offload for the I/O thread: offer to ``workers`` in order, then ``post`` the prompt to who accepts."""

    transfer_id: bytes
    nonce: int
    workers: tuple[str, ...]
    token_ids: Sequence[int]
    cached_tokens: int
    http_fields: tuple[tuple[str, object], ...]
    post: bool = True


class DecodePort(Protocol):
    """What the I/O thread offers to this role; every call returns at once."""

    def workers(self) -> Sequence[offload.WorkerState]: ...
    def offer(self, call: OfferCall) -> None: ...
    def ready(self, transfer_id: bytes, peer: str, first_token: int, end_token: int) -> None: ...
    def cancel(self, transfer_id: bytes, peer: str, reason: str) -> None: ...
    def drain(self) -> Iterable[DecodeEvent]: ...


@dataclass(frozen=True, slots=True)
class _Arrival:
    """What the ranks measured of one transfer, all ranks together; ``time.monotonic`` seconds."""

    first_chunk_s: float
    last_chunk_s: float
    chunks: int  # of the rank with most
    wire_bytes: int
    raw_bytes: int
    codecs: tuple[str, ...]

    @classmethod
    def of(cls, timing: ReceiveTiming) -> "_Arrival":
        return cls(
            timing.first_chunk_s,
            timing.last_chunk_s,
            timing.chunks,
            timing.wire_bytes,
            timing.raw_bytes,
            timing.codecs,
        )

    def joined(self, other: "_Arrival") -> "_Arrival":
        """Two ranks: the earliest first chunk, the latest last one, bytes of both."""
        return _Arrival(
            min(self.first_chunk_s, other.first_chunk_s),
            max(self.last_chunk_s, other.last_chunk_s),
            max(self.chunks, other.chunks),
            self.wire_bytes + other.wire_bytes,
            self.raw_bytes + other.raw_bytes,
            tuple(sorted({*self.codecs, *other.codecs})),
        )


@dataclass(slots=True)
class _Transfer:
    """One offloaded request."""

    request_id: str
    transfer_id: bytes
    nonce: int
    prompt_tokens: int
    cached_tokens: int
    offered_s: float
    state: State = State.OFFERED
    peer: str = ""
    reason: str = "over_threshold"
    failure: str = ""
    eta_s: float = 0.0
    accepted_s: float = 0.0
    started_s: float = 0.0
    ready_s: float = 0.0
    landed_s: float = 0.0
    first_token: int = 0
    end_token: int = 0
    held_tokens: int = 0
    completed: bool = False  # the engine took the blocks back; True before anything was held
    request_ended: bool = False  # the engine will not ask again
    prefill_ended_s: float = 0.0
    arrival: _Arrival | None = None


class DecodeSide:
    """Decisions and tickets of one decode engine's scheduler process."""

    def __init__(
        self,
        settings: DisaggSettings,
        port: DecodePort,
        *,
        engine: str,
        kv_capacity_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._port = port
        self._engine = engine
        self._capacity_tokens = kv_capacity_tokens
        self._clock = clock
        self._by_request: dict[str, _Transfer] = {}
        self._by_transfer: dict[bytes, _Transfer] = {}
        self._local: dict[str, str] = {}
        self._commands: list[Command] = []
        self._peers: dict[str, AddPeer] = {}
        self._held_tokens = 0
        self.decisions: Counter[str] = Counter()
        self.fallbacks: Counter[str] = Counter()
        self.totals: Counter[str] = Counter()
        self.recent: deque[dict[str, object]] = deque(maxlen=RECENT_TRANSFERS)
        self.rank_counters: dict[int, dict[str, float]] = {}

    # -- the engine's scheduler asks ---------------------------------------------------------------------------

    def match(self, prompt: PromptView, cached_tokens: int, *, free_tokens: int) -> Answer:
        """What to do with a waiting request that has ``cached_tokens`` in the engine's own prefix cache.

        Idempotent: the engine asks again at each step, also after a failed allocation.

        Args:
            free_tokens: Room in the engine's KV cache; a claim that does not fit would block its waiting queue.
        """
        self._drain()
        if (reason := self._local.get(prompt.request_id)) is not None:
            return PrefillLocally(reason)
        transfer = self._by_request.get(prompt.request_id)
        if transfer is None:
            return self._decide(prompt, cached_tokens)
        if transfer.state in OVER or transfer.state in LOADING:
            return PrefillLocally(transfer.failure or "already_loaded")
        if self._clock() > self._wait_until_s(transfer):
            self._abandon(transfer, Event.DEADLINE, f"timeout_{transfer.state.value}")
            return PrefillLocally(transfer.failure)
        if transfer.state is not State.STARTED:
            return NotYet()
        return self._claim(transfer, cached_tokens, free_tokens)

    def allocated(self, request_id: str, block_ids: tuple[int, ...], external_tokens: int) -> None:
        """The engine allocated ``block_ids`` (from token 0 on) for a claim of ``external_tokens``."""
        transfer = self._by_request.get(request_id)
        if transfer is None or external_tokens == 0 or not transfer.completed:
            return
        transfer.ready_s = self._clock()
        transfer.end_token = transfer.prompt_tokens - 1
        transfer.first_token = transfer.end_token - external_tokens
        transfer.held_tokens = external_tokens
        transfer.completed = False
        self._held_tokens += external_tokens
        self._commands.append(
            OpenReceive(
                request_id=request_id,
                transfer_id=transfer.transfer_id,
                nonce=transfer.nonce,
                peer=transfer.peer,
                first_token=transfer.first_token,
                end_token=transfer.end_token,
                block_ids=block_ids,
            )
        )
        if transfer.state is not State.STARTED:
            # given up between the claim and the allocation: the engine waits for the ranks' report all the same
            self._commands.append(AbandonReceive(request_id, transfer.failure))
            return
        transfer.state = advance(transfer.state, Event.READY)
        self._port.ready(transfer.transfer_id, transfer.peer, transfer.first_token, transfer.end_token)

    def step(self) -> list[Command]:
        """Commands for the worker ranks; called once per scheduler step."""
        self._drain()
        now = self._clock()
        for transfer in list(self._by_request.values()):
            if transfer.state in LOADING and now > transfer.offered_s + self._settings.transfer.deadline_s:
                self._abandon(transfer, Event.DEADLINE, "timeout_deadline")
        commands, self._commands = self._commands, []
        return commands

    def reports(self, reports: Iterable[RankReport]) -> None:
        """What the worker ranks said after a step."""
        for report in reports:
            if report.counters:
                self.rank_counters[report.rank] = report.counters
            for request_id, reason in report.receive_failed:
                if (transfer := self._by_request.get(request_id)) is not None:
                    self._abandon(transfer, Event.FAIL, reason)
            for timing in report.receive_timings:
                if (transfer := self._by_request.get(timing.request_id)) is not None:
                    self.totals["wire_bytes"] += timing.wire_bytes
                    self.totals["raw_bytes"] += timing.raw_bytes
                    arrival = _Arrival.of(timing)
                    transfer.arrival = transfer.arrival.joined(arrival) if transfer.arrival else arrival

    def load_completed(self, request_id: str) -> None:
        """All ranks reported this request; its blocks are the engine's again."""
        transfer = self._by_request.get(request_id)
        if transfer is None or transfer.completed:
            return
        transfer.completed = True
        self._held_tokens -= transfer.held_tokens
        transfer.held_tokens = 0
        if transfer.state in LOADING:
            transfer.state = advance(transfer.state, Event.COMPLETE)
            transfer.landed_s = self._clock()
            self.totals["landed"] += 1
        if transfer.request_ended:
            self._forget(transfer)

    def finished(self, request_id: str) -> None:
        """The request ended: served, or aborted in any state."""
        self._local.pop(request_id, None)
        transfer = self._by_request.get(request_id)
        if transfer is None:
            return
        if transfer.state not in OVER:
            self._abandon(transfer, Event.ABORT, "aborted")
        if transfer.completed or transfer.held_tokens == 0:
            self._forget(transfer)
        else:
            transfer.request_ended = True  # the ranks still owe their report

    # -- inside -------------------------------------------------------------------------------------------------

    def _decide(self, prompt: PromptView, cached_tokens: int) -> Answer:
        if prompt.local_only is not None:
            return self._stay_local(prompt.request_id, prompt.local_only)
        if prompt.route is not None:
            return self._offer(prompt, cached_tokens, (prompt.route.worker,), "routed")
        policy = self._settings.split_policy
        decision = offload.threshold(
            offload.Prompt(prompt.request_id, len(prompt.token_ids), cached_tokens),
            self._port.workers(),
            prompt_length_threshold=policy.prompt_length_threshold,
            prefill_queue_max=policy.prefill_queue_max,
            decode_engine=self._engine,
        )
        if isinstance(decision, offload.Local):
            return self._stay_local(prompt.request_id, decision.reason)
        return self._offer(prompt, cached_tokens, decision.workers, decision.reason)

    def _offer(self, prompt: PromptView, cached_tokens: int, workers: tuple[str, ...], reason: str) -> Answer:
        self.decisions[reason] += 1
        route = prompt.route
        transfer = _Transfer(
            request_id=prompt.request_id,
            transfer_id=transfer_id_in(route.room) if route else secrets.token_bytes(16),
            nonce=secrets.randbits(64),
            prompt_tokens=len(prompt.token_ids),
            cached_tokens=cached_tokens,
            offered_s=self._clock(),
            reason=reason,
            completed=True,
        )
        self._by_request[transfer.request_id] = transfer
        self._by_transfer[transfer.transfer_id] = transfer
        self.totals["offered"] += 1
        self._port.offer(
            OfferCall(
                transfer_id=transfer.transfer_id,
                nonce=transfer.nonce,
                workers=workers,
                token_ids=prompt.token_ids,
                cached_tokens=cached_tokens,
                http_fields=prompt.http_fields,
                post=route is None,
            )
        )
        return NotYet()

    def _stay_local(self, request_id: str, reason: str) -> PrefillLocally:
        self.decisions[reason] += 1
        self._local[request_id] = reason
        return PrefillLocally(reason)

    def _claim(self, transfer: _Transfer, cached_tokens: int, free_tokens: int) -> Answer:
        tokens = transfer.prompt_tokens - 1 - cached_tokens
        if tokens <= 0:
            self._abandon(transfer, Event.ABORT, "cached_meanwhile")
            return PrefillLocally(transfer.failure)
        budget = self._settings.transfer.held_kv_fraction * self._capacity_tokens
        alone = self._held_tokens == 0  # one transfer is always let in, or a long prompt would never be served
        if tokens + 1 > free_tokens or (not alone and self._held_tokens + tokens > budget):
            self.totals["claim_waits"] += 1
            return NotYet()
        return Claim(tokens)

    def _wait_until_s(self, transfer: _Transfer) -> float:
        limits = self._settings.transfer
        if transfer.state is State.OFFERED:
            # each of two workers may use up its time to answer
            return transfer.offered_s + 2 * limits.offer_timeout_s + 0.5
        if transfer.state is State.ACCEPTED:
            return transfer.accepted_s + limits.start_timeout_s + transfer.eta_s
        return transfer.offered_s + limits.deadline_s

    def _abandon(self, transfer: _Transfer, event: Event, reason: str) -> None:
        if transfer.state in OVER:
            return
        loading = transfer.state in LOADING
        transfer.state = advance(transfer.state, event)
        transfer.failure = reason
        if event is Event.ABORT:
            self.totals["aborted"] += 1
        else:
            self.fallbacks[reason] += 1
        if loading:
            self._commands.append(AbandonReceive(transfer.request_id, reason))
        self._port.cancel(transfer.transfer_id, transfer.peer, reason)

    def _forget(self, transfer: _Transfer) -> None:
        self._by_request.pop(transfer.request_id, None)
        self._by_transfer.pop(transfer.transfer_id, None)
        self.recent.append(self._describe(transfer))

    def _drain(self) -> None:
        for event in self._port.drain():
            match event:
                case PeerJoined(add):
                    self._peers[add.peer] = add
                    self._commands.append(add)
                case PeerLeft(peer, reason):
                    if self._peers.pop(peer, None) is not None:
                        self._commands.append(RemovePeer(peer))
                    for transfer in list(self._by_request.values()):
                        if transfer.peer == peer:
                            self._abandon(transfer, Event.PEER_LOST, reason)
                case PrefillAccepted() | PrefillStarted() | PrefillFailed() | PrefillEnded():
                    if (found := self._by_transfer.get(event.transfer_id)) is not None and found.state not in OVER:
                        try:
                            self._progress(found, event)
                        except IllegalTransition:
                            self._abandon(found, Event.FAIL, "protocol_error")

    def _progress(
        self, transfer: _Transfer, event: PrefillAccepted | PrefillStarted | PrefillFailed | PrefillEnded
    ) -> None:
        now = self._clock()
        match event:
            case PrefillAccepted(_, peer, eta_s):
                transfer.peer, transfer.eta_s, transfer.accepted_s = peer, eta_s, now
                transfer.state = advance(transfer.state, Event.ACCEPT)
                if eta_s <= self._settings.transfer.alloc_lead_s and transfer.state is State.ACCEPTED:
                    transfer.state, transfer.started_s = advance(transfer.state, Event.START), now
            case PrefillStarted():
                transfer.started_s = transfer.started_s or now
                transfer.state = advance(transfer.state, Event.START)
            case PrefillFailed(_, reason):
                self._abandon(transfer, Event.FAIL, reason)
            case PrefillEnded():
                transfer.prefill_ended_s = now

    def _describe(self, transfer: _Transfer) -> dict[str, object]:
        return {
            "request_id": transfer.request_id,
            "transfer_id": transfer.transfer_id.hex(),
            "state": transfer.state.value,
            "peer": transfer.peer,
            "reason": transfer.reason,
            "failure": transfer.failure,
            "prompt_tokens": transfer.prompt_tokens,
            "first_token": transfer.first_token,
            "end_token": transfer.end_token,
            "offered_s": transfer.offered_s,
            "accepted_s": transfer.accepted_s,
            "started_s": transfer.started_s,
            "ready_s": transfer.ready_s,
            "landed_s": transfer.landed_s,
            "prefill_ended_s": transfer.prefill_ended_s,
            **(asdict(transfer.arrival) if transfer.arrival else {}),
        }

    def snapshot(self) -> dict[str, object]:
        """The debug view; may be called from another thread (reads only, copies first)."""
        return {
            "decisions": dict(self.decisions),
            "fallbacks": dict(self.fallbacks),
            "totals": dict(self.totals),
            "open": [self._describe(t) for t in list(self._by_request.values()) if t.state not in OVER],
            "tracked_requests": len(self._by_request) + len(self._local),
            "held_tokens": self._held_tokens,
            "peers": {peer: add.epoch for peer, add in list(self._peers.items())},
            "recent": list(self.recent),
            "ranks": {str(rank): counters for rank, counters in list(self.rank_counters.items())},
        }
