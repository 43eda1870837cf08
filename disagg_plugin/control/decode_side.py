"""The decode role inside a scheduler process: decides, makes tickets and follows them. No I/O, no engine types.

Call order per request, all in the scheduler's thread:

    match()            each step while the request waits: "local", "wait" or "claim n tokens"
    allocated()        once, when the engine gave blocks to a claim
    step()             each step: commands for the worker ranks
    reports()          each step: what the ranks said
    load_completed()   once per claim that got blocks: the engine took the request back from us
    finished()         once per request, however it ended

Whatever fails is repaired in this order: a damaged chunk is sent again (by the data planes, once); then it is up to
``control.repair``: another worker gets the prompt for what has not landed, or the engine computes that itself.
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
    PrefillLocally,
    PromptView,
    Route,
)
from disagg_plugin.control.decode_tickets import Tickets
from disagg_plugin.control.decode_transfer import Arrival, Transfer
from disagg_plugin.control.events import (
    PeerJoined,
    PeerLeft,
    PrefillAccepted,
    PrefillEnded,
    PrefillFailed,
    PrefillStarted,
)
from disagg_plugin.control.load import LoadTracker
from disagg_plugin.control.offload_call import transfer_id_in
from disagg_plugin.control.offload_decisions import DEFAULT_STEP_TOKENS, OffloadDecisions, hashes_of
from disagg_plugin.control.repair import Repair
from disagg_plugin.control.shared_prefixes import SharedPrefixes
from disagg_plugin.kv.commands import AddPeer, Command, RankReport, RemovePeer
from disagg_plugin.kv.lifecycle import LOADING, OVER, Event, IllegalTransition, State, advance
from disagg_plugin.observability.journal import Journal
from disagg_plugin.observability.ranges import profile_range
from disagg_plugin.serving.decision_record import DecisionRecord
from disagg_policies.snapshots import Local

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
        self._clock = clock
        self._tickets = Tickets(port, clock, free_tokens=kv_capacity_tokens)
        self._repair = Repair(
            settings.transfer,
            self._tickets,
            port,
            self._decisions,
            self._load,
            self._journal,
            ranks=ranks,
            clock=clock,
        )
        self._local: dict[str, str] = {}
        self._shared = SharedPrefixes(settings.transfer.shared_prefix_wait_s, clock)
        self._peers: dict[str, AddPeer] = {}
        self._held_tokens = 0
        self.decisions: Counter[str] = Counter()
        self.fallbacks, self.repairs, self.totals = self._repair.fallbacks, self._repair.repairs, self._tickets.totals
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
        self._tickets.free_tokens = free_tokens
        if (reason := self._local.get(prompt.request_id)) is not None:
            return PrefillLocally(reason)
        if self._repair.is_held_back(prompt.request_id):
            return NotYet()
        transfer = self._tickets.by_request.get(prompt.request_id)
        if transfer is None:
            return self._decide(prompt, cached_tokens, lmcache_tokens, free_tokens)
        if transfer.state in OVER or not transfer.completed:
            return self._stay(prompt, held_tokens, transfer.failure or "already_loaded")
        if self._repair.fail_if_overdue(transfer):
            return self.match(prompt, cached_tokens, free_tokens=free_tokens, lmcache_tokens=lmcache_tokens)
        if transfer.prompt_tokens - 1 <= held_tokens:
            self._repair.give_up(transfer, Event.ABORT, "cached_meanwhile")
            self._journal.decided(prompt.request_id, "local")
            return self._stay(prompt, held_tokens, transfer.failure)
        if transfer.state is not State.STARTED:
            return NotYet()
        return self._claim(transfer, held_tokens, free_tokens - (held_tokens - cached_tokens))

    def knows(self, request_id: str) -> bool:
        """Whether a request was decided on before."""
        return request_id in self._local or request_id in self._tickets.by_request or request_id in self._shared

    def allocated(self, request_id: str, block_ids: tuple[int, ...], external_tokens: int) -> None:
        """The engine allocated ``block_ids`` (from token 0 on) for a claim of ``external_tokens`` from a worker."""
        transfer = self._tickets.by_request.get(request_id)
        if transfer is None or external_tokens == 0 or not transfer.completed:
            return
        transfer.ready_s = self._clock()
        transfer.end_token = transfer.prompt_tokens - 1
        transfer.first_token = transfer.end_token - external_tokens
        transfer.held_tokens = external_tokens
        transfer.completed = False
        self._held_tokens += external_tokens
        self._tickets.open_ranks(transfer, block_ids)
        if transfer.state is not State.STARTED:
            # given up between the claim and the allocation: the engine waits for the ranks' report all the same
            self._tickets.leave_to_the_engine(transfer)
            return
        self._tickets.say_ready(transfer)

    def step(self) -> list[Command]:
        """Commands for the worker ranks; called once per scheduler step."""
        self._drain()
        self._repair.step()
        return self._tickets.take_commands()

    def reports(self, reports: Iterable[RankReport]) -> None:
        """What the worker ranks said after a step."""
        for report in reports:
            if report.counters:
                self.rank_counters[report.rank] = report.counters
            for request_id, reason in report.receive_failed:
                transfer = self._tickets.by_request.get(request_id)
                if transfer is not None and transfer.state in LOADING:  # else it is about a sender that was given up
                    self._repair.fail(transfer, Event.FAIL, reason, blame=True)
            for request_id, end_token in report.receive_suspended:
                if (transfer := self._tickets.by_request.get(request_id)) is not None:
                    transfer.suspended[report.rank] = end_token
            for request_id in report.received:
                if (transfer := self._tickets.by_request.get(request_id)) is not None:
                    transfer.done_ranks.add(report.rank)
            for timing in report.receive_timings:
                if (transfer := self._tickets.by_request.get(timing.request_id)) is not None:
                    self.totals["wire_bytes"] += timing.wire_bytes
                    self.totals["raw_bytes"] += timing.raw_bytes
                    arrival = Arrival.of(timing)
                    transfer.arrival = transfer.arrival.joined(arrival) if transfer.arrival else arrival
        self._repair.look_at_stopped()

    def prefix_failed(self, request_id: str) -> None:
        """LMCache did not deliver the prefix before a transfer: its KV would only be computed again."""
        transfer = self._tickets.by_request.get(request_id)
        if transfer is not None and transfer.state not in OVER and not transfer.completed:
            self._repair.give_up(transfer, Event.FAIL, "prefix_lost")

    def load_completed(self, request_id: str) -> None:
        """All ranks reported this request; its blocks are the engine's again."""
        transfer = self._tickets.by_request.get(request_id)
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
        transfer = self._tickets.by_request.get(request_id)
        if transfer is None:
            return
        if transfer.state not in OVER:
            self._repair.give_up(transfer, Event.ABORT, "aborted")
        else:
            self._repair.ended(transfer)
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
            if prompt.route.held in self._tickets.by_transfer:
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
                promised_tokens=self._tickets.promised_tokens(),
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
        self.totals["offered"] += 1
        self._tickets.offer(transfer, prompt, workers)
        return NotYet()

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

    def _forget(self, transfer: Transfer) -> None:
        self._tickets.forget(transfer)
        row = transfer.row()
        self.recent.append(row)
        self._journal.transfer_over("decode", row)

    def _drain(self) -> None:
        for event in self._port.drain():
            match event:
                case PeerJoined(add):
                    self._peers[add.peer] = add
                    self._tickets.tell(add)
                case PeerLeft(peer, reason):
                    if self._peers.pop(peer, None) is not None:
                        self._tickets.tell(RemovePeer(peer))
                    for transfer in list(self._tickets.by_request.values()):
                        if transfer.peer == peer:
                            self._repair.fail(transfer, Event.PEER_LOST, reason)
                case PrefillEnded(transfer_id):
                    if (ended := self._tickets.by_transfer.get(transfer_id)) is not None:  # often after its last chunk
                        ended.prefill_ended_s = self._clock()
                case PrefillAccepted() | PrefillStarted() | PrefillFailed():
                    found = self._tickets.by_transfer.get(event.transfer_id)
                    if found is not None and found.state not in OVER:
                        try:
                            self._progress(found, event)
                        except IllegalTransition:
                            self._repair.give_up(found, Event.FAIL, "protocol_error")

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
                self._repair.fail(transfer, Event.FAIL, reason)
        if transfer.state is State.SUSPENDED and transfer.started_s:
            self._repair.resume(transfer)

    def snapshot(self) -> dict[str, object]:
        """The debug view; may be called from another thread (reads only, copies first)."""
        return {
            **self.figures(),
            **self._decisions.snapshot(),
            "open": [transfer.row() for transfer in self._tickets.open],
            "tracked_requests": len(self._tickets.by_request) + len(self._local) + len(self._shared),
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
            "open_transfers": len(self._tickets.open),
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
