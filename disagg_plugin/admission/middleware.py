"""The first stage as ASGI middleware: no framework, no second task, nothing between the engine and a stream.

The body is read whole, as the engine would, looked at in bounded time (``body``), and handed on: as it came, or with a
few fields set. Whatever cannot be understood goes through untouched, for the engine to answer. A response is passed
on chunk by chunk; only its start gets a header where the request was degraded.

``current_ticket`` leads the second stage, deep in the engine's code but in the same task, to the request's ticket.
"""

import re
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from typing import Any

import msgspec

from disagg_plugin.admission.body import BodyFacts, facts_of, with_fields
from disagg_plugin.admission.classes import UnknownClass
from disagg_plugin.admission.gate import Gate, Refusal, Ticket

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

ROUTES = {  # and the fields that limit a response's length there; the engine looks at the later one first
    "/v1/completions": ("max_tokens",),
    "/v1/chat/completions": ("max_tokens", "max_completion_tokens"),
    "/v1/messages": ("max_tokens",),
    "/v1/responses": ("max_output_tokens",),
    "/inference/v1/generate": (),  # vLLM
    "/generate": (),  # SGLang
}
HUGE_BYTES = 256 << 10  # to set a field, a body is copied; of one so long, the second stage sets the priority
DEGRADED_HEADER = b"x-disagg-degraded"
_USAGE_TAIL_BYTES = 4096
_USAGE = {
    name: re.compile(rb'"' + name + rb'"\s*:\s*(\d+)')
    for name in (b"prompt_tokens", b"cached_tokens", b"completion_tokens")
}

current_ticket: ContextVar[Ticket | None] = ContextVar("disagg_ticket", default=None)


