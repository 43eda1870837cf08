"""The KV connector that vLLM loads as ``disagg``: which calls we answer, and who answers them.

Of the base class's ~40 methods we override those below; the others keep the engine's defaults on purpose: loads and
saves are asynchronous and never per layer, so the two per-layer hooks do nothing, piecewise CUDA graphs are not
needed, and no cache layout is required (canonical KV does not depend on it). With ``cache.lmcache`` there is a child
connector; ``lmcache_tier`` says which calls reach it.

    scheduler process                                 worker, per step
    on_new_request                                    bind_connector_metadata
    get_num_new_matched_tokens    each step           start_load_kv                  apply commands, LMCache's loads
    update_state_after_alloc                          wait_for_save                  export, scatter, LMCache's saves
    build_connector_meta          commands down ────▶ get_finished, get_block_ids_with_load_errors
    update_connector_output       ◀──── reports up    build_connector_worker_meta
    request_finished
"""

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.v1.request import RequestStatus

from disagg_vllm.cli_flags import settle_failure_policy
from disagg_vllm.lmcache_child import child_class, child_config, create_child
from disagg_vllm.lmcache_tier import LMCacheScheduler, LMCacheWorker
from disagg_vllm.metadata import RankHandshake
from disagg_vllm.scheduler_side import SchedulerSide
from disagg_vllm.settings import settings_of
from disagg_vllm.stats import DisaggPromMetrics, build_stats
from disagg_vllm.worker_side import WorkerSide, any_commands

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent, KVConnectorKVEvents
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.metrics.cache_hit_source import CacheHitSource  # since 0.32
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger("vllm.disagg")

COMPLETED = frozenset({RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED})


