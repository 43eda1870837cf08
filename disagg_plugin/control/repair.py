"""Transfers whose worker will not deliver: another worker for what has not landed, once; else the engine itself, paced.

    fail()            its worker refused, failed, was lost or kept it waiting too long
    look_at_stopped() suspended ones: when all ranks have said how far they got, another worker is asked
    resume()          that one has started: the ranks go on from what they all have
    give_up()         it ended, or nobody else is to be asked: the engine computes what is missing
    step()            each step: the engine gets back as many as ``control.fallback_pacer`` lets it

The policies choose the second worker as they choose the first, with the first left out; if they now want the prompt to
stay, it does.
"""

import secrets
import time
from collections import Counter
from collections.abc import Callable

from disagg_plugin.config import TransferSettings
from disagg_plugin.control.decode_port import DecodePort
from disagg_plugin.control.decode_tickets import Tickets
from disagg_plugin.control.decode_transfer import Transfer
from disagg_plugin.control.fallback_pacer import FallbackPacer
from disagg_plugin.control.load import LoadTracker
from disagg_plugin.control.offload_decisions import OffloadDecisions
from disagg_plugin.kv.commands import SuspendReceive
from disagg_plugin.kv.lifecycle import LOADING, OVER, Event, State, advance
from disagg_plugin.observability.journal import Journal
from disagg_policies.snapshots import Local

NOT_THE_WORKERS_FAULT = frozenset({"http_400", "http_413", "http_422", "prompt_differs", "prompt_too_long"})


