"""How figures get from vLLM's scheduler process to its API server, and onto its /metrics.

    scheduler process                         API server (each of them)
    SchedulerSide.stats() -> DisaggStats ───▶ DisaggStatLogger.record   notes on requests, finished requests
      (one dict with the engine's outputs)    DisaggPromMetrics.observe  counters, gauges; engine_state → listeners

vLLM hands a step's statistics to exactly one API server, so counters add up over their processes (prometheus_client's
multi-process mode) and a gauge is that of whoever heard last. An exception in here would end vLLM's output handler,
and every request with it: each entry point has a boundary.
"""

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from disagg_plugin.boundary import guarded
from disagg_plugin.errors import ConfigError
from disagg_plugin.observability.deltas import Deltas
from disagg_plugin.observability.frontend import EngineStateListener, Frontend
from disagg_plugin.observability.metrics import Instrument, Kind, MetricSet, make_instrument
from disagg_plugin.observability.settings import ObservabilitySettings
from disagg_vllm import CONNECTOR_NAMES
from disagg_vllm.settings import settings_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.disagg")

_CHILD = re.compile(r"\d+_")  # one of several completions of a request
_RANDOM = re.compile(r"-[0-9a-f]{8}$")


@dataclass
class DisaggStats(KVConnectorStats):  # type: ignore[misc]  # vLLM is untyped here
    """``Deltas`` in vLLM's envelope."""

    @property
    def deltas(self) -> Deltas:
        return Deltas(self.data)

    def reset(self) -> None:
        self.data.clear()

    def aggregate(self, other: KVConnectorStats) -> "DisaggStats":
        self.deltas.merge(Deltas(other.data))
        return self

    def reduce(self) -> dict[str, int | float]:
        """The line that vLLM logs every ten seconds."""
        totals: dict[str, float] = {}
        for key, by in self.deltas.counters.items():
            name = key.partition("\x1f")[0]
            totals[name] = totals.get(name, 0) + by
        return {
            "decisions": int(totals.get("disagg_decisions_total", 0)),
            "fallbacks": int(totals.get("disagg_fallbacks_total", 0)),
            "chunks": int(totals.get("disagg_chunks_total", 0)),
            "wire MB": round(totals.get("disagg_transfer_wire_bytes_total", 0) / 1e6, 3),
        }

    def is_empty(self) -> bool:
        return self.deltas.is_empty


def build_stats(data: dict[str, Any] | None) -> DisaggStats:
    """Stats that own their data: vLLM accumulates into them, while others still read what was sent."""
    stats = DisaggStats()
    if data is not None:
        stats.deltas.merge(Deltas(data))
    return stats


# -- the API server's side -----------------------------------------------------------------------------------------

_PROMETHEUS: Mapping[Kind, Callable[..., Instrument]] = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}
_metric_set: MetricSet | None = None  # instruments can be registered once a process
_frontend: Frontend | None = None
_listeners: list[EngineStateListener] = []


def frontend() -> Frontend | None:
    """The figures of this API server; None in other processes, and before its engine client exists."""
    return _frontend


def on_engine_state(callback: EngineStateListener) -> Callable[[], None]:
    """Call ``callback(engine index, state)`` in this API server for each state its engines send; undone by the answer.

    It runs on the event loop, between two batches of tokens: it must return within microseconds.
    """
    _listeners.append(callback)

    def stop() -> None:
        if callback in _listeners:
            _listeners.remove(callback)

    return stop


def make_frontend(
    vllm_config: "VllmConfig", classes: Mapping[Kind, Callable[..., Instrument]] = _PROMETHEUS
) -> Frontend:
    """This API server's ``Frontend``; the first call makes it, the instruments of the first call stay."""
    global _metric_set, _frontend
    if _frontend is None:
        if _metric_set is None:
            _metric_set = MetricSet(lambda metric: make_instrument(metric, classes))
        parallel = vllm_config.parallel_config
        _frontend = Frontend(
            _metric_set,
            model_name=str(vllm_config.model_config.served_model_name),
            objective=_observability(vllm_config).slo_objective,
            sees_all_stats=getattr(parallel, "_api_process_count", 1) == 1,
        )
    return _frontend


def _observability(vllm_config: "VllmConfig") -> ObservabilitySettings:
    """The settings' section; the defaults where they cannot be read, which the engine core says, and does not start."""
    try:
        return settings_of(vllm_config.kv_transfer_config).observability
    except ConfigError:
        return ObservabilitySettings()


def find_ours(stats: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Our part of an engine's connector statistics: all of it, or a MultiConnector's part of our class name."""
    if not stats:
        return []
    nested = [stats[name] for name in CONNECTOR_NAMES if isinstance(stats.get(name), dict)]
    return nested or [dict(stats)]


def external_ids(internal_id: str, *, randomized: bool = True) -> tuple[str, ...]:
    """The ids under which the API server may know a request of the scheduler: vLLM appends eight random characters."""
    name = _RANDOM.sub("", internal_id) if randomized else internal_id
    child = _CHILD.match(name)
    return (name, name[child.end() :]) if child else (name,)


class DisaggPromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]  # vLLM is untyped here
    """Puts what the engines send onto /metrics, and tells the listeners."""

    def __init__(
        self,
        vllm_config: "VllmConfig",
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        classes: Mapping[Kind, Callable[..., Instrument]] = {
            "counter": metric_types[Counter],
            "gauge": metric_types[Gauge],
            "histogram": metric_types[Histogram],
        }
        self._frontend = make_frontend(vllm_config, classes)

    @guarded
    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        deltas = build_stats(transfer_stats_data).deltas
        self._frontend.engine_said(deltas, engine_idx)
        if (state := deltas.engine_state) is not None:
            for listener in _listeners:
                _tell(listener, engine_idx, state)


@guarded
def _tell(listener: EngineStateListener, engine: int, state: Mapping[str, Any]) -> None:
    listener(engine, state)
