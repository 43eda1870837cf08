"""Admission of one API server: everything that is known of the engine, of the routes and of what is under way.

    enter     before tokenization: an estimate that errs on the request's side       Ticket | Refusal
    exact     with token ids, before queueing                                         Refusal or None
    left      the answer is out, or the client is gone
    update    an engine's report

No I/O, no clock of its own, no engine types; all calls from one thread, the API server's event loop.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from disagg_plugin.admission.admitter import Admitter
from disagg_plugin.admission.body import BodyFacts
from disagg_plugin.admission.classes import ClassBook, Standing
from disagg_plugin.admission.engine_state import EngineState, request_mark
from disagg_plugin.admission.fair_share import FairShare
from disagg_plugin.admission.learned import ArrivalRates, Route
from disagg_plugin.admission.ledger import Ledger, Reservation
from disagg_plugin.qos_settings import QosSettings
from disagg_policies.admission_snapshots import (
    NEVER_OFFLOAD,
    ONLY_OFFLOAD,
    Admission,
    AdmissionSnapshot,
    Admitted,
    Arrival,
    QueuedWork,
    Refused,
    ServiceClass,
)

DECODE_LASTS_PRIOR_S = 5.0
SMOOTHING = 0.05
PRESSURE_HOLDS_S = 2.0  # a pressure this old says nothing
STAGES = ("early", "exact")
RESTARTED = 1000  # a sequence so far behind is that of a new process


@dataclass(slots=True, eq=False)
class Ticket:
    """One request that was let in.

    Attributes:
        steps: Degradation steps to apply.
        refusal: Set where the exact check refuses what the first one let in.
        exact: Whether ``prompt_tokens`` was counted by the engine.
    """

    standing: Standing
    route: Route
    text_bytes: int
    prompt_tokens: int
    cached_tokens: int
    remote_prefill_done: bool
    steps: tuple[str, ...]
    reservation: Reservation
    reason: str
    ttft_s: float | None = None
    refusal: "Refusal | None" = None
    exact: bool = False
    charged_tokens: int = 0
    further: list[Reservation] = field(default_factory=list)  # of a request with several prompts

    @property
    def service_class(self) -> ServiceClass:
        return self.standing.service_class

    @property
    def routing(self) -> str | None:
        """``never_offload``, ``only_offload``, or None."""
        return next((step for step in self.steps if step in (NEVER_OFFLOAD, ONLY_OFFLOAD)), None)


@dataclass(frozen=True, slots=True)
class Refusal:
    """One request that was not, and what the client is told."""

    answer: Refused
    service_class: ServiceClass


@dataclass(slots=True)
class _Engine:
    state: EngineState
    received_s: float


class Observer(Protocol):
    """Who counts what becomes of requests."""

    def admitted(self, slo_class: str | None, reason: str = "") -> None: ...
    def refused(self, slo_class: str | None, reason: str) -> None: ...
    def degraded(self, slo_class: str | None, step: str) -> None: ...


class Gate:
    """See the module.

    Attributes:
        draining: Everybody is refused with 503; see ``drain``.
        drained_at_s: When that was decided, on the clock; the newest word counts among several API servers.
        has_exact: The second stage is there. It also sets the priority of requests with huge bodies, and tells the
            scheduler about ``never_offload`` and ``only_offload``; without it these steps are left out.
        observer: Who counts, or None.
        outcomes: By class, stage, outcome and reason.
        degraded: Applied steps, by class and step.
    """

    def __init__(
        self,
        settings: QosSettings,
        admitter: Admitter,
        *,
        clock: Callable[[], float] = time.monotonic,
        accepts_transfers: bool = False,
        offload_above_tokens: int | None = None,
    ) -> None:
        """
        Args:
            offload_above_tokens: As in ``AdmissionSnapshot``: what the offload policy goes by, if it is that simple.
            accepts_transfers: This engine prefills for others: their calls were admitted on the side channel.
        """
        self.settings = settings
        self.book = ClassBook(settings)
        self.accepts_transfers = accepts_transfers
        self.draining = False
        self.drained_at_s = float("-inf")
        self.has_exact = False
        self.observer: Observer | None = None
        self.outcomes: Counter[tuple[str, str, str, str]] = Counter()
        self.degraded: Counter[tuple[str, str]] = Counter()
        self._admitter = admitter
        self._clock = clock
        self._offload_above_tokens = offload_above_tokens
        self._arriving = ArrivalRates()
        self._ledger = Ledger()
        self._elsewhere: Callable[[], list[QueuedWork]] = list
        self._engines: dict[str, _Engine] = {}
        self._routes: dict[str, Route] = {}
        self._levels: dict[str, int] = {}
        self._pressures: dict[str, tuple[float, float]] = {}
        burst_tokens = settings.fair_share_burst_tokens
        self._shares: dict[str, FairShare] = {}
        if burst_tokens is not None and self.book.maps_keys:
            self._shares = {one.name: FairShare(burst_tokens) for one in self.book.classes}
        self._mean_work_tokens = 0.0
        self._mean_prompt_tokens = 0.0
        self._mean_running = 1.0

    # -- what is reported --------------------------------------------------------------------------------------------

    def update(self, state: EngineState, engine: str = "0") -> None:
        """An engine's report; an older one than the last is ignored."""
        known = self._engines.get(engine)
        if (
            known is not None
            and 0 < state.sequence <= known.state.sequence
            and known.state.sequence - state.sequence < 1000
        ):
            return
        now_s = self._clock()
        self._engines[engine] = _Engine(state, now_s)
        self._ledger.reported(state.recent, now_s)
        if state.decode.running_decodes:
            self._mean_running += SMOOTHING * (state.decode.running_decodes - self._mean_running)

    def drain(self, draining: bool = True, at_s: float | None = None) -> None:
        """Take no new requests from now on, or take them again; those under way go on."""
        self.draining = draining
        self.drained_at_s = self._clock() if at_s is None else at_s

    def also_count(self, elsewhere: Callable[[], list[QueuedWork]]) -> None:
        """Where the reservations of other API servers of the same engine are to be read."""
        self._elsewhere = elsewhere

    def reservations(self) -> list[QueuedWork]:
        """What was admitted here and is in no report yet."""
        return self._ledger.work()

    def newest_reports(self) -> dict[str, EngineState]:
        """Of each engine, for other API servers."""
        return {name: engine.state for name, engine in self._engines.items()}

    def kv_capacity_tokens(self) -> int | None:
        """Of all engines together, or None: not known."""
        known = [engine.state.kv_capacity_tokens for engine in self._engines.values()]
        return sum(tokens or 0 for tokens in known) or None

    # -- a request's way ---------------------------------------------------------------------------------------------

    def enter(self, path: str, headers: Mapping[bytes, bytes], facts: BodyFacts) -> Ticket | Refusal:
        """First stage, before tokenization.

        Raises:
            UnknownClass: The request names a class that there is not.
        """
        standing = self.book.standing(headers, facts.priority)
        route = self._routes.get(path)
        if route is None:
            route = self._routes[path] = Route()
        counted = facts.prompt_tokens
        prompt_tokens = route.prompt_tokens(facts.text_bytes) if counted is None else counted
        cached_tokens = route.cached_tokens(prompt_tokens)
        arrival = Arrival(standing.service_class.name, prompt_tokens, cached_tokens, facts.remote_prefill_done)
        answer = self._ask(arrival, standing, "early")
        if isinstance(answer, Refused):
            return Refusal(answer, standing.service_class)
        work_tokens = 0 if facts.remote_prefill_done else prompt_tokens - cached_tokens
        ticket = Ticket(
            standing,
            route,
            facts.text_bytes if counted is None else 0,
            prompt_tokens,
            cached_tokens,
            facts.remote_prefill_done,
            answer.steps,
            self._ledger.reserve(standing.service_class.priority, work_tokens, self._clock()),
            answer.reason,
            answer.ttft_s,
        )
        self._charge(ticket, work_tokens)
        if not self.has_exact:
            self._arriving.saw(standing.service_class.priority, work_tokens, self._clock())
        if not self.has_exact and self.observer is not None:
            self.observer.admitted(standing.service_class.name, answer.reason)
        return ticket

    def exact(
        self, ticket: Ticket, request_id: str, prompt_tokens: int, cached_tokens: int | None = None
    ) -> Refusal | None:
        """Second stage, before queueing.

        A request with several prompts comes here with each of them; the first decides.

        Args:
            request_id: As the engine's scheduler will know it.
            cached_tokens: Prefix that the engine holds, or None: what the first stage believed counts.
        """
        if ticket.exact:
            more = self._ledger.reserve(ticket.service_class.priority, prompt_tokens, self._clock())
            self._ledger.sent(more, request_mark(request_id), prompt_tokens)
            ticket.further.append(more)
            return None
        if ticket.text_bytes and not ticket.exact:
            ticket.route.saw_length(ticket.text_bytes, prompt_tokens)
        if cached_tokens is None:
            cached_tokens = ticket.route.cached_tokens(prompt_tokens)
        cached_tokens = min(cached_tokens, max(0, prompt_tokens - 1))
        ticket.exact, ticket.prompt_tokens, ticket.cached_tokens = True, prompt_tokens, cached_tokens
        self._ledger.release(ticket.reservation)  # it does not wait for itself
        arrival = Arrival(ticket.service_class.name, prompt_tokens, cached_tokens, ticket.remote_prefill_done)
        answer = self._ask(arrival, ticket.standing, "exact")
        if isinstance(answer, Refused):
            self._charge(ticket, 0)
            ticket.refusal = Refusal(answer, ticket.service_class)
            return ticket.refusal
        work_tokens = 0 if ticket.remote_prefill_done else prompt_tokens - cached_tokens
        self._mean_work_tokens = _smoothed(self._mean_work_tokens, work_tokens)
        self._mean_prompt_tokens = _smoothed(self._mean_prompt_tokens, prompt_tokens)
        ticket.ttft_s = answer.ttft_s
        ticket.reservation = self._ledger.reserve(ticket.service_class.priority, work_tokens, self._clock())
        self._ledger.sent(ticket.reservation, request_mark(request_id), work_tokens)
        self._arriving.saw(ticket.service_class.priority, work_tokens, self._clock())
        self._charge(ticket, work_tokens)
        if self.observer is not None:
            self.observer.admitted(ticket.service_class.name, answer.reason)
        return None

    def used(self, ticket: Ticket, prompt_tokens: int, cached_tokens: int | None, output_tokens: int) -> None:
        """What a response's usage says."""
        if ticket.text_bytes and not ticket.exact:
            ticket.route.saw_length(ticket.text_bytes, prompt_tokens)
            ticket.exact = True
        if cached_tokens is not None:
            ticket.route.saw_cached(prompt_tokens, cached_tokens)
        if (tenant := ticket.standing.tenant) is not None and (share := self._share(ticket.standing)) is not None:
            share.charge(tenant, output_tokens)

    def left(self, ticket: Ticket) -> None:
        """The request is over, in whichever way; idempotent."""
        self._ledger.release(ticket.reservation)
        for reservation in ticket.further:
            self._ledger.release(reservation)

    def applied(self, ticket: Ticket, steps: tuple[str, ...]) -> None:
        """These degradation steps were applied, and the client is told."""
        for step in steps:
            name = step.partition(":")[0]
            self.degraded[ticket.service_class.name, name] += 1
            if self.observer is not None:
                self.observer.degraded(ticket.service_class.name, name)

    # -- views -------------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, object]:
        """For people and dashboards."""
        now_s = self._clock()
        return {
            "draining": self.draining,
            "classes": {
                one.name: {
                    "priority": one.priority,
                    "ttft_slo_s": one.ttft_slo_s,
                    "tpot_slo_s": one.tpot_slo_s,
                    "degradation": list(one.degrade[: self._levels.get(one.name, 0)]),
                    "pressure": self._pressure(one.name, now_s),
                }
                for one in self.book.classes
            },
            "outcomes": [
                {"class": name, "stage": stage, "outcome": outcome, "reason": reason, "count": count}
                for (name, stage, outcome, reason), count in sorted(self.outcomes.items())
            ],
            "degraded": [
                {"class": name, "step": step, "count": count} for (name, step), count in sorted(self.degraded.items())
            ],
            "reserved": _plain(self._ledger.work()),
            "reserved_elsewhere": _plain(self._elsewhere()),
            "engines": {
                name: {
                    "age_s": now_s - engine.received_s,
                    "queued_tokens": engine.state.queued_tokens,
                    "running_decodes": engine.state.decode.running_decodes,
                    "kv_usage": engine.state.decode.kv_usage,
                    "workers": len(engine.state.workers),
                }
                for name, engine in self._engines.items()
            },
            "routes": {path: route.describe() for path, route in self._routes.items()},
            "policy": self._admitter.status(),
        }

    def close(self) -> None:
        self._admitter.close()

    # -- inside ------------------------------------------------------------------------------------------------------

    def _ask(self, arrival: Arrival, standing: Standing, stage: str) -> Admission:
        now_s = self._clock()
        name = arrival.service_class
        overused = False
        if standing.tenant is not None and stage == STAGES[0] and (share := self._share(standing)) is not None:
            overused = share.overused(standing.tenant, now_s, self._pressure(name, now_s))
        engine = self._engine(now_s)
        answer: Admission
        if engine is None and not self.draining:
            answer = Admitted("unknown_load", level=self._levels.get(name, 0))
        else:
            answer = self._admitter.ask(self._snapshot(arrival, engine or EngineState(), overused))
            self._levels[name] = answer.level
            self._pressures[name] = (answer.pressure, now_s)
        refused = isinstance(answer, Refused)
        if refused or stage == STAGES[0]:  # an exact check that agrees with the first one is no other outcome
            self.outcomes[name, stage, "refused" if refused else "admitted", answer.reason] += 1
        if refused and self.observer is not None:
            self.observer.refused(name, answer.reason)
        return answer

    def _snapshot(self, arrival: Arrival, state: EngineState, overused: bool) -> AdmissionSnapshot:
        engines = max(1, len(self._engines))
        queued = [*self._ledger.work(), *self._elsewhere()]
        if engines > 1:  # whoever spreads requests over engines spreads these as well
            queued = [QueuedWork(w.priority, -(-w.requests // engines), -(-w.tokens // engines)) for w in queued]
        decode_lasts_s = DECODE_LASTS_PRIOR_S if state.decode_lasts_s is None else state.decode_lasts_s
        return AdmissionSnapshot(
            arrival,
            self.book.classes,
            state.decode,
            state.workers,
            state.queued,
            state.reorders,
            state.landing,
            decode_lasts_s,
            state.decode.prefill.seconds(int(self._mean_work_tokens), 0),
            decode_lasts_s / max(1.0, self._mean_running),
            state.drain_tokens_per_s,
            state.kv_capacity_tokens,
            state.max_running,
            self._levels.get(arrival.service_class, 0),
            overused,
            self.draining or state.draining,
            reserved=tuple(queued),
            offload_above_tokens=self._offload_above_tokens,
            decode_stall_s=state.decode_stall_s,
            arriving=self._arriving.rates(self._clock()),
            mean_prompt_tokens=self._mean_prompt_tokens,
        )

    def _engine(self, now_s: float) -> EngineState | None:
        """The least loaded one that is believed: whoever spreads requests over engines will choose it."""
        max_age_s = self.settings.state_max_age_s
        best = None
        for engine in self._engines.values():
            state = engine.state
            idle = not state.queued and not state.decode.running_decodes  # says nothing more until something happens
            if not idle and now_s - engine.received_s > max_age_s:
                continue
            if best is None or (state.draining, state.queued_tokens) < (best.draining, best.queued_tokens):
                best = state
        return best

    def _share(self, standing: Standing) -> FairShare | None:
        return self._shares.get(standing.service_class.name)

    def _pressure(self, name: str, now_s: float) -> float:
        pressure, at_s = self._pressures.get(name, (0.0, now_s))
        return pressure if now_s - at_s <= PRESSURE_HOLDS_S else 0.0

    def _charge(self, ticket: Ticket, tokens: int) -> None:
        """The tenant pays for ``tokens`` in all, for this request."""
        if (tenant := ticket.standing.tenant) is not None and (share := self._share(ticket.standing)) is not None:
            share.charge(tenant, tokens - ticket.charged_tokens)
            ticket.charged_tokens = tokens


def _smoothed(mean: float, value: int) -> float:
    """The mean with one more value; the first one begins it."""
    return mean + SMOOTHING * (value - mean) if mean else float(value)


def _plain(work: Iterable[QueuedWork]) -> list[dict[str, int]]:
    return [{"priority": one.priority, "requests": one.requests, "tokens": one.tokens} for one in work]
