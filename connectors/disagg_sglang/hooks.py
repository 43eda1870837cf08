"""Where SGLang calls us: every hook in one table; ``surface.py`` has each target's parameters, and is checked before.

Three of SGLang's interfaces are open to plugins: the list of backend names, overrides of named argument-resolution
steps, and ``HookRegistry``. The targets below go through the last; SGLang only logs a hook that it cannot apply.
"""

import enum
import multiprocessing
import pkgutil
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from disagg_sglang import BACKEND

if TYPE_CHECKING:
    from disagg_sglang.api_server import ApiServer
    from disagg_sglang.engine_side import EngineSide

_SCHEDULER_MODULE = "sglang.srt.managers.scheduler"
_SCHEDULER = f"{_SCHEDULER_MODULE}.Scheduler"
_PARTS = "sglang.srt.managers.scheduler_components"
_UTILS = "sglang.srt.disaggregation.utils"
_TOKENIZER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"

_side: "EngineSide | None" = None  # of this process's scheduler
_api: "ApiServer | None" = None  # of this process's HTTP server


class Hook(NamedTuple):
    """One place in SGLang.

    Attributes:
        kind: "before" (arguments), "after" (result, arguments), "around" (original, arguments), or "replace".
        ours: Name of the function below.
    """

    target: str
    kind: str
    ours: str


EVERYWHERE = (
    Hook("sglang.srt.server_args.ServerArgs.add_cli_args", "after", "add_flag"),
    Hook(f"{_UTILS}.TransferBackend", "replace", "extended_backends"),
    Hook(f"{_UTILS}.get_kv_class", "around", "kv_class"),
)
IN_API_SERVER = (
    Hook("sglang.srt.entrypoints.http_server._setup_and_run_http_server", "before", "http_server_starts"),
    Hook(f"{_TOKENIZER}._send_one_request", "around", "prompt_sent"),
    Hook(f"{_TOKENIZER}._send_batch_request", "around", "prompts_sent"),
    Hook(f"{_TOKENIZER}.collect_metrics", "after", "request_measured"),
)
IN_SCHEDULER = (
    Hook(f"{_SCHEDULER}.__init__", "after", "scheduler_made"),
    Hook(f"{_SCHEDULER}.ingest_requests", "after", "loop_turned"),
    Hook(f"{_SCHEDULER}._add_request_to_queue", "around", "request_queued"),
    Hook(f"{_SCHEDULER}._abort_on_queued_limit", "around", "queue_limited"),
    Hook(f"{_SCHEDULER}._release_aborted_request", "after", "request_dropped"),
    Hook(f"{_SCHEDULER}.abort_request", "before", "request_aborted"),
    Hook(f"{_SCHEDULER}.is_fully_idle", "after", "asked_if_idle"),
    Hook(f"{_SCHEDULER}.run_batch", "before", "batch_starts"),
    Hook(f"{_SCHEDULER}.flush_cache", "after", "cache_flushed"),
    Hook("sglang.srt.disaggregation.prefill.PrefillBootstrapQueue.create_sender", "after", "sender_made"),
    Hook(f"{_PARTS}.load_inquirer.SchedulerLoadInquirer.get_loads", "after", "loads_taken"),
    Hook(
        f"{_PARTS}.weight_updater.SchedulerWeightUpdaterManager.record_weight_version_after_update",
        "after",
        "weights_updated",
    ),
)
_RESOLUTION_STEP = "handle_pd_disaggregation"


def wanted_here() -> tuple[Hook, ...]:
    """The hooks of this process: a scheduler's child process has more, the detokenizer's none."""
    if multiprocessing.parent_process() is None:
        return EVERYWHERE + IN_API_SERVER
    return EVERYWHERE + IN_SCHEDULER if _SCHEDULER_MODULE in sys.modules else ()


def install() -> None:
    """Register everything of this process; ``SURFACE.check`` was None."""
    from sglang.srt.arg_groups import choices
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from disagg_sglang import launch

    if BACKEND not in choices.DISAGG_TRANSFER_BACKEND_CHOICES:
        choices.add_disagg_transfer_backend_choices([BACKEND])
        register_resolution_hook(_RESOLUTION_STEP)(launch.resolve)
    for hook in wanted_here():
        ours = globals()[hook.ours]
        HookRegistry.register(hook.target, ours() if hook.kind == "replace" else ours, HookType(hook.kind))


# -- every process -----------------------------------------------------------------------------------------------------


def add_flag(_result: None, parser: Any) -> None:
    from disagg_sglang import launch

    launch.add_flag(parser)


def extended_backends() -> Any:
    """SGLang's backends and ours; it has no open registry of them."""
    backends: Any = pkgutil.resolve_name(f"{_UTILS}.TransferBackend")
    members = {member.name: member.value for member in backends}
    return enum.Enum("TransferBackend", {**members, BACKEND.upper(): BACKEND}, module=_UTILS)


