"""LMCache's own vLLM connector as a child of ours: made by vLLM's factory, and what of the engine it is shown.

The child is told less than the engine says, and in one place more, all through its public methods:

- a request as ``ShownRequest``: its salt names the LoRA adapter too, which LMCache's key leaves out;
- a step as ``shown_step``: without the requests that were withdrawn from it, and with the number of computed tokens
  that is true: KV over the wire counts, KV whose load failed does not.

Of the base class's methods, ``FORWARDED`` reach the child and ``NOT_FORWARDED`` do not, each for a reason; a test
compares both with the installed vLLM.
"""

import copy
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from disagg_plugin.cache_settings import LMCacheSettings
from disagg_plugin.errors import ConfigError
from disagg_plugin.lmcache_check import ignored_environment, require_installed, unreachable, unreachable_reason

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = logging.getLogger("vllm.disagg")

LORA_SALT = "disagg-lora:"

FORWARDED = frozenset(
    {
        *("get_num_new_matched_tokens", "update_state_after_alloc", "build_connector_meta", "update_connector_output"),
        *("request_finished", "take_events", "reset_cache", "bind_kv_cache_manager"),
        *("get_kv_connector_stats", "shutdown"),
        *("register_kv_caches", "bind_connector_metadata", "clear_connector_metadata", "start_load_kv"),
        *("wait_for_save", "get_transfer_results", "get_block_ids_with_load_errors", "handle_preemptions"),
        *("get_kv_connector_kv_cache_events", "get_required_kvcache_layout"),
        *("get_mem_pool_context", "set_host_xfer_buffer_ops", "finish_forward", "reset_capture_state"),
        *("unregister_kv_caches", "restore_kv_caches"),
    }
)
NOT_FORWARDED = {
    "bind_gpu_block_pool": "the child's own bind_kv_cache_manager calls it",
    "get_finished": "get_transfer_results asks for the same, and more",
    "wait_for_layer_load": "loads are asynchronous: a request runs after its whole load",
    "save_kv_layer": "only for lmcache.mp.transfer_intermediate_tensors, which the settings refuse",
    "build_connector_worker_meta": "only for lmcache.mp.lazy_offload, which the settings refuse",
    "has_pending_push_work": "only for lmcache.mp.lazy_offload, which the settings refuse",
    "has_pending_block_frees": "LMCache frees no blocks instead of a preemption",
    "on_new_request": "only for lmcache.mp.eager_prefetch, which the settings refuse: it has no deadline",
    "register_finished_partial_tail": "for caches of several groups, which we do not support",
    "get_loaded_kv_cache_group_ids": "for caches of several groups, which we do not support",
    "supports_divergent_local_hybrid_hits": "for caches of several groups, which we do not support",
    "requires_piecewise_for_cudagraph": "LMCache's needs it for per-layer work only, which the settings refuse",
    "get_handshake_metadata": "LMCache has none; ours says whether each rank has its child",
    "set_xfer_handshake_metadata": "LMCache has none",
    "set_xfer_handshake_metadata_pp_aware": "LMCache has none",
    "get_finished_count": "each rank reports each request once, whatever its parts",
    "get_external_cache_hit_sources": "the split is known here: LMCache is the host's, the wire is a peer's",
    "requires_kv_delivery": "ours says yes already",
    "build_kv_connector_stats": "the engine keeps one kind of stats a connector: ours; look-up times go into them",
    "build_prom_metrics": "as build_kv_connector_stats",
    "supports_sleep_mode": "the engine's default, yes: the child is told to unregister, and we are not active then",
    "has_connector_metadata": "about this object itself",
    "role": "about this object itself",
}


def create_child(
    vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig", settings: LMCacheSettings
) -> tuple[Any, str]:
    """LMCache's connector, connected to its server; or None, and why the engine goes on without.

    Raises:
        ConfigError: It is not installed, cannot serve this engine, or is not there and has to be.
    """
    require_installed()
    if ignored := ignored_environment():
        logger.warning("disagg: %s", ignored)
    if not (problem := unreachable_reason(settings)):
        config = child_config(vllm_config, settings)
        try:
            return child_class(config)(config, role, kv_cache_config), ""
        except ConnectionError as error:
            problem = str(error).splitlines()[0]
        except ValueError as error:
            block_size = vllm_config.cache_config.block_size
            raise ConfigError(f"cache.lmcache: {error}; this engine's --block-size is {block_size}") from error
    if settings.on_unreachable == "fail":
        raise unreachable(settings, problem)
    logger.warning("disagg: %s. It is not used until this engine restarts.", unreachable(settings, problem))
    return None, f"no LMCache server at {settings.url} ({problem})"


