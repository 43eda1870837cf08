"""The decode role inside a scheduler process: decides, holds the tickets, and repairs. No I/O, no engine types.

Call order per request, all in the scheduler's thread:

    match()            each step while the request waits: "local", "wait" or "claim n tokens"
    allocated()        once, when the engine gave blocks to a claim
    step()             each step: commands for the worker ranks
    reports()          each step: what the ranks said
    load_completed()   once per claim that got blocks: the engine took the request back from us
    finished()         once per request, however it ended

Whatever fails is repaired in this order: a damaged chunk is sent again (by the data planes, once); another worker gets
the prompt for what has not landed, once, if the policies still want that; the engine computes the rest itself, and
many such requests come back no faster than ``control.fallback_pacer`` lets them.
"""

import functools
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence

from disagg_plugin.config import DisaggSettings
from disagg_plugin.control.decode_port import (
    Answer,
    Claim,
    DecodePort,
    NotYet,
    OfferCall,
    PrefillLocally,
    PromptView,
    Route,
)
from disagg_plugin.control.decode_transfer import Arrival, Transfer
from disagg_plugin.control.events import (
    PeerJoined,
    PeerLeft,
    PrefillAccepted,
    PrefillEnded,
    PrefillFailed,
    PrefillStarted,
)
from disagg_plugin.control.fallback_pacer import FallbackPacer
from disagg_plugin.control.load import LoadTracker
from disagg_plugin.control.offload_call import transfer_id_in
from disagg_plugin.control.offload_decisions import DEFAULT_STEP_TOKENS, OffloadDecisions, hashes_of
from disagg_plugin.control.shared_prefixes import SharedPrefixes
from disagg_plugin.kv.commands import (
    AbandonReceive,
    AddPeer,
    Command,
    OpenReceive,
    RankReport,
    RemovePeer,
    SuspendReceive,
)
from disagg_plugin.kv.lifecycle import LOADING, OVER, Event, IllegalTransition, State, advance
from disagg_plugin.observability.journal import Journal
from disagg_plugin.observability.ranges import profile_range
from disagg_plugin.serving.decision_record import DecisionRecord
from disagg_policies.snapshots import Local

NOT_THE_WORKERS_FAULT = frozenset({"http_400", "http_413", "http_422", "prompt_differs", "prompt_too_long"})

RECENT_TRANSFERS = 256
_WAITING = (State.ACCEPTED, State.SUSPENDED)


