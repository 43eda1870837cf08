"""Admission in vLLM's API servers: how the gate gets in front of the engine, and to the point where it queues.

    parse      cli_flags → prepare(namespace): middleware, scheduling policy, board       once, in the main process
    request    EarlyRejection → AdmissionMiddleware → ... → AsyncLLM._add_request → exact
    report     stats.on_engine_state → Gate.update

``AsyncLLM._add_request`` is vLLM's private method: where it is not as expected, the first stage works alone, and a
line says so once. It sees the prompt's token ids in the request's own task, right before they are queued.
"""

import functools
import inspect
import logging
import os
import tempfile
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

from disagg_plugin.admission.board import create_board
from disagg_plugin.admission.classes import ClassBook
from disagg_plugin.admission.gate import Gate
from disagg_plugin.admission.middleware import AdmissionMiddleware, App, Receive, Scope, Send, current_ticket
from disagg_plugin.admission.site import Site
from disagg_plugin.config import DisaggSettings
from disagg_vllm.settings import settings_of
from disagg_vllm.support import ROUTING_KEY

logger = logging.getLogger("vllm.disagg")

MIDDLEWARE = "disagg_vllm.admission.EarlyRejection"
BOARD_ENV = "DISAGG_ADMISSION_BOARD"
_MARK = "_disagg_exact"
_POLICY_FLAG = "--scheduling-policy"


def prepare(namespace: Any, settings: DisaggSettings, args: Sequence[str]) -> None:
    """Arrange for admission in what the command line was parsed to, if the settings ask for it; idempotent.

    Args:
        args: The command line, to tell a chosen scheduling policy from the default.

    Raises:
        ConfigError: An API key of the settings cannot be read.
    """
    if not settings.qos.enable_early_rejection or not hasattr(namespace, "middleware"):
        return
    ClassBook(settings.qos)
    if _rust_frontend():
        logger.warning(
            "disagg: qos.enable_early_rejection has no effect: VLLM_USE_RUST_FRONTEND bypasses middlewares; "
            "only vLLM's own --max-num-queued-reqs and --max-num-queued-tokens limit the queue"
        )
        return
    if MIDDLEWARE not in (namespace.middleware or []):
        namespace.middleware = [*(namespace.middleware or []), MIDDLEWARE]
    if not any(argument.partition("=")[0].replace("_", "-") == _POLICY_FLAG for argument in args):
        namespace.scheduling_policy = "priority"
    if BOARD_ENV not in os.environ:
        os.environ[BOARD_ENV] = str(_make_board())


class EarlyRejection:
    """vLLM's ``--middleware``: makes the gate with the first request, when the engine's client is there."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._guarded: App | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._guarded is None:
            if scope["type"] != "http":
                await self._app(scope, receive, send)
                return
            self._guarded = _guard(self._app, scope)
        await self._guarded(scope, receive, send)


def gate() -> Gate | None:
    """This API server's gate, with what the other ones just said, once it had a request; None in other processes."""
    if _site is None:
        return None
    _site.sync()
    _site.sync_soon()  # what the caller does to it, as draining, is told as well
    return _site.gate


_site: Site | None = None


def _guard(app: App, scope: Scope) -> App:
    """The middleware proper, or the app as it is where the gate cannot be made: requests are served either way."""
    global _site
    try:
        client = scope["app"].state.engine_client
        config = client.vllm_config
        if _site is None:
            _site = _make_site(config)
            _site.gate.has_exact = _site.gate.settings.exact_check and patch_add_request(type(client))
    except Exception:  # vLLM's own objects are looked into here: whatever has moved there, requests are served
        logger.exception("disagg: early rejection is not active: no gate can be made; every request is admitted")
        return app
    site = _site
    guarded = AdmissionMiddleware(app, site.gate, sets_priority=lambda: site.by_priority)

    async def synced(scope: Scope, receive: Receive, send: Send) -> None:
        site.sync()
        site.sync_soon()
        try:
            await guarded(scope, receive, send)
        finally:
            site.sync_soon()

    return synced


def _make_site(config: Any) -> Site:
    from disagg_vllm.stats import frontend, on_engine_state

    site = Site(
        settings_of(config.kv_transfer_config),
        by_priority=config.scheduler_config.policy == "priority",
        caches_prefixes=config.cache_config.enable_prefix_caching,
        board=Path(os.environ[BOARD_ENV]) if getattr(config.parallel_config, "_api_process_count", 1) > 1 else None,
    )
    on_engine_state(site.heard)
    if (figures := frontend()) is not None:
        site.observe(figures)
    site.say()
    return site


# -- the second stage ----------------------------------------------------------------------------------------------


def patch_add_request(client: Any) -> bool:
    """Ask the gate again where the engine's client queues a request; whether this vLLM has that point."""
    original = getattr(client, "_add_request", None)
    if hasattr(original, _MARK):
        return True
    expected = ["self", "request", "prompt", "parent_req", "index", "queue"]
    if not inspect.iscoroutinefunction(original) or list(inspect.signature(original).parameters) != expected:
        logger.warning("disagg: this vLLM has no AsyncLLM._add_request as expected: requests are checked once, early")
        return False

    @functools.wraps(original)
    async def add_request(self: Any, request: Any, prompt: Any, parent_req: Any, index: Any, queue: Any) -> Any:
        if parent_req is None:
            _check_exactly(request)
        return await original(self, request, prompt, parent_req, index, queue)

    setattr(add_request, _MARK, True)
    client._add_request = add_request
    return True


def _check_exactly(request: Any) -> None:
    """Let the request through, or raise what vLLM answers with; the middleware puts our answer in its place."""
    ticket, site = current_ticket.get(), _site
    token_ids = getattr(request, "prompt_token_ids", None)
    if ticket is None or site is None or token_ids is None:
        return
    lora = request.lora_request.lora_name if request.lora_request is not None else ""
    refusal = site.exact(ticket, request.request_id, token_ids, salt=request.cache_salt or "", lora=lora)
    if refusal is not None:
        raise _refused(refusal.answer.reason, unavailable=refusal.answer.unavailable)
    if site.by_priority:
        request.priority = ticket.service_class.priority
    _classify(request, ticket.service_class.name)
    if (routing := ticket.routing) is not None and request.sampling_params is not None:
        extra = request.sampling_params.extra_args or {}
        request.sampling_params.extra_args = {**extra, ROUTING_KEY: routing}


def _classify(request: Any, service_class: str) -> None:
    from disagg_vllm.stats import frontend

    if (figures := frontend()) is not None:
        figures.classify(str(getattr(request, "external_req_id", None) or request.request_id), service_class)


def _refused(reason: str, *, unavailable: bool) -> Exception:
    from vllm import exceptions

    kind = getattr(exceptions, "GracefulHTTPError", None)
    status = HTTPStatus.SERVICE_UNAVAILABLE if unavailable else HTTPStatus.TOO_MANY_REQUESTS
    return kind(f"overloaded ({reason})", status) if kind is not None else ValueError(f"overloaded ({reason})")


def _rust_frontend() -> bool:
    import vllm.envs as envs

    return bool(getattr(envs, "VLLM_USE_RUST_FRONTEND", False))


def _make_board() -> Path:
    """In shared memory where there is some; removed with the process that made it."""
    import atexit

    memory = Path("/dev/shm")
    folder = memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    path = folder / f"disagg-admission-{os.getpid()}-{os.urandom(4).hex()}"
    create_board(path)
    maker = os.getpid()

    def remove() -> None:
        if os.getpid() == maker:  # forked children end as well
            path.unlink(missing_ok=True)

    atexit.register(remove)
    return path
