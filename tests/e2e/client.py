"""A small client of the engines under test: OpenAI requests with token ids, and the debug snapshot."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from threading import Event
from typing import Any

import httpx

from disagg_plugin.control.service import fetch_snapshot

REQUEST_S = 300.0


@dataclass(frozen=True)
class Answer:
    """What one choice of a completion said; ``top2_gaps`` per token: logprob of the best minus the second best."""

    text: str
    tokens: tuple[str, ...]
    top2_gaps: tuple[float, ...]
    prompt_tokens: int
    finish_reason: str


@dataclass(frozen=True)
class Engine:
    """One running engine: its HTTP API and, with the plugin, its side channel."""

    url: str
    model: str
    side_port: int = 0
    pid: int = 0
    http: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=REQUEST_S), compare=False)

    def complete(self, prompt: Sequence[int] | str, *, max_tokens: int = 16, **params: Any) -> Answer:
        """One greedy completion."""
        return self.choices(prompt, max_tokens=max_tokens, **params)[0]

    def choices(self, prompt: Sequence[int] | str, *, max_tokens: int = 16, **params: Any) -> list[Answer]:
        """All choices of one request."""
        body = {"model": self.model, "prompt": prompt if isinstance(prompt, str) else list(prompt)}
        body |= {"max_tokens": max_tokens, "temperature": 0, "logprobs": 2, "ignore_eos": True, **params}
        response = self.http.post(f"{self.url}/v1/completions", json=body)
        assert response.status_code == 200, response.text
        reply = response.json()
        return [_answer(choice, reply["usage"]["prompt_tokens"]) for choice in reply["choices"]]

    def stream(self, prompt: Sequence[int], *, max_tokens: int = 16, **params: Any) -> str:
        """The text of one streamed greedy completion."""
        body = {"model": self.model, "prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0}
        body |= {"stream": True, "ignore_eos": True, **params}
        text = ""
        with self.http.stream("POST", f"{self.url}/v1/completions", json=body) as response:
            for line in response.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
        return text

    @contextmanager
    def decoding(self, prompt: Sequence[int], *, max_tokens: int = 3_000) -> Iterator[None]:
        """Inside, a request decodes: its first token is here, and its last is far away. It is aborted at the end."""
        body = {"model": self.model, "prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0}
        body |= {"stream": True, "ignore_eos": True}
        with self.http.stream("POST", f"{self.url}/v1/completions", json=body) as response:
            lines = response.iter_lines()  # held on to: an iterator that is collected closes the connection
            while not next(lines).startswith("data: "):
                pass
            yield

    def chat(self, message: str, *, max_tokens: int = 16) -> str:
        """The reply to one chat message."""
        body = {"model": self.model, "messages": [{"role": "user", "content": message}], "temperature": 0}
        body |= {"max_tokens": max_tokens, "ignore_eos": True}
        response = self.http.post(f"{self.url}/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        content = response.json()["choices"][0]["message"]["content"]
        assert isinstance(content, str)
        return content

    def snapshot(self) -> dict[str, Any]:
        """The plugin's debug view of this engine."""
        return asyncio.run(fetch_snapshot("127.0.0.1", self.side_port, None, timeout_s=10.0))

    def when(
        self, condition: Callable[[dict[str, Any]], bool], *, within_s: float = 30.0, every_s: float = 0.1
    ) -> dict[str, Any]:
        """The first snapshot that fulfils ``condition``; fails with the last one if none does in time."""
        started_s, looks = time.monotonic(), 0
        while True:
            view = self.snapshot()
            looks += 1
            if condition(view):
                return view
            waited_s = time.monotonic() - started_s
            if waited_s > within_s:
                raise AssertionError(f"not in {looks} looks and {waited_s:.1f} s: {json.dumps(view, indent=1)[:6000]}")
            Event().wait(every_s)


class Going:
    """A request whose client goes away."""

    def __init__(self, engine: Engine, prompt: list[int], salt: str) -> None:
        url = httpx.URL(engine.url)
        self._connection = HTTPConnection(url.host, url.port, timeout=120)
        body = {"model": engine.model, "prompt": prompt, "max_tokens": 4, "cache_salt": salt}
        self._connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})

    def goes_away(self) -> None:
        """Nobody has read the answer; the server sees the connection end."""
        self._connection.close()


def _answer(choice: Mapping[str, Any], prompt_tokens: int) -> Answer:
    logprobs = choice.get("logprobs") or {"tokens": [], "top_logprobs": []}
    gaps = []
    for top in logprobs["top_logprobs"]:
        best = sorted(top.values(), reverse=True)
        gaps.append(best[0] - best[1] if len(best) > 1 else float("inf"))
    return Answer(choice["text"], tuple(logprobs["tokens"]), tuple(gaps), prompt_tokens, choice["finish_reason"])


def same_tokens(got: Answer, local: Answer) -> bool:
    """Rule 1 of the design: equal, or a first difference only where the local run was undecided itself."""
    for position, (ours, theirs) in enumerate(zip(got.tokens, local.tokens, strict=True)):
        if ours != theirs:
            return local.top2_gaps[position] < 1e-3
    return True


def at_once(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run all calls in parallel threads; their results in order."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]