class AdmissionMiddleware:
    """Asks ``gate`` about every generating request in front of ``app``."""

    def __init__(self, app: App, gate: Gate, *, sets_priority: Callable[[], bool] = lambda: False) -> None:
        """
        Args:
            sets_priority: Whether the engine schedules by the body's ``priority``; it refuses the field otherwise.
        """
        self.app = app
        self.gate = gate
        self._sets_priority = sets_priority

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path: str = scope["path"]
        root: str = scope.get("root_path", "")
        if root and path.startswith(root):
            path = path[len(root) :]
        if scope["method"] == "POST" and path in ROUTES:
            await self._generate(path, scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _generate(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        body, interrupted = await _read(receive)
        facts = None if interrupted is not None else facts_of(body)
        if facts is None or (facts.is_transfer and self.gate.accepts_transfers):
            await self.app(scope, _replay(body, receive, interrupted), send)
            return
        try:
            entered = self.gate.enter(path, dict(scope["headers"]), facts)
        except UnknownClass as error:
            await _respond(send, 400, _error(str(error), "invalid_request_error", "unknown_class", param="priority"))
            return
        if isinstance(entered, Refusal):
            await _refuse(send, entered)
            return
        fields, steps = self._fields(path, entered, facts)
        if fields:
            body = with_fields(body, fields)
            length = [(b"content-length", b"%d" % len(body))]
            others = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
            scope = {**scope, "headers": others + length if len(others) < len(scope["headers"]) else others}
        token = current_ticket.set(entered)
        try:
            await self.app(scope, _replay(body, receive), _Response(send, self.gate, entered, steps))
        finally:
            current_ticket.reset(token)
            self.gate.left(entered)

    def _fields(self, path: str, ticket: Ticket, facts: BodyFacts) -> tuple[dict[str, object], tuple[str, ...]]:
        """What to set in the body, and which steps were thereby, or will be, applied."""
        fields: dict[str, object] = {}
        priority = ticket.service_class.priority if self._sets_priority() else 0
        left_to_the_engine = facts.priority is None and facts.text_bytes > HUGE_BYTES and self.gate.has_exact
        if (facts.priority or 0) != priority and not left_to_the_engine:
            fields["priority"] = priority
        steps = []
        for step in ticket.steps:
            name, _, number = step.partition(":")
            if name == "max_tokens":
                cap, limits = int(number), dict(facts.limits)
                names = ROUTES[path]
                asked = next((limits[field] for field in reversed(names) if field in limits), None)
                if not names or facts.min_tokens > cap or (asked is not None and asked <= cap):
                    continue
                fields.update(dict.fromkeys(names, cap))
            elif not self.gate.has_exact:
                continue
            steps.append(step)
        return fields, tuple(steps)


class _Response:
    """``send`` for one request: its start is marked, its usage read, and an exact refusal put in its place.

    An engine may start a stream before it looks at the prompt: the start waits until something comes of it.
    """

    __slots__ = ("_gate", "_replaced", "_send", "_start", "_steps", "_ticket")

    def __init__(self, send: Send, gate: Gate, ticket: Ticket, steps: tuple[str, ...]) -> None:
        self._send = send
        self._gate = gate
        self._ticket = ticket
        self._steps = steps
        self._replaced = False
        self._start: Message | None = None

    async def __call__(self, message: Message) -> None:
        if self._replaced:
            return
        starts = message["type"] == "http.response.start"
        if starts and self._gate.has_exact and not self._ticket.exact:
            self._start = message
            return
        if (starts or self._start is not None) and self._ticket.refusal is not None:
            self._replaced = True
            await _refuse(self._send, self._ticket.refusal)
            return
        if self._start is not None:
            start, self._start = self._start, None
            await self._send(self._marked(start))
        if starts:
            message = self._marked(message)
        elif message["type"] == "http.response.body" and b'"usage"' in message.get("body", b"")[-_USAGE_TAIL_BYTES:]:
            self._saw_usage(message["body"][-_USAGE_TAIL_BYTES:])
        await self._send(message)

    def _marked(self, start: Message) -> Message:
        """With a header where the request was degraded."""
        if not self._steps or start["status"] >= 400:
            return start
        self._gate.applied(self._ticket, self._steps)
        names = ", ".join(step.partition(":")[0] for step in self._steps)
        return {**start, "headers": [*start.get("headers", ()), (DEGRADED_HEADER, names.encode())]}

    def _saw_usage(self, tail: bytes) -> None:
        found = {name: match for name, pattern in _USAGE.items() if (match := pattern.search(tail))}
        if b"prompt_tokens" in found:
            cached, output = found.get(b"cached_tokens"), found.get(b"completion_tokens")
            self._gate.used(
                self._ticket,
                int(found[b"prompt_tokens"][1]),
                None if cached is None else int(cached[1]),
                0 if output is None else int(output[1]),
            )


async def _read(receive: Receive) -> tuple[bytes, Message | None]:
    """The whole body, or what came of it and the message that ended it otherwise."""
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body", False):
        return message.get("body", b""), None
    parts = []
    while message["type"] == "http.request":
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts), None
        message = await receive()
    return b"".join(parts), message


def _replay(body: bytes, receive: Receive, interrupted: Message | None = None) -> Receive:
    """A ``receive`` that gives the body first, then what interrupted it, then whatever comes."""
    first: list[Message] = [] if interrupted is None else [interrupted]
    first.append({"type": "http.request", "body": body, "more_body": interrupted is not None})

    async def replayed() -> Message:
        return first.pop() if first else await receive()

    return replayed


async def _refuse(send: Send, refusal: Refusal) -> None:
    answer, service_class = refusal.answer, refusal.service_class
    predicted = "" if answer.ttft_s is None else f": predicted time to first token {answer.ttft_s:.2f} s"
    if answer.reason == "tpot" and answer.tpot_s is not None:
        predicted = (
            f": predicted {answer.tpot_s * 1e3:.0f} ms per token, SLO {(service_class.tpot_slo_s or 0) * 1e3:.0f} ms"
        )
    elif predicted:
        predicted += f", SLO {service_class.ttft_slo_s:g} s"
    message = f"overloaded ({answer.reason}){predicted}, class {service_class.name}; retry in {answer.retry_after_s} s"
    status = 503 if answer.unavailable else 429
    retry = (b"retry-after", b"%d" % answer.retry_after_s)
    await _respond(send, status, _error(message, "overloaded_error", answer.reason), retry)


def _error(message: str, kind: str, code: str, param: str | None = None) -> dict[str, object]:
    """As OpenAI's API puts it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def _respond(send: Send, status: int, content: dict[str, object], *headers: tuple[bytes, bytes]) -> None:
    body = msgspec.json.encode(content)
    size = (b"content-length", b"%d" % len(body))
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(b"content-type", b"application/json"), size, *headers],
        }
    )
    await send({"type": "http.response.body", "body": body})
