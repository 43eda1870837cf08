"""In front of the engine: what is refused never reaches it, what is not reaches it as it came; clients understand."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import openai
import pytest
import uvicorn
from unit.admission.gates import gate, report

from disagg_plugin.admission.gate import Gate
from disagg_plugin.admission.middleware import AdmissionMiddleware, current_ticket
from disagg_policies.admission_snapshots import QueuedWork

Message = MutableMapping[str, Any]
SEEN: list[dict[str, Any]] = []
CROWDED = report(1, (-1, 90_000))
CROWDED_SINCE = report(2, (-1, 90_000))


async def engine(
    scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[..., Awaitable[None]]
) -> None:
    """Answers as an engine does: also to malformed JSON, and streaming if asked."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    SEEN.append({"scope": dict(scope), "body": body, "ended_by": message["type"], "ticket": current_ticket.get()})
    try:
        asked = dict(json.loads(body))
        status: int = asked.get("status", 200)
    except ValueError:
        asked, status = {}, 400
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]})
    if asked.get("stream"):
        for word in ("a", "b"):
            event = {"id": "1", "object": "text_completion", "created": 1, "model": "m", "choices": [_choice(word)]}
            await send(
                {"type": "http.response.body", "body": f"data: {json.dumps(event)}\n\n".encode(), "more_body": True}
            )
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
        return
    usage = {"prompt_tokens": 100, "completion_tokens": 2, "total_tokens": 102}
    answer = {"id": "1", "object": "text_completion", "created": 1, "model": "m", "choices": [_choice("ab")]}
    await send({"type": "http.response.body", "body": json.dumps({**answer, "usage": usage}).encode()})


def _choice(text: str) -> dict[str, object]:
    return {"index": 0, "text": text, "finish_reason": "stop", "logprobs": None}


