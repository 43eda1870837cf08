"""``/disagg/status`` and ``/disagg/drain``: an ASGI middleware, there only if the user asked for it.

GET    /disagg/status    this API server's figures, as JSON
POST   /disagg/drain     new requests are refused with 503 from now on, by all API servers; those under way go on.
                         A prefill engine takes no more prompts for others, and hands back what it has not begun
DELETE /disagg/drain     both are taken again
"""

import json
import secrets
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from disagg_plugin.admission.gate import Gate
from disagg_plugin.control.leaving import LeavingWord
from disagg_plugin.observability.frontend import Frontend

STATUS, DRAIN = "/disagg/status", "/disagg/drain"
METHODS = {STATUS: ("GET",), DRAIN: ("POST", "DELETE")}

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class AdminPaths:
    """Answers its two paths and passes everything else on."""

    def __init__(
        self,
        app: App,
        *,
        figures: Callable[[], Frontend | None],
        gate: Callable[[], Gate | None],
        word: Callable[[], LeavingWord | None] = lambda: None,
        keys: Callable[[Scope], Sequence[str]] = lambda _scope: (),
    ) -> None:
        """
        Args:
            figures, gate: Asked with every request: they may come later than the route.
            word: How a prefill engine's scheduler processes learn of it.
            keys: The server's keys, where it does not itself ask for one on every path.
        """
        self._app = app
        self._figures = figures
        self._gate = gate
        self._word = word
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", "")) if scope["type"] == "http" else ""
        if path not in METHODS:
            await self._app(scope, receive, send)
            return
        status, body = self._answer(scope, path)
        headers = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(body).encode()})

    def _answer(self, scope: Scope, path: str) -> tuple[int, dict[str, object]]:
        if scope["method"] not in METHODS[path]:
            return 405, {"error": f"{path} takes {' and '.join(METHODS[path])} only"}
        if not _authorized(scope, self._keys(scope)):
            return 401, {"error": "Unauthorized"}
        return self._drain(scope["method"] == "POST") if path == DRAIN else self._status()

    def _drain(self, draining: bool) -> tuple[int, dict[str, object]]:
        gate, word = self._gate(), self._word()
        if gate is None and word is None:
            problem = "nothing refuses requests here: qos.enable_early_rejection is off, or no request came yet"
            return 503, {"error": problem}
        if word is not None:
            (word.say if draining else word.take_back)()
        if gate is not None:
            gate.drain(draining)
        return 200, {"draining": draining}

    def _status(self) -> tuple[int, dict[str, object]]:
        figures = self._figures()
        if figures is None:
            return 503, {"error": "the engine has not started yet"}
        status, gate, word = figures.status(), self._gate(), self._word()
        if word is not None:
            status = {**status, "draining": word.stands}
        return 200, status if gate is None else {**status, "gate": gate.status()}


def _authorized(scope: Scope, keys: Sequence[str]) -> bool:
    """Any of the keys, as a bearer token."""
    if not keys:
        return True
    given = next((value for name, value in scope["headers"] if name.lower() == b"authorization"), b"")
    scheme, _, token = given.partition(b" ")
    matches = [secrets.compare_digest(token, key.encode()) for key in keys]
    return scheme.lower() == b"bearer" and any(matches)
