"""Where SGLang calls us: every hook in one table, each target checked for existence and signature before it is used.

Three of SGLang's interfaces are open to plugins: the list of backend names, overrides of named argument-resolution
steps, and ``HookRegistry``. The targets below go through the last; SGLang only logs a hook that it cannot apply, so
``find_unexpected`` is asked first.
"""

import enum
import inspect
import multiprocessing
import pkgutil
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from disagg_sglang import BACKEND

_SCHEDULER_MODULE = "sglang.srt.managers.scheduler"
_SCHEDULER = f"{_SCHEDULER_MODULE}.Scheduler"
_UTILS = "sglang.srt.disaggregation.utils"


class Hook(NamedTuple):
    """One place in SGLang.

    Attributes:
        kind: "before" (arguments), "after" (result, arguments), "around" (original, arguments), or "replace".
        parameters: Of the target, by name and in order; None for a class.
        ours: Name of the function below.
    """

    target: str
    kind: str
    parameters: tuple[str, ...] | None
    ours: str


EVERYWHERE = (
    Hook("sglang.srt.server_args.ServerArgs.add_cli_args", "after", ("parser",), "add_flag"),
    Hook(f"{_UTILS}.TransferBackend", "replace", None, "extended_backends"),
    Hook(f"{_UTILS}.get_kv_class", "around", ("transfer_backend", "class_type"), "kv_class"),
)
IN_SCHEDULER = (
    Hook(f"{_SCHEDULER}.__init__", "after", ("self", "server_args", "port_args"), "scheduler_made"),
    Hook(f"{_SCHEDULER}.ingest_requests", "after", ("self", "stop_at_pause"), "loop_turned"),
    Hook(f"{_SCHEDULER}._add_request_to_queue", "around", ("self", "req", "is_retracted"), "request_queued"),
    Hook(f"{_SCHEDULER}.abort_request", "before", ("self", "recv_req"), "request_aborted"),
    Hook(f"{_SCHEDULER}.is_fully_idle", "after", ("self", "for_health_check", "ignore_waiting"), "asked_if_idle"),
    Hook(f"{_SCHEDULER}.run_batch", "before", ("self", "batch", "pp_proxy_tensors"), "batch_starts"),
    Hook(f"{_SCHEDULER}.flush_cache", "after", ("self", "empty_cache"), "cache_flushed"),
    Hook(
        "sglang.srt.disaggregation.prefill.PrefillBootstrapQueue.create_sender",
        "after",
        ("self", "req", "num_kv_heads"),
        "sender_made",
    ),
)
_RESOLUTION_STEP = "handle_pd_disaggregation"


def wanted_here() -> tuple[Hook, ...]:
    """The hooks of this process: a scheduler's child process has more, the detokenizer's none."""
    if multiprocessing.parent_process() is None:
        return EVERYWHERE
    return EVERYWHERE + IN_SCHEDULER if _SCHEDULER_MODULE in sys.modules else ()


def find_unexpected() -> str | None:
    """What of this SGLang is not as in the tested one, or None."""
    try:
        from sglang.srt.arg_groups.choices import add_disagg_transfer_backend_choices  # noqa: F401
        from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view
        from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook  # noqa: F401
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType  # noqa: F401
    except ImportError as error:
        return str(error)
    for function, expected in ((declare_resolution, "server_args"), (resolving_view, "server_args")):
        if next(iter(inspect.signature(function).parameters), "") != expected:
            return f"{function.__name__} takes other parameters than ({expected}, ...)"
    return next((problem for problem in map(mismatch, wanted_here()) if problem), None)


def mismatch(hook: Hook) -> str | None:
    """Why this hook cannot be applied to this SGLang, or None."""
    try:
        target = pkgutil.resolve_name(hook.target)
    except (ImportError, AttributeError) as error:
        return f"{hook.target}: {error}"
    if hook.parameters is None:
        return None if inspect.isclass(target) and issubclass(target, enum.Enum) else f"{hook.target} is no enum"
    found = tuple(inspect.signature(target).parameters)
    return None if found == hook.parameters else f"{hook.target} takes {found}, not {hook.parameters}"


def install() -> None:
    """Register everything of this process; ``find_unexpected`` was None."""
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


# -- scheduler process -------------------------------------------------------------------------------------------------


def scheduler_made(_result: None, scheduler: Any, *_args: Any, **_kwargs: Any) -> None:
    from disagg_sglang import launch

    scheduler.disagg = None
    if (role := launch.role_of(scheduler.server_args)) is not None:
        from disagg_sglang.engine_side import EngineSide

        scheduler.disagg = EngineSide(scheduler, launch.settings_for(role))


def loop_turned(_result: Any, scheduler: Any, *_args: Any, **_kwargs: Any) -> None:
    if scheduler.disagg is not None:
        scheduler.disagg.step()


def request_queued(original: Callable[..., Any], scheduler: Any, req: Any, is_retracted: bool = False) -> Any:
    side = scheduler.disagg
    if side is None or side.fill is None or is_retracted:
        return original(scheduler, req, is_retracted)
    if not side.fill.take(req, lambda: original(scheduler, req)):
        return original(scheduler, req)
    return None


def request_aborted(scheduler: Any, recv_req: Any) -> None:
    if scheduler.disagg is not None and scheduler.disagg.fill is not None:
        scheduler.disagg.fill.abort(recv_req.rid, everything=recv_req.abort_all)


def asked_if_idle(result: bool, scheduler: Any, for_health_check: bool = False, **_kwargs: Any) -> bool:
    if for_health_check or scheduler.disagg is None:
        return result
    return result and not scheduler.disagg.holds_pages


def batch_starts(scheduler: Any, batch: Any, *_args: Any, **_kwargs: Any) -> None:
    if scheduler.disagg is not None:
        scheduler.disagg.batch_starts(batch)


def cache_flushed(result: bool, scheduler: Any, *_args: Any, **_kwargs: Any) -> None:
    if result and scheduler.disagg is not None and scheduler.disagg.export is not None:
        scheduler.disagg.export.cache_reset()


def sender_made(result: bool, _queue: Any, req: Any, *_args: Any, **_kwargs: Any) -> None:
    bind = getattr(req.disagg_kv_sender, "bind", None)  # health checks have SGLang's fake sender
    if result and bind is not None:
        bind(req)