def ask(
    of: Gate,
    body: bytes | dict[str, Any],
    *,
    path: str = "/v1/completions",
    method: str = "POST",
    headers: tuple[tuple[bytes, bytes], ...] = (),
    pieces: int = 1,
    priority: bool = False,
    kind: str = "http",
) -> tuple[int, dict[bytes, bytes], Any]:
    """One request through the middleware; status, headers, parsed or raw body."""
    SEEN.clear()
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    size = max(1, -(-len(raw) // pieces))
    parts = [raw[at : at + size] for at in range(0, max(1, len(raw)), size)]
    incoming: list[Message] = [
        {"type": "http.request", "body": part, "more_body": number < len(parts) - 1}
        for number, part in enumerate(parts)
    ]
    sent: list[Message] = []

    async def receive() -> Message:
        return incoming.pop(0) if incoming else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope: Message = {
        "type": kind,
        "method": method,
        "path": path,
        "headers": [(b"content-length", b"%d" % len(raw)), *headers],
    }
    app: Any = AdmissionMiddleware(engine, of, sets_priority=lambda: priority)
    asyncio.run(app(scope, receive, send))
    start = sent[0]
    answer = b"".join(message.get("body", b"") for message in sent[1:])
    return start["status"], dict(start["headers"]), json.loads(answer) if answer[:1] == b"{" else answer


IDS = {"prompt": [1] * 500}


def test_what_is_admitted_reaches_the_engine_byte_by_byte() -> None:
    asked = gate()
    asked.update(report(1))
    body = b'{ "prompt":[1, 2] ,"weird": "\\u00e4" }'
    for pieces in (1, 3):
        assert ask(asked, body, pieces=pieces)[0] == 200
        assert SEEN[0]["body"] == body
        assert SEEN[0]["ticket"] is not None
    assert current_ticket.get() is None
    assert asked.reservations() == []


def test_what_is_refused_never_does() -> None:
    asked = gate()
    asked.update(CROWDED)
    status, headers, body = ask(asked, IDS)
    assert (status, SEEN) == (429, [])
    assert headers[b"retry-after"] == b"60"
    assert body["error"] == {
        "message": "overloaded (ttft): predicted time to first token 90.50 s, SLO 2 s, class normal; retry in 60 s",
        "type": "overloaded_error",
        "param": None,
        "code": "ttft",
    }


def test_a_refusal_for_tokens_speed_says_so() -> None:
    asked = gate(classes={"normal": {"ttft_slo_s": 500.0, "tpot_slo_s": 0.03}})
    asked.update(report(1, *((0, 1_000) for _ in range(300))))
    asked.update(report(2, (0, 1), landing=(QueuedWork(0, 400, 0),)))
    _, _, body = ask(asked, IDS)
    assert "predicted 50 ms per token, SLO 30 ms" in body["error"]["message"]


def test_draining_is_503() -> None:
    asked = gate()
    asked.draining = True
    status, headers, body = ask(asked, IDS)
    assert (status, body["error"]["code"], headers[b"retry-after"]) == (503, "draining", b"60")


@pytest.mark.parametrize(
    ("body", "path", "method"),
    [
        pytest.param(b'{"prompt": [1, 2', "/v1/completions", "POST", id="malformed JSON"),
        pytest.param(b"", "/v1/completions", "POST", id="no body"),
        pytest.param(b"[]", "/v1/chat/completions", "POST", id="no object"),
        pytest.param(b"{}", "/v1/embeddings", "POST", id="nothing is generated"),
        pytest.param(b"{}", "/v1/completions", "GET", id="no such method"),
        pytest.param(b"", "/health", "GET", id="health"),
    ],
)
def test_what_does_not_concern_us_is_the_engines_to_answer(body: bytes, path: str, method: str) -> None:
    asked = gate()
    asked.update(CROWDED)
    ask(asked, body, path=path, method=method)
    assert [seen["body"] for seen in SEEN] == [body]
    assert SEEN[0]["ticket"] is None


def test_a_client_that_goes_away_while_sending_is_the_engines_to_notice() -> None:
    asked = gate()
    sent: list[Message] = []

    async def run() -> None:
        incoming: list[Message] = [
            {"type": "http.request", "body": b'{"prompt"', "more_body": True},
            {"type": "http.disconnect"},
        ]

        async def receive() -> Message:
            return incoming.pop(0)

        async def send(message: Message) -> None:
            sent.append(message)

        SEEN.clear()
        scope: Message = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        await AdmissionMiddleware(engine, asked)(scope, receive, send)

    asyncio.run(run())
    assert (SEEN[0]["body"], SEEN[0]["ended_by"]) == (b'{"prompt"', "http.disconnect")


def test_an_unknown_class_is_400_and_names_the_classes() -> None:
    status, _, body = ask(gate(), {"prompt": [1], "priority": "gold"})
    assert (status, SEEN) == (400, [])
    assert body["error"]["message"] == "unknown class 'gold': there are high, normal, low"
    asked = gate(trust_priority_header=True)
    assert ask(asked, IDS, headers=((b"x-disagg-priority", b"gold"),))[0] == 400


def test_the_class_becomes_the_engines_priority() -> None:
    asked = gate(trust_priority_header=True)
    for body, header, expected in (
        (IDS, b"low", 1),
        (IDS | {"priority": "high"}, None, -1),
        (IDS | {"priority": -7}, None, -1),
        (IDS | {"priority": 1}, None, 1),
    ):
        headers = () if header is None else ((b"x-disagg-priority", header),)
        assert ask(asked, body, headers=headers, priority=True)[0] == 200
        assert json.loads(SEEN[0]["body"]) == {**IDS, "priority": expected}
        assert dict(SEEN[0]["scope"]["headers"])[b"content-length"] == b"%d" % len(SEEN[0]["body"])


def test_an_engine_without_priorities_is_not_told_any() -> None:
    assert ask(gate(), IDS | {"priority": "low"})[0] == 200
    assert json.loads(SEEN[0]["body"])["priority"] == 0
    assert ask(gate(), IDS)[0] == 200
    assert "priority" not in json.loads(SEEN[0]["body"])


CHAT = "/v1/chat/completions"
PRESSED = report(1, (1, 3_200))  # low may wait four seconds


@pytest.mark.parametrize(
    ("path", "asked_for", "expected"),
    [
        pytest.param("/v1/completions", {}, {"max_tokens": 64}, id="no limit of its own"),
        pytest.param("/v1/completions", {"max_tokens": 900}, {"max_tokens": 64}, id="a longer one"),
        pytest.param("/v1/completions", {"max_tokens": 9}, None, id="a shorter one stands"),
        pytest.param("/v1/completions", {"max_tokens": 900, "min_tokens": 65}, None, id="a least length stands"),
        pytest.param(CHAT, {"max_completion_tokens": 900}, {"max_tokens": 64, "max_completion_tokens": 64}, id="chat"),
        pytest.param(CHAT, {"max_completion_tokens": 9, "max_tokens": 900}, None, id="the one that counts in chat"),
        pytest.param("/v1/responses", {}, {"max_output_tokens": 64}, id="responses"),
    ],
)
def test_under_pressure_answers_get_shorter_and_say_so(
    path: str, asked_for: dict[str, int], expected: dict[str, int] | None
) -> None:
    degrading = gate()
    degrading.update(PRESSED)
    body = {"prompt": [1], **asked_for, "priority": 1}
    _, headers, _ = ask(degrading, body, path=path, priority=True)
    assert json.loads(SEEN[0]["body"]) == {**body, **(expected or {})}
    assert headers.get(b"x-disagg-degraded") == (b"max_tokens" if expected else None)
    assert degrading.degraded == ({("low", "max_tokens"): 1} if expected else {})


def test_routing_steps_need_the_second_stage() -> None:
    classes = {"low": {"ttft_slo_s": 4.0, "priority": 1, "degrade": ["never_offload"]}}
    for there, expected in ((False, None), (True, b"never_offload")):
        degrading = gate(classes=classes, default_class="low")
        degrading.has_exact = there
        degrading.update(PRESSED)
        assert ask(degrading, IDS)[1].get(b"x-disagg-degraded") == expected
        assert SEEN[0]["ticket"].routing == "never_offload"


def test_an_error_is_not_called_degraded() -> None:
    degrading = gate()
    degrading.update(PRESSED)
    _, headers, _ = ask(degrading, {"prompt": [1], "priority": 1, "status": 400})
    assert b"x-disagg-degraded" not in headers


@pytest.mark.parametrize("stream", [False, True])
def test_the_exact_check_refuses_before_anything_was_sent(stream: bool) -> None:
    """Deep in the engine the load turns out to be higher: the client gets our answer, whatever the engine's is."""
    asked = gate()
    asked.update(report(1))
    sent: list[Message] = []
    body = json.dumps({"prompt": "x", "stream": stream, "status": 503, "priority": "high"}).encode()

    async def strict(scope: Message, receive: Any, send: Any) -> None:
        ticket = current_ticket.get()
        assert ticket is not None
        asked.update(CROWDED_SINCE)
        assert asked.exact(ticket, "cmpl-1", 500) is not None
        await engine(scope, receive, send)

    async def run() -> None:
        async def receive() -> Message:
            return {"type": "http.request", "body": body}

        async def send(message: Message) -> None:
            sent.append(message)

        scope: Message = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        await AdmissionMiddleware(strict, asked)(scope, receive, send)

    asyncio.run(run())
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[0]["status"] == 429


def test_what_a_prefill_engine_is_sent_by_its_decode_engines_was_admitted_there() -> None:
    body = IDS | {"kv_transfer_params": {"disagg": {"transfer_id": "00ff"}}}
    for accepts, status in ((True, 200), (False, 429)):
        asked = gate(accepts_transfers=accepts)
        asked.update(CROWDED)
        assert ask(asked, body)[0] == status


def test_what_was_prefilled_elsewhere_is_never_refused() -> None:
    asked = gate()
    asked.update(CROWDED)
    assert ask(asked, IDS | {"kv_transfer_params": {"do_remote_prefill": True}})[0] == 200


def test_a_huge_body_goes_through_whole() -> None:
    asked = gate()
    asked.update(report(1))
    body = {"prompt": "word " * 400_000, "max_tokens": 5, "priority": 1}
    assert ask(asked, body, pieces=40, priority=True)[0] == 200
    assert json.loads(SEEN[0]["body"]) == body


@pytest.mark.parametrize("has_exact", [False, True])
def test_a_huge_body_is_not_copied_for_a_priority_that_the_second_stage_sets(has_exact: bool) -> None:
    asked = gate(classes={"high": {"ttft_slo_s": 1.0, "priority": -1}}, default_class="high")
    asked.has_exact = has_exact
    asked.update(report(1))
    body = {"prompt": "word " * 400_000}
    assert ask(asked, body, priority=True)[0] == 200
    assert json.loads(SEEN[0]["body"]).get("priority") == (None if has_exact else asked.book.classes[0].priority)


def test_usage_teaches_the_route() -> None:
    asked = gate()
    for _ in range(20):
        ask(asked, {"prompt": "x" * 600})
    status: Any = asked.status()
    assert status["routes"]["/v1/completions"]["bytes_per_token"] == pytest.approx(6.1, abs=0.2)


# -- the client that people use ----------------------------------------------------------------------------------------


@contextmanager
def serving(of: Gate) -> Iterator[str]:
    """The middleware and the stub engine behind real HTTP."""
    ready = threading.Event()

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            ready.set()

    app: Any = AdmissionMiddleware(engine, of)
    server = Server(uvicorn.Config(app, port=0, lifespan="off", log_level="error", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert ready.wait(30)
        (port,) = [socket.getsockname()[1] for one in server.servers for socket in one.sockets]
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.mark.parametrize("stream", [False, True])
def test_the_openai_client_sees_a_rate_limit_and_its_retry_succeeds_when_load_falls(
    stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = gate()
    asked.update(CROWDED)
    with serving(asked) as url, openai.OpenAI(base_url=url, api_key="k", max_retries=0) as client:
        with pytest.raises(openai.RateLimitError) as raised:
            client.completions.create(model="m", prompt=[1] * 500, stream=stream)
        assert raised.value.status_code == 429
        assert raised.value.code == "ttft"
        assert raised.value.type == "overloaded_error"
        assert raised.value.response.headers["retry-after"] == "60"

        slept: list[float] = []

        def load_falls(seconds: float) -> None:
            slept.append(seconds)
            asked.update(report(2))

        monkeypatch.setattr("openai._base_client.time.sleep", load_falls)
        with client.with_options(max_retries=2) as patient:
            answer: Any = patient.completions.create(model="m", prompt=[1] * 500, stream=stream)
            text = "".join(part.choices[0].text for part in answer) if stream else answer.choices[0].text
        assert (text, slept) == ("ab", [60.0])


def test_the_openai_client_sees_malformed_fields_as_the_engine_reports_them() -> None:
    unknown = pytest.raises(openai.BadRequestError, match="there are high, normal, low")
    with serving(gate()) as url, openai.OpenAI(base_url=url, api_key="k", max_retries=0) as client, unknown:
        client.completions.create(model="m", prompt="x", extra_body={"priority": "gold"})


def test_a_stream_that_starts_before_its_prompt_is_looked_at_is_refused_all_the_same() -> None:
    """Some engines do: SGLang's /generate."""
    asked = gate()
    asked.has_exact = True
    asked.update(report(1, (-1, 3_000)))

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        ticket = current_ticket.get()
        assert ticket is not None
        refusal = asked.exact(ticket, "r", 2_000, 0)
        await send({"type": "http.response.body", "body": b"data: what the engine says of it", "more_body": True})
        await send({"type": "http.response.body", "body": b"" if refusal else b"served"})

    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": json.dumps({"text": "x", "stream": True, "priority": "low"}).encode()}

    async def send(message: Message) -> None:
        sent.append(message)

    scope: Message = {"type": "http", "method": "POST", "path": "/generate", "headers": []}
    asyncio.run(AdmissionMiddleware(app, asked)(scope, receive, send))
    assert [message.get("status", message.get("more_body", False)) for message in sent] == [429, False]


def test_an_offload_call_to_an_sglang_server_was_admitted_on_the_side_channel() -> None:
    asked = gate(accepts_transfers=True)
    asked.update(CROWDED)
    body = {"input_ids": [1] * 9_000, "bootstrap_host": "disagg", "bootstrap_room": 5, "priority": "low"}
    assert ask(asked, body, path="/generate")[0] == 200
    assert ask(asked, {**body, "bootstrap_host": "10.0.0.1"}, path="/generate")[0] == 429