class DisaggConnector(KVConnectorBase_V1):  # type: ignore[misc]  # vLLM is untyped to mypy here
    """Decode-first disaggregation for a stock vLLM engine."""

    def __init__(self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig") -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        log_with_vllm()
        if (changed := settle_failure_policy(self._kv_transfer_config)) and role is KVConnectorRole.SCHEDULER:
            logger.info("disagg: %s", changed)
        settings = settings_of(self._kv_transfer_config)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        lmcache = settings.cache.active_lmcache
        child, problem = create_child(vllm_config, role, kv_cache_config, lmcache) if lmcache else (None, "")
        if role is KVConnectorRole.SCHEDULER:
            block_size = vllm_config.cache_config.block_size
            tier = LMCacheScheduler(child, problem, lmcache, block_size=block_size) if lmcache else None
            self._scheduler = SchedulerSide(vllm_config, kv_cache_config, settings, tier)
        else:
            self._worker = WorkerSide(
                vllm_config, kv_cache_config, settings, LMCacheWorker(child, problem) if lmcache else None
            )

    # -- scheduler process -------------------------------------------------------------------------------------

    @property
    def scheduler(self) -> SchedulerSide:
        assert self._scheduler is not None, "a scheduler call on a worker's connector"
        return self._scheduler

    def bind_kv_cache_manager(self, kv_cache_manager: "KVCacheManager") -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        if self.scheduler.tier is not None:
            self.scheduler.tier.child.set_up("bind_kv_cache_manager", kv_cache_manager)

    def bind_gpu_block_pool(self, gpu_block_pool: "BlockPool") -> None:
        self.scheduler.bind_block_pool(gpu_block_pool)

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        self.scheduler.ranks_ready({rank: m for rank, m in metadata.items() if isinstance(m, RankHandshake)})

    def on_new_request(self, request: "Request") -> None:
        self.scheduler.on_new_request(request)

    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int | None, bool]:
        return self.scheduler.match(request, num_computed_tokens)

    def update_state_after_alloc(self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int) -> None:
        self.scheduler.allocated(request, blocks, num_external_tokens)

    def get_external_cache_hit_sources(
        self, request: "Request", num_external_tokens: int
    ) -> "dict[CacheHitSource, int]":
        return self.scheduler.hit_sources(request, num_external_tokens)

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> KVConnectorMetadata:
        return self.scheduler.build_commands(scheduler_output)

    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        self.scheduler.update(connector_output)

    def request_finished(self, request: "Request", block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        keeps_blocks = self.scheduler.finished(request, completed=request.status in COMPLETED)
        return keeps_blocks, self.scheduler.hand_over(request, block_ids) if keeps_blocks else None

    def has_pending_push_work(self) -> bool:
        return self.scheduler.needs_steps

    def has_pending_block_frees(self) -> bool:
        return self.scheduler.holds_blocks

    def take_events(self) -> "Iterable[KVCacheEvent]":
        tier = self.scheduler.tier
        return (tier.child.call("take_events") if tier is not None else None) or ()

    def reset_cache(self) -> bool | None:
        tier = self._scheduler.tier if self._scheduler is not None else None
        done: bool | None = tier.child.call("reset_cache") if tier is not None else super().reset_cache()
        return done

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """Only the scheduler's side sends any: the ranks' counters come to it with their reports."""
        return self._scheduler.stats() if self._scheduler is not None else None

    # -- API server --------------------------------------------------------------------------------------------

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        return build_stats(data)

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: "VllmConfig",
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics:
        return DisaggPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # -- worker ------------------------------------------------------------------------------------------------

    @property
    def worker(self) -> WorkerSide:
        assert self._worker is not None, "a worker call on a scheduler's connector"
        return self._worker

    def register_kv_caches(self, kv_caches: "dict[str, torch.Tensor]") -> None:
        self.worker.register(kv_caches)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return self.worker.handshake()

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        self.worker.bind(any_commands(connector_metadata))

    def clear_connector_metadata(self) -> None:
        super().clear_connector_metadata()
        self.worker.unbind()

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        self.worker.preempt(any_commands(kv_connector_metadata))

    def start_load_kv(self, forward_context: "ForwardContext", **kwargs: Any) -> None:
        self.worker.begin_step(any_commands(self._connector_metadata), forward_context)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: the engine runs a request only after its whole load."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing per layer: a step's chunk is exported whole in ``wait_for_save``."""

    def wait_for_save(self) -> None:
        self.worker.end_step(any_commands(self._connector_metadata))

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return self.worker.completions(any_commands(self._connector_metadata))

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self.worker.take_invalid_block_ids()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        return self.worker.report(any_commands(self._connector_metadata).number)

    def get_kv_connector_kv_cache_events(self) -> "KVConnectorKVEvents | None":
        return self._of_child("get_kv_connector_kv_cache_events")

    def get_mem_pool_context(self) -> "AbstractContextManager[Any] | None":
        context: AbstractContextManager[Any] | None = self._of_child("get_mem_pool_context")
        return context

    def set_host_xfer_buffer_ops(self, copy_operation: Any) -> None:
        self._of_child("set_host_xfer_buffer_ops", copy_operation)

    def finish_forward(self) -> None:
        self._of_child("finish_forward")

    def reset_capture_state(self) -> None:
        self._of_child("reset_capture_state")

    def unregister_kv_caches(self) -> None:
        self._of_child("unregister_kv_caches")  # we have none: an engine that can sleep does not use us

    def restore_kv_caches(self) -> None:
        self._of_child("restore_kv_caches")

    def _of_child(self, method: str, *args: Any) -> Any:
        """What only LMCache has an answer to; None without it."""
        tier = self._worker.tier if self._worker is not None else None
        return tier.child.call(method, *args) if tier is not None else None

    # -- before there is one -----------------------------------------------------------------------------------

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: "VllmConfig") -> str | None:
        lmcache = settings_of(vllm_config.kv_transfer_config).cache.active_lmcache
        if lmcache is None:
            return None
        config = child_config(vllm_config, lmcache)
        layout: str | None = child_class(config).get_required_kvcache_layout(config)
        return layout

    # -- both --------------------------------------------------------------------------------------------------

    def shutdown(self) -> None:
        for side in self._sides():
            side.close()

    def _sides(self) -> Iterable[SchedulerSide | WorkerSide]:
        return [side for side in (self._scheduler, self._worker) if side is not None]


def log_with_vllm() -> None:
    """Let the core's log lines go where vLLM's go; it configures no logger but its own."""
    core, engine = logging.getLogger("disagg_plugin"), logging.getLogger("vllm")
    if not core.handlers:
        core.handlers = list(engine.handlers)
        core.setLevel(engine.level)
        core.propagate = not engine.handlers