def child_config(vllm_config: "VllmConfig", settings: LMCacheSettings) -> "VllmConfig":
    """The engine's configuration as the child sees it: with its own ``kv_transfer_config``."""
    from vllm.config.kv_transfer import KVTransferConfig

    config = copy.copy(vllm_config)
    parent = vllm_config.kv_transfer_config
    config.kv_transfer_config = KVTransferConfig(
        kv_connector=settings.connector,
        kv_role="kv_both",
        engine_id=parent.engine_id if parent is not None else None,
        kv_connector_extra_config=dict(settings.connector_extra_config),
    )
    return config


def child_class(config: "VllmConfig") -> Any:
    """The class of the child, from vLLM's factory."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    assert config.kv_transfer_config is not None
    return KVConnectorFactory.get_connector_class(config.kv_transfer_config)


class Child:
    """The child behind a boundary: an exception of it would end the engine, so it is not called again after one.

    Attributes:
        problem: Why it is not used, or an empty text.
    """

    def __init__(self, connector: Any, problem: str) -> None:
        self._connector = connector
        self.problem = problem

    def call(self, method: str, *args: Any) -> Any:
        """Its answer; None while there is a problem."""
        if self.problem or self._connector is None:
            return None
        try:
            return getattr(self._connector, method)(*args)
        except Exception as error:  # noqa: BLE001  the boundary: see above
            self.stop(f"its connector failed in {method}: {type(error).__name__}: {error}", error)
            return None

    def stop(self, problem: str, error: Exception | None = None) -> None:
        """Do not use it any more, and say so, once."""
        if not self.problem:
            self.problem = problem
            logger.error("disagg: LMCache is not used any more: %s", problem, exc_info=error)

    def set_up(self, method: str, *args: Any) -> None:
        """A call at start, whatever else may still be missing."""
        if self._connector is not None:
            getattr(self._connector, method)(*args)

    def close(self) -> None:
        """Disconnect."""
        if self._connector is not None:
            self._connector.shutdown()


def salt_of(cache_salt: str, lora: str) -> str:
    """The salt under which LMCache keeps a prefix: equal only for equal salt and adapter, whatever a client sends."""
    if lora:
        return f"{LORA_SALT}{len(lora)}:{lora}:{cache_salt}"
    return f"{LORA_SALT}0::{cache_salt}" if cache_salt.startswith(LORA_SALT) else cache_salt


class ShownRequest:
    """A request as the child sees it; everything else is the engine's own."""

    def __init__(self, request: Any) -> None:
        self._request = request
        adapter = request.lora_request
        self.cache_salt = salt_of(request.cache_salt or "", adapter.lora_name if adapter is not None else "")
        self.kv_transfer_params = None  # a client's cached_token_stats is asserted on, also where nothing was asked

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


class _NoBlocks:
    """An allocation of nothing."""

    def get_block_ids(self) -> tuple[list[int], ...]:
        return ([],)


NO_BLOCKS = _NoBlocks()


def shown_step(output: "SchedulerOutput", told: dict[str, int]) -> "SchedulerOutput":
    """The step as the child sees it: only the requests in ``told``, with so many tokens computed in it."""
    shown = copy.copy(output)
    shown.num_scheduled_tokens = told
    shown.scheduled_new_reqs = [r for r in output.scheduled_new_reqs if r.req_id in told]
    cached = output.scheduled_cached_reqs
    at = [index for index, request_id in enumerate(cached.req_ids) if request_id in told]
    if len(at) < len(cached.req_ids):
        shown.scheduled_cached_reqs = replace(
            cached,
            req_ids=[cached.req_ids[i] for i in at],
            new_token_ids=[cached.new_token_ids[i] for i in at] if cached.new_token_ids else [],
            new_block_ids=[cached.new_block_ids[i] for i in at],
            num_computed_tokens=[cached.num_computed_tokens[i] for i in at],
            num_output_tokens=[cached.num_output_tokens[i] for i in at],
        )
    return shown


def can_be_looked_up(request: Any) -> bool:
    """Whether a prefix of the request's tokens names its KV, and the engine would use it."""
    return (
        request.prompt_token_ids is not None
        and not getattr(request, "skip_reading_prefix_cache", False)
        and not getattr(request, "resumable", False)
    )
