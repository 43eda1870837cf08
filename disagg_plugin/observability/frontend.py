"""The API server's half: joins finished requests with what the scheduler process noted about them; SLOs; admission.

    frontend.classify("cmpl-17", "high")                     # admission, when it knows a request's class
    frontend.note("cmpl-17", "offloaded", estimated_s)        # from the engine, before the request's first token is out
    frontend.finished("cmpl-17", ttft_s=..., ...)             # from the engine's own statistics
    frontend.refused("high", "ttft"); frontend.admitted("high"); frontend.degraded("low", "max_tokens")

Engine-neutral; every call takes microseconds and returns at once.
"""

import math
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, cast

from disagg_plugin.observability.deltas import Deltas, split_key
from disagg_plugin.observability.journal import FOR_DECODE
from disagg_plugin.observability.metrics import MetricSet
from disagg_plugin.observability.slo import PATHS, ClassReport, Path, Served, SloTarget, SloTracker

MAX_JOINED = 16_384  # requests that are waited for; the oldest go first
REFRESH_S = 1.0
DEFAULT_CLASS = "normal"

EngineStateListener = Callable[[int, Mapping[str, Any]], None]


class Frontend:
    """Figures about requests, as one API server sees them."""

    def __init__(
        self,
        metrics: MetricSet,
        *,
        model_name: str,
        objective: float = 0.95,
        clock: Callable[[], float] = time.monotonic,
        sees_all_stats: bool = True,
    ) -> None:
        """
        Args:
            sees_all_stats: False where several API servers share an engine: its notes reach only one of them, so a
                request without a note may have been prefilled anywhere.
        """
        self._metrics = metrics
        self._base = (model_name,)
        self._model_name = model_name
        self._clock = clock
        self._default_path: Path = "local" if sees_all_stats else "unknown"
        self._lock = threading.Lock()
        self._notes: OrderedDict[str, tuple[str, float | None]] = OrderedDict()
        self._classes: OrderedDict[str, str] = OrderedDict()
        self._refresh_due_s = float("-inf")
        self._engines: dict[int, Deltas] = {}
        self._admission: Counter[tuple[str, str, str]] = Counter()
        self._degraded: Counter[tuple[str, str]] = Counter()
        self.slo: SloTracker
        self.configure_slo({DEFAULT_CLASS: SloTarget()}, default_class=DEFAULT_CLASS, objective=objective)

    def configure_slo(self, targets: Mapping[str, SloTarget], *, default_class: str, objective: float = 0.95) -> None:
        """Set the classes; before the first request."""
        self.slo = SloTracker(targets, default_class=default_class, objective=objective, clock=self._clock)
        self._metrics.set("disagg_slo_objective_ratio", self._base, to=objective)
        for name, target in targets.items():
            for slo, limit_s in (("ttft", target.ttft_s), ("tpot", target.tpot_s), ("e2e", target.e2e_s)):
                if limit_s is not None:
                    self._metrics.set("disagg_slo_target_seconds", self._base, name, slo, to=limit_s)

    # -- about requests ----------------------------------------------------------------------------------------

    def classify(self, request_id: str, slo_class: str) -> None:
        """The class of a request, under the id that the client or the API server gave it."""
        with self._lock:
            _remember(self._classes, request_id, slo_class)

    def note(self, request_id: str, path: str, estimated_ttft_s: float | None) -> None:
        """Where a request is prefilled; a later note replaces the path and keeps no estimate of the earlier one."""
        with self._lock:
            _remember(self._notes, request_id, (path, estimated_ttft_s))

    def finished(self, request_id: str, *, ttft_s: float, tpot_s: float | None, e2e_s: float) -> None:
        """The request was served to its end."""
        slo_class, path, estimated_s = self._joined(request_id)
        if path == FOR_DECODE:
            return
        served = Served(self.slo.class_of(slo_class), cast("Path", path), ttft_s, tpot_s, e2e_s)
        verdict = self.slo.served(served)
        labels, metrics, base = (verdict.slo_class, path), self._metrics, self._base
        metrics.observe("disagg_ttft_seconds", base, *labels, value=ttft_s)
        metrics.observe("disagg_e2e_seconds", base, *labels, value=e2e_s)
        if tpot_s is not None:
            metrics.observe("disagg_tpot_seconds", base, *labels, value=tpot_s)
        metrics.count("disagg_slo_requests_total", base, *labels, "met" if verdict.met else "missed")
        for slo, met in (("ttft", verdict.ttft), ("tpot", verdict.tpot), ("e2e", verdict.e2e)):
            if met is False:
                metrics.count("disagg_slo_missed_total", base, *labels, slo)
        if estimated_s is not None and estimated_s > 0:
            metrics.observe("disagg_ttft_estimated_seconds", base, path, value=estimated_s)
            metrics.observe("disagg_ttft_estimate_ratio", base, path, value=ttft_s / estimated_s)

    def failed(self, request_id: str) -> None:
        """The request ended in an error of the engine: a miss."""
        slo_class, path, _ = self._joined(request_id)
        if path != FOR_DECODE:
            name = self.slo.failed(slo_class)
            self._metrics.count("disagg_slo_requests_total", self._base, name, path, "error")

    def aborted(self, request_id: str) -> None:
        """The client went away: neither met nor missed."""
        slo_class, path, _ = self._joined(request_id)
        if path != FOR_DECODE:
            self._metrics.count("disagg_slo_requests_total", self._base, self.slo.class_of(slo_class), path, "aborted")

    # -- about admission ---------------------------------------------------------------------------------------

    def admitted(self, slo_class: str | None, reason: str = "") -> None:
        self._admit(self.slo.class_of(slo_class), "admitted", reason)

    def refused(self, slo_class: str | None, reason: str) -> None:
        """A request was turned away; it counts as a miss in the second attainment figure."""
        name = self.slo.refused(slo_class)
        self._metrics.count("disagg_slo_requests_total", self._base, name, "none", "refused")
        self._admit(name, "refused", reason)

    def degraded(self, slo_class: str | None, step: str) -> None:
        name = self.slo.class_of(slo_class)
        self._degraded[name, step] += 1
        self._metrics.count("disagg_degradations_total", self._base, name, step)

    def degradation_level(self, slo_class: str, level: int) -> None:
        """How many steps are in force for a class."""
        self._metrics.set("disagg_degradation_level", self._base, self.slo.class_of(slo_class), to=level)

    def _admit(self, name: str, outcome: str, reason: str) -> None:
        self._admission[name, outcome, reason] += 1
        self._metrics.count("disagg_admission_total", self._base, name, outcome, reason)

    # -- from the engine ---------------------------------------------------------------------------------------

    def engine_said(self, deltas: Deltas, engine: int = 0) -> None:
        """Metrics of a scheduler process; notes are taken with ``note``."""
        self._metrics.apply(deltas, (self._model_name, str(engine)))
        total = self._engines.setdefault(engine, Deltas())
        deltas.data.pop("notes", None)
        total.merge(deltas)  # bounded: by series

    def refresh(self) -> None:
        """Bring the gauges of attainment, burn and quantiles up to date; at most once a second."""
        now_s = self._clock()
        if now_s < self._refresh_due_s:
            return
        self._refresh_due_s = now_s + REFRESH_S
        for name, report in self.slo.report().items():
            self._set_gauges(name, report)

    def _set_gauges(self, name: str, report: ClassReport) -> None:
        metrics, base = self._metrics, self._base
        for window, figures in report.windows.items():
            for refused, attained, burn in (
                ("excluded", figures.attainment, figures.burn_rate),
                ("missed", figures.attainment_with_refused, figures.burn_rate_with_refused),
            ):
                labels = (name, window, refused)
                metrics.set("disagg_slo_attainment_ratio", base, *labels, to=math.nan if attained is None else attained)
                metrics.set("disagg_slo_burn_rate", base, *labels, to=burn or 0.0)
        for path, whats in report.quantiles_s.items():
            for what, quantiles in whats.items():
                for quantile, value_s in quantiles.items():
                    labels4 = (name, path, what, str(quantile))
                    metrics.set("disagg_latency_quantile_seconds", base, *labels4, to=value_s)

    def status(self) -> dict[str, object]:
        """All of it as JSON values, for the admin route."""
        return {
            "model_name": self._model_name,
            "objective": self.slo.objective,
            "classes": {name: asdict(report) for name, report in self.slo.report().items()},
            "admission": [
                {"slo_class": name, "outcome": outcome, "reason": reason, "requests": n}
                for (name, outcome, reason), n in sorted(self._admission.items())
            ],
            "degradations": [
                {"slo_class": name, "step": step, "responses": n} for (name, step), n in sorted(self._degraded.items())
            ],
            "engines": {str(engine): _readable(deltas) for engine, deltas in sorted(self._engines.items())},
        }

    # -- inside ------------------------------------------------------------------------------------------------

    def _joined(self, request_id: str) -> tuple[str | None, str, float | None]:
        with self._lock:  # both stay: a request for several completions ends several times
            slo_class = self._classes.get(request_id)
            path, estimated_s = self._notes.get(request_id, (self._default_path, None))
        return slo_class, path if path in PATHS or path == FOR_DECODE else "unknown", estimated_s


def _remember(where: OrderedDict[str, Any], request_id: str, value: object) -> None:
    where[request_id] = value
    where.move_to_end(request_id)
    if len(where) > MAX_JOINED:
        where.popitem(last=False)


def _readable(deltas: Deltas) -> dict[str, object]:
    """``name{label,label}`` → value, for people."""

    def named(key: str) -> str:
        name, labels = split_key(key)
        return f"{name}{{{','.join(labels)}}}" if labels else name

    return {
        "counters": {named(key): value for key, value in sorted(deltas.counters.items())},
        "gauges": {named(key): value for key, value in sorted(deltas.gauges.items())},
        "engine_state": deltas.engine_state,
    }