def kv_class(original: Callable[..., Any], transfer_backend: Any, class_type: Any) -> Any:
    if transfer_backend.value != BACKEND or class_type.value == "kvargs":
        return original(transfer_backend, class_type)
    from disagg_sglang import kv_backend

    return kv_backend.CLASSES.get(class_type.value)


# -- API process -------------------------------------------------------------------------------------------------------


def http_server_starts(server_args: Any, tokenizer_manager: Any, *_args: Any, **_kwargs: Any) -> None:
    global _api
    from disagg_sglang import api_server, launch

    if (role := launch.role_of(server_args)) is not None:
        from sglang.srt.arg_groups.overrides import resolving_view

        _api = api_server.set_up(
            launch.settings_for(role),
            resolving_view(server_args),
            is_ending=lambda: bool(tokenizer_manager.gracefully_exit),
        )


def prompt_sent(original: Callable[..., Any], manager: Any, tokenized_obj: Any) -> Any:
    if _api is not None:
        _api.sends(tokenized_obj)
    return original(manager, tokenized_obj)


def prompts_sent(original: Callable[..., Any], manager: Any, tokenized_objs: Any) -> Any:
    if _api is not None:
        for tokenized_obj in tokenized_objs:
            _api.sends(tokenized_obj)
    return original(manager, tokenized_objs)


def request_measured(_result: None, _manager: Any, state: Any, recv_obj: Any, i: int) -> None:
    if _api is not None and state.finished and recv_obj.finished_reasons[i] is not None:
        tokens = recv_obj.completion_tokens[i] if getattr(recv_obj, "completion_tokens", None) else 0
        _api.measured(recv_obj.rids[i], recv_obj.finished_reasons[i], state.time_stats, tokens)


# -- scheduler process -------------------------------------------------------------------------------------------------


def scheduler_made(_result: None, scheduler: Any, *_args: Any, **_kwargs: Any) -> None:
    global _side
    from disagg_sglang import launch

    if (role := launch.role_of(scheduler.server_args)) is not None:
        from disagg_sglang.engine_side import EngineSide

        _side = EngineSide(scheduler, launch.settings_for(role))


def loop_turned(_result: Any, *_args: Any, **_kwargs: Any) -> None:
    if _side is not None:
        _side.step()


def request_queued(original: Callable[..., Any], scheduler: Any, req: Any, is_retracted: bool = False) -> Any:
    if _side is not None and is_retracted:
        _side.retracted(req.rid)
    if _side is None or is_retracted or not _side.take(req, lambda: original(scheduler, req)):
        return original(scheduler, req, is_retracted)
    return None


def queue_limited(original: Callable[..., Any], scheduler: Any, recv_req: Any) -> Any:
    """As SGLang does it, but with the requests that we keep back in the count."""
    fill = _side.fill if _side is not None else None
    if fill is None or not fill.exceeds_queue_limit(recv_req):
        return fill is None and original(scheduler, recv_req)
    kept = scheduler.max_queued_requests, scheduler.enable_priority_scheduling
    scheduler.max_queued_requests = len(scheduler.waiting_queue)
    scheduler.enable_priority_scheduling = kept[1] and bool(scheduler.waiting_queue)  # it may drop one of these instead
    try:
        return original(scheduler, recv_req)
    finally:
        scheduler.max_queued_requests, scheduler.enable_priority_scheduling = kept


def request_dropped(_result: None, _scheduler: Any, req: Any) -> None:
    if _side is not None:
        _side.dropped(req)


def request_aborted(_scheduler: Any, recv_req: Any) -> None:
    if _side is not None:
        _side.aborted(recv_req.rid, everything=recv_req.abort_all)


def asked_if_idle(result: bool, _scheduler: Any, for_health_check: bool = False, **_kwargs: Any) -> bool:
    return result and (for_health_check or _side is None or not _side.holds_pages)


def batch_starts(_scheduler: Any, batch: Any, *_args: Any, **_kwargs: Any) -> None:
    if _side is not None:
        _side.batch_starts(batch)


def cache_flushed(result: bool, *_args: Any, **_kwargs: Any) -> None:
    if result and _side is not None and _side.export is not None:
        _side.export.cache_reset()


def sender_made(result: bool, _queue: Any, req: Any, *_args: Any, **_kwargs: Any) -> None:
    bind = getattr(req.disagg_kv_sender, "bind", None)  # health checks have SGLang's fake sender
    if result and bind is not None:
        bind(req)


def loads_taken(loads: Any, _inquirer: Any) -> None:
    """``/v1/loads``, its ZMQ and shared-memory forms: what waits for KV waits, as on SGLang's own decode servers."""
    fill = _side.fill if _side is not None else None
    if fill is not None:
        loads.num_waiting_reqs += fill.waiting + fill.receiving
        loads.disaggregation.mode = "decode"
        loads.disaggregation.decode_prealloc_queue_reqs = fill.waiting
        loads.disaggregation.decode_transfer_queue_reqs = fill.receiving


def weights_updated(*_args: Any, **_kwargs: Any) -> None:
    if _side is not None:
        _side.weights_updated()