class Repair:
    """Of one decode engine; the scheduler's thread, no I/O.

    Args:
        ranks: Worker ranks of this engine.
        load: Told of prompts that the engine now computes itself.

    Attributes:
        fallbacks: By what went wrong: the engine computes it.
        repairs: By what went wrong: another worker was asked.
    """

    def __init__(
        self,
        limits: TransferSettings,
        tickets: Tickets,
        port: DecodePort,
        decisions: OffloadDecisions,
        load: LoadTracker,
        journal: Journal,
        *,
        ranks: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._tickets = tickets
        self._port = port
        self._decisions = decisions
        self._load = load
        self._journal = journal
        self._ranks = ranks
        self._clock = clock
        self._pacer = FallbackPacer(limits.fallback_local_tokens_per_step)
        self.fallbacks: Counter[str] = Counter()
        self.repairs: Counter[str] = Counter()

    # -- when ---------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """The engine makes a step: deadlines pass, and what may come back does."""
        now = self._clock()
        for transfer in self._tickets.open:
            if transfer.completed:
                continue  # what the engine still asks about is looked at then
            if now > transfer.offered_s + self._limits.deadline_s:
                self.give_up(transfer, Event.DEADLINE, "timeout_deadline", blame=True)
            elif transfer.state is State.SUSPENDED:
                self.fail_if_overdue(transfer)
        self._pacer.step()
        self._release()

    def fail_if_overdue(self, transfer: Transfer) -> bool:
        """Whether its worker has had all the time that its state allows."""
        if self._clock() <= self._wait_until_s(transfer):
            return False
        # a started one waits for room here: that is not the worker's fault
        blame = transfer.state is not State.STARTED
        self.fail(transfer, Event.DEADLINE, f"timeout_{transfer.state.value}", blame=blame)
        return True

    def _wait_until_s(self, transfer: Transfer) -> float:
        deadline_s = transfer.offered_s + self._limits.deadline_s
        if transfer.state is State.OFFERED or (transfer.state is State.SUSPENDED and not transfer.accepted_s):
            # each of two workers may use up its time to answer; a suspended one first waits for the ranks
            return (transfer.attempted_s or self._clock()) + 2 * self._limits.offer_timeout_s + 0.5
        if transfer.state in (State.ACCEPTED, State.SUSPENDED):
            return min(deadline_s, transfer.accepted_s + self._limits.start_timeout_s + transfer.eta_s)
        return deadline_s

    # -- another worker -----------------------------------------------------------------------------------------

    def fail(self, transfer: Transfer, event: Event, reason: str, *, blame: bool = False) -> None:
        """Its worker will not deliver; ``blame``: it is to be used less."""
        if transfer.state in OVER:
            return
        if not self._may_go_elsewhere(transfer, reason):
            self.give_up(transfer, event, reason, blame=blame)
            return
        if blame:
            self._port.failed(transfer.peer, reason)
        self._port.cancel(transfer.transfer_id, transfer.peer, reason)
        self._tickets.by_transfer.pop(transfer.transfer_id, None)
        transfer.tried.append(transfer.peer)
        transfer.failure, transfer.peer, transfer.attempted_s = reason, "", 0.0
        transfer.eta_s = transfer.accepted_s = transfer.started_s = 0.0
        if transfer.state in LOADING:
            transfer.state = advance(transfer.state, Event.SUSPEND)
            self._tickets.tell(SuspendReceive(transfer.request_id))
            self._ask_if_all_stopped(transfer)
        else:
            transfer.state = advance(transfer.state, Event.REPAIR)
            self._ask_another(transfer)

    def look_at_stopped(self) -> None:
        """The ranks have reported: whoever of the suspended ones they have all stopped may go on elsewhere."""
        for transfer in self._tickets.open:
            if transfer.state is State.SUSPENDED and not transfer.attempted_s:
                self._ask_if_all_stopped(transfer)

    def resume(self, transfer: Transfer) -> None:
        """The second worker has started: the ranks go on from what they all have."""
        assert transfer.command is not None
        self._tickets.open_ranks(transfer, transfer.command.block_ids)
        self._tickets.say_ready(transfer)

    def _may_go_elsewhere(self, transfer: Transfer, reason: str) -> bool:
        prompt = transfer.prompt
        if prompt is None or prompt.route is not None or not transfer.peer or transfer.tried:
            return False
        if reason in NOT_THE_WORKERS_FAULT or (transfer.state is State.STARTED and reason.startswith("timeout")):
            return False
        if self._clock() > transfer.offered_s + self._limits.deadline_s:
            return False
        return any(w.healthy and w.worker != transfer.peer for w in self._port.workers())

    def _ask_if_all_stopped(self, transfer: Transfer) -> None:
        """Once every rank has said how far it got."""
        if len(transfer.suspended.keys() | transfer.done_ranks) < self._ranks:
            return
        if not transfer.done_ranks:
            transfer.cached_tokens = transfer.first_token = min(transfer.suspended.values())
            self._ask_another(transfer)
        elif len(transfer.done_ranks) < self._ranks:  # a rank that has everything cannot be asked to go on
            self.give_up(transfer, Event.FAIL, transfer.failure)

    def _ask_another(self, transfer: Transfer) -> None:
        prompt = transfer.prompt
        assert prompt is not None
        record = self._decisions.decide(
            prompt,
            transfer.cached_tokens,
            free_tokens=self._tickets.free_tokens,
            promised_tokens=self._tickets.promised_tokens(without=transfer),
            without=transfer.tried,
        )
        if isinstance(record.decision, Local):
            self.give_up(transfer, Event.FAIL, transfer.failure)
            return
        self.repairs[transfer.failure] += 1
        self._tickets.totals["repaired"] += 1
        transfer.transfer_id, transfer.nonce, transfer.record = secrets.token_bytes(16), secrets.randbits(64), None
        self._tickets.offer(transfer, prompt, record.decision.workers)

    # -- the engine itself --------------------------------------------------------------------------------------

    def give_up(self, transfer: Transfer, event: Event, reason: str, *, blame: bool = False) -> None:
        """Nobody delivers it any more; ``blame``: its worker is to be used less."""
        if transfer.state in OVER:
            return
        if blame and transfer.peer:
            self._port.failed(transfer.peer, reason)
        transfer.state = advance(transfer.state, event)
        transfer.failure = reason
        transfer.prompt = None
        self._port.cancel(transfer.transfer_id, transfer.peer, reason)
        if event is Event.ABORT:
            self._tickets.totals["aborted"] += 1
            if not transfer.completed:
                self._tickets.leave_to_the_engine(transfer)
            return
        self.fallbacks[reason] += 1
        transfer.given_up_s = self._clock()
        self._journal.fell_back(transfer.request_id)
        if not transfer.completed:  # the engine computes what is missing without asking again
            self._load.arrived(transfer.request_id, transfer.prompt_tokens, transfer.first_token)
        begin = transfer.cached_tokens if transfer.completed else transfer.first_token
        self._pacer.add(transfer.request_id, transfer.prompt_tokens - begin)
        self._release()

    def is_held_back(self, request_id: str) -> bool:
        """Whether a request was given up and does not come back yet."""
        return request_id in self._pacer

    def ended(self, transfer: Transfer) -> None:
        """The request of one that was given up ended before it came back."""
        if self._pacer.forget(transfer.request_id) and not transfer.completed:
            self._tickets.leave_to_the_engine(transfer)

    def _release(self) -> None:
        for request_id in self._pacer.released():
            transfer = self._tickets.by_request.get(request_id)
            if transfer is not None and not transfer.completed:
                self._tickets.leave_to_the_engine(transfer)
