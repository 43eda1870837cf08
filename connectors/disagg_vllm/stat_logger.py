"""vLLM's stat-logger plugin (entry point ``vllm.stat_logger_plugins``): requests as the API server sees them end.

vLLM loads it wherever the package is installed; without the connector in the engine's config, or where ``surface`` does
not fit, it does nothing.
"""

from typing import TYPE_CHECKING

from vllm import __version__ as vllm_version
from vllm.v1.metrics.loggers import StatLoggerBase

from disagg_plugin.boundary import guarded
from disagg_plugin.observability.deltas import Deltas
from disagg_plugin.observability.frontend import Frontend
from disagg_vllm.settings import names_disagg
from disagg_vllm.surface import SURFACE

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.stats import FinishedRequestStats, IterationStats, MultiModalCacheStats, SchedulerStats

_SERVED = frozenset({"stop", "length", "repetition"})


class _Bystander(StatLoggerBase):  # type: ignore[misc]  # vLLM is untyped here
    """For a vLLM that does not fit: whatever it asks or adds, nothing happens."""

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        """Nothing is kept."""

    def record(self, *_args: object, **_kwargs: object) -> None:
        """Nothing is recorded."""

    log = log_engine_initialized = record


_Bystander.__abstractmethods__ = frozenset()


class _Figures(StatLoggerBase):  # type: ignore[misc]  # vLLM is untyped here
    """Of one engine (DP rank), in each API server."""

    def __init__(self, vllm_config: "VllmConfig", engine_index: int = 0) -> None:
        self._frontend: Frontend | None = None
        if names_disagg(vllm_config):
            from disagg_vllm import stats

            self._stats, self._frontend = stats, stats.make_frontend(vllm_config)
            self._randomized = not _ids_stay()

    def log_engine_initialized(self) -> None:
        """Nothing to say: the connector has said it."""

    @guarded
    def record(
        self,
        scheduler_stats: "SchedulerStats | None",
        iteration_stats: "IterationStats | None",
        mm_cache_stats: "MultiModalCacheStats | None" = None,
        engine_idx: int = 0,
    ) -> None:
        """After every step whose outputs came here; vLLM's own Prometheus logger is called after us."""
        if (frontend := self._frontend) is None:
            return
        if scheduler_stats is not None:
            for ours in self._stats.find_ours(getattr(scheduler_stats, "kv_connector_stats", None)):
                for request_id, (path, estimated_s) in Deltas(ours).notes():
                    for name in self._stats.external_ids(request_id, randomized=self._randomized):
                        frontend.note(name, path, estimated_s)
        if iteration_stats is not None:
            for finished in iteration_stats.finished_requests:
                _tell(frontend, finished)
        frontend.refresh()

    @guarded
    def log(self) -> None:
        """Every ten seconds, also while nothing happens: windows move on."""
        if self._frontend is not None:
            self._frontend.refresh()


def _tell(frontend: Frontend, finished: "FinishedRequestStats") -> None:
    request_id = str(getattr(finished, "request_id", None) or "")
    tokens = finished.num_generation_tokens
    reason = str(finished.finish_reason)
    if reason == "error":
        frontend.failed(request_id)
        return
    if reason not in _SERVED or tokens == 0:
        frontend.aborted(request_id)
        return
    frontend.finished(
        request_id,
        # vLLM keeps no TTFT here; the last token's way to the API server took about as long as the first one's
        ttft_s=max(0.0, finished.e2e_latency - finished.decode_time),
        tpot_s=finished.mean_time_per_output_token if tokens > 1 else None,
        e2e_s=finished.e2e_latency,
    )


def _ids_stay() -> bool:
    import vllm.envs as envs

    return bool(getattr(envs, "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", False))


DisaggStatLogger: type[StatLoggerBase] = _Figures if SURFACE.check(vllm_version) is None else _Bystander
