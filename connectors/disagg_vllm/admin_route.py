"""``/disagg/status`` and ``/disagg/drain``: an ASGI middleware, there only if the user asked for it.

    GET    /disagg/status    this API server's figures, as JSON
    POST   /disagg/drain     new requests are refused with 503 from now on, by all API servers; those under way go on
    DELETE /disagg/drain     they are taken again

vLLM's own authentication guards its API paths only, so these routes ask for the key themselves where the server has
one.
"""

import json
import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from disagg_plugin.admission.gate import Gate
from disagg_plugin.config import DisaggSettings
from disagg_plugin.observability.frontend import Frontend

STATUS, DRAIN = "/disagg/status", "/disagg/drain"
METHODS = {STATUS: ("GET",), DRAIN: ("POST", "DELETE")}
MIDDLEWARE = "disagg_vllm.admin_route.AdminRoute"

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
App = Callable[[Scope, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]


def wanted_middleware(settings: DisaggSettings) -> tuple[str, ...]:
    """What belongs among the API server's middlewares, under vLLM's ``--middleware``."""
    return (MIDDLEWARE,) if settings.observability.admin_route else ()


class AdminRoute:
    """Answers its two paths and passes everything else on."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(
        self,
        scope: Scope,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", "")) if scope["type"] == "http" else ""
        if path not in METHODS:
            await self._app(scope, receive, send)
            return
        status, body = _answer(scope, path)
        headers = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(body).encode()})


def _answer(scope: Scope, path: str) -> tuple[int, dict[str, object]]:
    if scope["method"] not in METHODS[path]:
        return 405, {"error": f"{path} takes {' and '.join(METHODS[path])} only"}
    if not _authorized(scope):
        return 401, {"error": "Unauthorized"}
    return _drain(scope["method"] == "POST") if path == DRAIN else _status()


def _drain(draining: bool) -> tuple[int, dict[str, object]]:
    gate = _gate()
    if gate is None:
        return 503, {
            "error": "nothing refuses requests here: qos.enable_early_rejection is off, or no request came yet"
        }
    gate.drain(draining)
    return 200, {"draining": draining}


def _status() -> tuple[int, dict[str, object]]:
    figures = _frontend()
    if figures is None:
        return 503, {"error": "the engine has not started yet"}
    status, gate = figures.status(), _gate()
    return 200, status if gate is None else {**status, "gate": gate.status()}


def _frontend() -> Frontend | None:
    from disagg_vllm.stats import frontend

    return frontend()


def _gate() -> Gate | None:
    from disagg_vllm.admission import gate

    return gate()


def _authorized(scope: Scope) -> bool:
    """As for vLLM's API: any of the server's keys, as a bearer token."""
    keys = _keys(scope)
    if not keys:
        return True
    given = next((value for name, value in scope["headers"] if name.lower() == b"authorization"), b"")
    scheme, _, token = given.partition(b" ")
    matches = [secrets.compare_digest(token, key.encode()) for key in keys]
    return scheme.lower() == b"bearer" and any(matches)


def _keys(scope: Scope) -> list[str]:
    state = getattr(scope.get("app"), "state", None)
    keys = getattr(getattr(state, "args", None), "api_key", None) or os.environ.get("VLLM_API_KEY")
    return [key for key in ([keys] if isinstance(keys, str) else list(keys or ())) if key]