class DecodeSide:
    """Tickets of one decode engine's scheduler process; ``offload_decisions`` makes the decisions.

    Args:
        load: Of this engine, kept by its connector; told here of the prompts that stay.
        ranks: Worker ranks of this engine.
        step_tokens: Prompt tokens of one prefill step of a worker.
    """

    def __init__(
        self,
        settings: DisaggSettings,
        port: DecodePort,
        *,
        engine: str,
        kv_capacity_tokens: int,
        ranks: int = 1,
        load: LoadTracker | None = None,
        step_tokens: int = DEFAULT_STEP_TOKENS,
        clock: Callable[[], float] = time.monotonic,
        journal: Journal | None = None,
    ) -> None:
        self._settings = settings
        self._journal = journal or Journal()
        self._port = port
        self._load = load or LoadTracker(clock)
        self._decisions = OffloadDecisions(
            settings,
            port,
            self._load,
            engine=engine,
            kv_capacity_tokens=kv_capacity_tokens,
            step_tokens=step_tokens,
            clock=clock,
        )
        self._capacity_tokens = kv_capacity_tokens
        self._ranks = ranks
        self._clock = clock
        self._pacer = FallbackPacer(settings.transfer.fallback_local_tokens_per_step)
        self._free_tokens = kv_capacity_tokens
        self._by_request: dict[str, Transfer] = {}
        self._by_transfer: dict[bytes, Transfer] = {}
        self._local: dict[str, str] = {}
        self._shared = SharedPrefixes(settings.transfer.shared_prefix_wait_s, clock)
        self._commands: list[Command] = []
        self._peers: dict[str, AddPeer] = {}
        self._held_tokens = 0
        self.decisions: Counter[str] = Counter()
        self.fallbacks: Counter[str] = Counter()
        self.repairs: Counter[str] = Counter()  # by what went wrong: another worker was asked
        self.totals: Counter[str] = Counter()
        self.recent: deque[dict[str, object]] = deque(maxlen=RECENT_TRANSFERS)
        self.rank_counters: dict[int, dict[str, float]] = {}

    # -- the engine's scheduler asks ---------------------------------------------------------------------------

    def match(self, prompt: PromptView, cached_tokens: int, *, free_tokens: int, lmcache_tokens: int = 0) -> Answer:
        """What to do with a waiting request that has ``cached_tokens`` in the engine's own prefix cache.

        Idempotent: the engine asks again at each step, also after a failed allocation.

        Args:
            free_tokens: Room in the engine's KV cache; a claim that does not fit would block its waiting queue.
            lmcache_tokens: Prefix that LMCache will load for this request, counted from token 0 as well.
        """
        self._drain()
        held_tokens = max(cached_tokens, lmcache_tokens)
        self._free_tokens = free_tokens
        if (reason := self._local.get(prompt.request_id)) is not None:
            return PrefillLocally(reason)
        if prompt.request_id in self._pacer:
            return NotYet()
        transfer = self._by_request.get(prompt.request_id)
        if transfer is None:
            return self._decide(prompt, cached_tokens, lmcache_tokens, free_tokens)
        if transfer.state in OVER or not transfer.completed:
            return self._stay(prompt, held_tokens, transfer.failure or "already_loaded")
        if self._clock() > self._wait_until_s(transfer):
            self._timed_out(transfer)
            return self.match(prompt, cached_tokens, free_tokens=free_tokens, lmcache_tokens=lmcache_tokens)
        if transfer.prompt_tokens - 1 <= held_tokens:
            self._abandon(transfer, Event.ABORT, "cached_meanwhile")
            self._journal.decided(prompt.request_id, "local")
            return self._stay(prompt, held_tokens, transfer.failure)
        if transfer.state is not State.STARTED:
            return NotYet()
        return self._claim(transfer, held_tokens, free_tokens - (held_tokens - cached_tokens))

    def knows(self, request_id: str) -> bool:
        """Whether a request was decided on before."""
        return request_id in self._local or request_id in self._by_request or request_id in self._shared

    def allocated(self, request_id: str, block_ids: tuple[int, ...], external_tokens: int) -> None:
        """The engine allocated ``block_ids`` (from token 0 on) for a claim of ``external_tokens`` from a worker."""
        transfer = self._by_request.get(request_id)
        if transfer is None or external_tokens == 0 or not transfer.completed:
            return
        transfer.ready_s = self._clock()
        transfer.end_token = transfer.prompt_tokens - 1
        transfer.first_token = transfer.end_token - external_tokens
        transfer.held_tokens = external_tokens
        transfer.completed = False
        self._held_tokens += external_tokens
        self._open(transfer, block_ids)
        if transfer.state is not State.STARTED:
            # given up between the claim and the allocation: the engine waits for the ranks' report all the same
            self._commands.append(AbandonReceive(request_id, transfer.failure))
            return
        self._say_ready(transfer)

    def step(self) -> list[Command]:
        """Commands for the worker ranks; called once per scheduler step."""
        self._drain()
        now = self._clock()
        for transfer in list(self._by_request.values()):
            if transfer.state in OVER or transfer.completed:
                continue  # what the engine still asks about is looked at then
            if now > transfer.offered_s + self._settings.transfer.deadline_s:
                self._abandon(transfer, Event.DEADLINE, "timeout_deadline", blame=True)
            elif transfer.state is State.SUSPENDED and now > self._wait_until_s(transfer):
                self._timed_out(transfer)
        self._pacer.step()
        self._release_fallbacks()
        commands, self._commands = self._commands, []
        return commands

    def reports(self, reports: Iterable[RankReport]) -> None:
        """What the worker ranks said after a step."""
        for report in reports:
            if report.counters:
                self.rank_counters[report.rank] = report.counters
            for request_id, reason in report.receive_failed:
                transfer = self._by_request.get(request_id)
                if transfer is not None and transfer.state in LOADING:  # else it is about a sender that was given up
                    self._fail(transfer, Event.FAIL, reason, blame=True)
            for request_id, end_token in report.receive_suspended:
                if (transfer := self._by_request.get(request_id)) is not None:
                    transfer.suspended[report.rank] = end_token
            for request_id in report.received:
                if (transfer := self._by_request.get(request_id)) is not None:
                    transfer.done_ranks.add(report.rank)
            for timing in report.receive_timings:
                if (transfer := self._by_request.get(timing.request_id)) is not None:
                    self.totals["wire_bytes"] += timing.wire_bytes
                    self.totals["raw_bytes"] += timing.raw_bytes
                    arrival = Arrival.of(timing)
                    transfer.arrival = transfer.arrival.joined(arrival) if transfer.arrival else arrival
        for transfer in list(self._by_request.values()):
            if transfer.state is State.SUSPENDED and not transfer.attempted_s:
                self._repair_if_all_stopped(transfer)

    def prefix_failed(self, request_id: str) -> None:
        """LMCache did not deliver the prefix before a transfer: its KV would only be computed again."""
        transfer = self._by_request.get(request_id)
        if transfer is not None and transfer.state not in OVER and not transfer.completed:
            self._abandon(transfer, Event.FAIL, "prefix_lost")

    def load_completed(self, request_id: str) -> None:
        """All ranks reported this request; its blocks are the engine's again."""
        transfer = self._by_request.get(request_id)
        if transfer is None or transfer.completed:
            return
        transfer.completed = True
        self._shared.landed(request_id)
        self._held_tokens -= transfer.held_tokens
        transfer.held_tokens = 0
        if transfer.state not in OVER:
            if transfer.state is State.SUSPENDED:  # all of it was here when its worker was given up
                self._port.cancel(transfer.transfer_id, transfer.peer, "landed")
            transfer.state = advance(transfer.state, Event.COMPLETE)
            transfer.landed_s = self._clock()
            self.totals["landed"] += 1
            self._decisions.landed(transfer)
        transfer.record = transfer.prompt = None
        if transfer.request_ended:
            self._forget(transfer)

    def finished(self, request_id: str) -> None:
        """The request ended: served, or aborted in any state."""
        self._local.pop(request_id, None)
        self._shared.end(request_id)
        self._load.finished(request_id)
        transfer = self._by_request.get(request_id)
        if transfer is None:
            return
        if transfer.state not in OVER:
            self._abandon(transfer, Event.ABORT, "aborted")
        elif self._pacer.forget(request_id) and not transfer.completed:
            self._commands.append(AbandonReceive(request_id, transfer.failure))
        if transfer.completed or transfer.held_tokens == 0:
            self._forget(transfer)
        else:
            transfer.request_ended = True  # the ranks still owe their report

    # -- inside -------------------------------------------------------------------------------------------------

    def _decide(self, prompt: PromptView, cached_tokens: int, lmcache_tokens: int, free_tokens: int) -> Answer:
        held_tokens = max(cached_tokens, lmcache_tokens)
        stays = prompt.local_only
        needs_an_offer = prompt.route is not None and not prompt.route.held  # or its worker would go on waiting for one
        if stays is None and not needs_an_offer and held_tokens and held_tokens >= len(prompt.token_ids) - 1:
            stays = "prefix_held"  # whatever a policy would say: there is nothing to ask anybody for
        if stays is not None:
            self.decisions[stays] += 1
            if prompt.route is not None and prompt.route.held:
                self._port.cancel(prompt.route.held, prompt.route.worker, stays)  # nobody will fetch it
            self._journal.decided(prompt.request_id, "local")
            return self._stay(prompt, held_tokens, stays)
        if prompt.route is not None:
            if prompt.route.held in self._by_transfer:
                self.decisions["handed_over_twice"] += 1
                return self._stay(prompt, held_tokens, "handed_over_twice")
            self._journal.decided(prompt.request_id, "offloaded", None)
            return self._offer(prompt, cached_tokens, lmcache_tokens, (prompt.route.worker,), "routed", None)
        hashes = functools.cache(lambda: hashes_of(prompt))  # the dearest part of a decision: made once
        if self._waits_for_another(prompt, held_tokens, hashes):
            return NotYet()
        with profile_range("disagg decide"):
            record = self._decisions.decide(
                prompt,
                cached_tokens,
                lmcache_tokens=lmcache_tokens,
                free_tokens=free_tokens,
                promised_tokens=sum([t.promised_tokens for t in self._by_request.values()]),
                hashes=hashes(),
            )
        decision = record.decision
        if isinstance(decision, Local):
            self.decisions[decision.reason] += 1
            self._journal.decided(prompt.request_id, "local", decision.local_ttft_s)
            return self._stay(prompt, held_tokens, decision.reason)
        self._journal.decided(prompt.request_id, "offloaded", decision.remote_ttft_s)
        self._shared.begin(prompt.request_id, hashes(), priority=prompt.priority)
        return self._offer(prompt, cached_tokens, lmcache_tokens, decision.workers, decision.reason, record)

    def _offer(
        self,
        prompt: PromptView,
        cached_tokens: int,
        lmcache_tokens: int,
        workers: tuple[str, ...],
        reason: str,
        record: DecisionRecord | None,
    ) -> Answer:
        held_tokens = max(cached_tokens, lmcache_tokens)
        self.decisions[reason] += 1
        transfer = Transfer(
            request_id=prompt.request_id,
            transfer_id=_transfer_id(prompt.route),
            nonce=secrets.randbits(64),
            prompt_tokens=len(prompt.token_ids),
            cached_tokens=held_tokens,
            lmcache_tokens=max(0, lmcache_tokens - cached_tokens),
            offered_s=self._clock(),
            reason=reason,
            asked_s=self._clock() - (record.took_s if record is not None else 0.0),
            completed=True,
            record=record,
            prompt=prompt,
        )
        self._by_request[transfer.request_id] = transfer
        self.totals["offered"] += 1
        self._send_offer(transfer, prompt, workers)
        return NotYet()

    def _send_offer(self, transfer: Transfer, prompt: PromptView, workers: tuple[str, ...]) -> None:
        transfer.attempted_s = self._clock()
        self._by_transfer[transfer.transfer_id] = transfer
        self._port.offer(
            OfferCall(
                transfer_id=transfer.transfer_id,
                nonce=transfer.nonce,
                workers=workers,
                token_ids=prompt.token_ids,
                cached_tokens=transfer.cached_tokens,
                http_fields=prompt.http_fields,
                http_headers=prompt.http_headers,
                priority=prompt.priority,
                post=prompt.route is None,
                held=prompt.route is not None and bool(prompt.route.held),
                adapter=prompt.adapter,
                under=(prompt.lora, prompt.cache_salt) if prompt.route is not None and prompt.route.held else (),
            )
        )

    def _open(self, transfer: Transfer, block_ids: tuple[int, ...]) -> None:
        """Tell the ranks what comes, and from whom."""
        transfer.command = OpenReceive(
            request_id=transfer.request_id,
            transfer_id=transfer.transfer_id,
            nonce=transfer.nonce,
            peer=transfer.peer,
            first_token=transfer.first_token,
            end_token=transfer.end_token,
            block_ids=block_ids,
        )
        self._commands.append(transfer.command)

    def _say_ready(self, transfer: Transfer) -> None:
        transfer.state = advance(transfer.state, Event.READY)
        self._port.ready(transfer.transfer_id, transfer.peer, transfer.first_token, transfer.end_token)

    def _waits_for_another(self, prompt: PromptView, cached_tokens: int, hashes: Callable[[], Sequence[int]]) -> bool:
        """Whether most of what this prompt needs is already on its way for another one."""
        waited = prompt.request_id in self._shared
        leader = self._shared.leader_of(
            *(prompt.request_id, len(prompt.token_ids), hashes),
            cached_tokens=cached_tokens,
            priority=prompt.priority,
        )
        self.totals["waited_for_shared_prefix"] += leader is not None and not waited
        return leader is not None

    def _stay(self, prompt: PromptView, held_tokens: int, reason: str) -> PrefillLocally:
        self._local[prompt.request_id] = reason
        self._load.arrived(prompt.request_id, len(prompt.token_ids), held_tokens)
        return PrefillLocally(reason)

    def _claim(self, transfer: Transfer, held_tokens: int, free_tokens: int) -> Answer:
        tokens = transfer.prompt_tokens - 1 - held_tokens
        budget = self._settings.transfer.held_kv_fraction * self._capacity_tokens
        alone = self._held_tokens == 0  # one transfer is always let in, or a long prompt would never be served
        if tokens + 1 > free_tokens or (not alone and self._held_tokens + tokens > budget):
            self.totals["claim_waits"] += 1
            return NotYet()
        return Claim(tokens)

    def _wait_until_s(self, transfer: Transfer) -> float:
        limits = self._settings.transfer
        deadline_s = transfer.offered_s + limits.deadline_s
        if transfer.state is State.OFFERED or (transfer.state is State.SUSPENDED and not transfer.accepted_s):
            # each of two workers may use up its time to answer; a suspended one first waits for the ranks
            return (transfer.attempted_s or self._clock()) + 2 * limits.offer_timeout_s + 0.5
        if transfer.state in (State.ACCEPTED, State.SUSPENDED):
            return min(deadline_s, transfer.accepted_s + limits.start_timeout_s + transfer.eta_s)
        return deadline_s

    # -- inside: repair ----------------------------------------------------------------------------------------

    def _timed_out(self, transfer: Transfer) -> None:
        # a started one waits for room here: that is not the worker's fault
        blame = transfer.state is not State.STARTED
        self._fail(transfer, Event.DEADLINE, f"timeout_{transfer.state.value}", blame=blame)

    def _fail(self, transfer: Transfer, event: Event, reason: str, *, blame: bool = False) -> None:
        """Its worker will not deliver: another one for what is missing, if there is one, or else this engine."""
        if transfer.state in OVER:
            return
        if not self._may_go_elsewhere(transfer, reason):
            self._abandon(transfer, event, reason, blame=blame)
            return
        if blame:
            self._port.failed(transfer.peer, reason)
        self._port.cancel(transfer.transfer_id, transfer.peer, reason)
        self._by_transfer.pop(transfer.transfer_id, None)
        transfer.tried.append(transfer.peer)
        transfer.failure, transfer.peer, transfer.attempted_s = reason, "", 0.0
        transfer.eta_s = transfer.accepted_s = transfer.started_s = 0.0
        if transfer.state in LOADING:
            transfer.state = advance(transfer.state, Event.SUSPEND)
            self._commands.append(SuspendReceive(transfer.request_id))
            self._repair_if_all_stopped(transfer)
        else:
            transfer.state = advance(transfer.state, Event.REPAIR)
            self._repair(transfer)

    def _may_go_elsewhere(self, transfer: Transfer, reason: str) -> bool:
        prompt = transfer.prompt
        if prompt is None or prompt.route is not None or not transfer.peer or transfer.tried:
            return False
        if reason in NOT_THE_WORKERS_FAULT or (transfer.state is State.STARTED and reason.startswith("timeout")):
            return False
        if self._clock() > transfer.offered_s + self._settings.transfer.deadline_s:
            return False
        return any(w.healthy and w.worker != transfer.peer for w in self._port.workers())

    def _repair_if_all_stopped(self, transfer: Transfer) -> None:
        """Once every rank has said how far it got."""
        if len(transfer.suspended.keys() | transfer.done_ranks) < self._ranks:
            return
        if not transfer.done_ranks:
            transfer.cached_tokens = transfer.first_token = min(transfer.suspended.values())
            self._repair(transfer)
        elif len(transfer.done_ranks) < self._ranks:  # a rank that has everything cannot be asked to go on
            self._abandon(transfer, Event.FAIL, transfer.failure)

    def _repair(self, transfer: Transfer) -> None:
        prompt = transfer.prompt
        assert prompt is not None
        record = self._decisions.decide(
            prompt,
            transfer.cached_tokens,
            free_tokens=self._free_tokens,
            promised_tokens=sum([t.promised_tokens for t in self._by_request.values() if t is not transfer]),
            without=transfer.tried,
        )
        if isinstance(record.decision, Local):
            self._abandon(transfer, Event.FAIL, transfer.failure)
            return
        self.repairs[transfer.failure] += 1
        self.totals["repaired"] += 1
        transfer.transfer_id, transfer.nonce, transfer.record = secrets.token_bytes(16), secrets.randbits(64), None
        self._send_offer(transfer, prompt, record.decision.workers)

    def _resume(self, transfer: Transfer) -> None:
        """The second worker has started: the ranks go on from what they all have."""
        assert transfer.command is not None
        self._open(transfer, transfer.command.block_ids)
        self._say_ready(transfer)

    def _release_fallbacks(self) -> None:
        for request_id in self._pacer.released():
            transfer = self._by_request.get(request_id)
            if transfer is not None and not transfer.completed:
                self._commands.append(AbandonReceive(request_id, transfer.failure))

    def _abandon(self, transfer: Transfer, event: Event, reason: str, *, blame: bool = False) -> None:
        """Give a transfer up; ``blame``: its worker is to be used less."""
        if transfer.state in OVER:
            return
        if blame and transfer.peer:
            self._port.failed(transfer.peer, reason)
        transfer.state = advance(transfer.state, event)
        transfer.failure = reason
        if event is Event.ABORT:
            self.totals["aborted"] += 1
        else:
            self.fallbacks[reason] += 1
            transfer.given_up_s = self._clock()
            self._journal.fell_back(transfer.request_id)
        transfer.prompt = None
        self._port.cancel(transfer.transfer_id, transfer.peer, reason)
        if event is Event.ABORT:
            if not transfer.completed:
                self._commands.append(AbandonReceive(transfer.request_id, reason))
            return
        if not transfer.completed:  # the engine computes what is missing without asking again
            self._load.arrived(transfer.request_id, transfer.prompt_tokens, transfer.first_token)
        begin = transfer.cached_tokens if transfer.completed else transfer.first_token
        self._pacer.add(transfer.request_id, transfer.prompt_tokens - begin)
        self._release_fallbacks()

    def _forget(self, transfer: Transfer) -> None:
        self._by_request.pop(transfer.request_id, None)
        self._by_transfer.pop(transfer.transfer_id, None)
        row = transfer.row()
        self.recent.append(row)
        self._journal.transfer_over("decode", row)

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
                            self._fail(transfer, Event.PEER_LOST, reason)
                case PrefillEnded(transfer_id):
                    if (ended := self._by_transfer.get(transfer_id)) is not None:  # often after its last chunk
                        ended.prefill_ended_s = self._clock()
                case PrefillAccepted() | PrefillStarted() | PrefillFailed():
                    if (found := self._by_transfer.get(event.transfer_id)) is not None and found.state not in OVER:
                        try:
                            self._progress(found, event)
                        except IllegalTransition:
                            self._abandon(found, Event.FAIL, "protocol_error")

    def _progress(self, transfer: Transfer, event: PrefillAccepted | PrefillStarted | PrefillFailed) -> None:
        now = self._clock()
        if not isinstance(event, PrefillAccepted) and transfer.peer and event.peer not in ("", transfer.peer):
            return  # somebody who has, or had, nothing to do with it
        match event:
            case PrefillAccepted(_, peer, eta_s):
                transfer.peer, transfer.eta_s, transfer.accepted_s = peer, eta_s, now
                transfer.state = advance(transfer.state, Event.ACCEPT)
                if eta_s <= self._settings.transfer.alloc_lead_s and transfer.state in _WAITING:
                    transfer.state, transfer.started_s = advance(transfer.state, Event.START), now
            case PrefillStarted():
                transfer.started_s = transfer.started_s or now
                transfer.state = advance(transfer.state, Event.START)
            case PrefillFailed(reason=reason):
                self._fail(transfer, Event.FAIL, reason)
        if transfer.state is State.SUSPENDED and transfer.started_s:
            self._resume(transfer)

    def snapshot(self) -> dict[str, object]:
        """The debug view; may be called from another thread (reads only, copies first)."""
        transfers = list(self._by_request.values())
        return {
            **self.figures(),
            **self._decisions.snapshot(),
            "open": [t.row() for t in transfers if t.state not in OVER],
            "tracked_requests": len(transfers) + len(self._local) + len(self._shared),
            "peers": {peer: add.epoch for peer, add in list(self._peers.items())},
            "recent": list(self.recent),
        }

    def figures(self) -> dict[str, object]:
        """The part of it that metrics are made from, several times a second."""
        return {
            "decisions": dict(self.decisions),
            "policies": self._decisions.policies(),
            "model_errors": self._load.model.errors(),
            "fallbacks": dict(self.fallbacks),
            "repairs": dict(self.repairs),
            "totals": dict(self.totals),
            "open_transfers": sum(t.state not in OVER for t in list(self._by_request.values())),
            "held_tokens": self._held_tokens,
            "ranks": {str(rank): counters for rank, counters in list(self.rank_counters.items())},
        }

    def close(self) -> None:
        """Let the threads of other people's policies end."""
        self._decisions.close()


def _transfer_id(route: Route | None) -> bytes:
    """A new one, unless somebody else named the transfer."""
    if route is None:
        return secrets.token_bytes(16)
    return route.held or transfer_id_in(route.room)
