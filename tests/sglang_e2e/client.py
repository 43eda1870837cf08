"""A small client of SGLang servers: native and OpenAI requests, and the plugin's debug snapshot."""

import asyncio
import json
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from disagg_plugin.control.service import fetch_snapshot

REQUEST_S = 300.0


@dataclass(frozen=True)
class Answer:
    """What one generation said; ``top2_gaps`` per token: logprob of the best minus the second best."""

    output_ids: tuple[int, ...]
    top2_gaps: tuple[float, ...]
    cached_tokens: int
    finish_reason: str


@dataclass(frozen=True)
class Engine:
    """One running SGLang server and, with the plugin, its side channel."""

    url: str
    model: str
    side_port: int = 0
    pid: int = 0
    bootstrap_port: int = 0
    http: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=REQUEST_S), compare=False)

    def post(self, path: str, **body: Any) -> Any:
        """A request that must succeed; its reply as JSON."""
        response = self.http.post(f"{self.url}{path}", json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def generate(self, prompt: Sequence[int], *, max_new_tokens: int = 16, **more: Any) -> Answer:
        """One greedy generation over ``/generate``."""
        sampling = {"max_new_tokens": max_new_tokens, "temperature": 0, "ignore_eos": True}
        body: dict[str, Any] = {"input_ids": list(prompt), "return_logprob": True, "top_logprobs_num": 2}
        reply = self.post("/generate", **body, **{"sampling_params": sampling, **more})
        meta = reply["meta_info"]
        gaps = [top[0][0] - top[1][0] for top in meta.get("output_top_logprobs") or ()]  # none of what was aborted
        reason = meta["finish_reason"]["type"]
        return Answer(tuple(reply.get("output_ids", ())), tuple(gaps), meta.get("cached_tokens", 0), reason)

    def stream(self, prompt: Sequence[int], *, max_tokens: int = 16) -> str:
        """The text of one streamed greedy completion."""
        body = {"model": self.model, "prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0}
        text = ""
        with self.http.stream("POST", f"{self.url}/v1/completions", json={**body, "stream": True}) as response:
            for line in response.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
        return text

    def flush(self) -> None:
        """Empty the prefix cache; refused while anything is under way, so this also waits for that."""
        for _ in range(200):
            if self.http.post(f"{self.url}/flush_cache").status_code == 200:
                return
            Event().wait(0.05)
        raise AssertionError(f"{self.url} is never idle: {json.dumps(self.snapshot(), indent=1)[:4000]}")

    def metrics(self, name: str) -> dict[tuple[str, ...], float]:
        """What one metric on /metrics says, by its own label values, in the labels' alphabetical order."""
        found: dict[tuple[str, ...], float] = {}
        for family in text_string_to_metric_families(self.http.get(f"{self.url}/metrics").text):
            for sample in family.samples:
                if sample.name == name:
                    own = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
                    found[tuple(own[label] for label in sorted(own))] = sample.value
        return found

    def snapshot(self) -> dict[str, Any]:
        """The plugin's debug view of this engine."""
        return asyncio.run(fetch_snapshot("127.0.0.1", self.side_port, None, timeout_s=20.0))

    def when(self, condition: Callable[[dict[str, Any]], bool], *, within_s: float = 60.0) -> dict[str, Any]:
        """The first snapshot that fulfils ``condition``; fails with the last one if none does in time."""
        view: dict[str, Any] = {}
        for _ in range(int(within_s / 0.05)):
            view = self.snapshot()
            if condition(view):
                return view
            Event().wait(0.05)
        raise AssertionError(f"not within {within_s} s: {json.dumps(view, indent=1)[:6000]}")


class Offloads:
    """What a decode engine counted while a block of code ran."""

    def __init__(self, decode: Engine) -> None:
        self._engine = decode
        self._before = decode.snapshot()["decode"]

    def totals(self) -> dict[str, int]:
        after = self._engine.snapshot()["decode"]
        keys = ("landed", "wire_bytes", "raw_bytes", "offered")
        counted = {key: after["totals"].get(key, 0) - self._before["totals"].get(key, 0) for key in keys}
        counted["fallbacks"] = sum(after["fallbacks"].values()) - sum(self._before["fallbacks"].values())
        return counted

    def decisions(self) -> dict[str, int]:
        after, before = self._engine.snapshot()["decode"]["decisions"], self._before["decisions"]
        return {
            reason: count - before.get(reason, 0) for reason, count in after.items() if count > before.get(reason, 0)
        }


def prompt_of(tokens: int, seed: int = 0) -> list[int]:
    """Token ids, the same in every run."""
    return random.Random(f"{tokens}/{seed}").choices(range(10, 40_000), k=tokens)


def same_tokens(got: Answer, local: Answer, *, gap: float = 1e-3) -> bool:
    """Equal, or a first difference only where the local run was undecided itself."""
    for position, (ours, theirs) in enumerate(zip(got.output_ids, local.output_ids, strict=True)):
        if ours != theirs:
            return local.top2_gaps[position] < gap
    return True


def at_once(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run all calls in parallel threads; their results in order."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]
