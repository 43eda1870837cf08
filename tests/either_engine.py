"""vLLM and SGLang servers side by side, and one way to ask both: for what crosses engines."""

import asyncio
import os
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from threading import Event
from typing import Any, Literal

import httpx
import yaml
from engines import free_port, serving, sglang_command, sglang_env, vllm_command, vllm_env

from disagg_plugin.control.service import fetch_snapshot

Kind = Literal["vllm", "sglang"]
SGLANG_PYTHON = "DISAGG_SGLANG_PYTHON"  # environment variable: the interpreter that has SGLang; the Makefile sets it


@dataclass(frozen=True)
class Answer:
    """Token ids of one greedy answer, and per token by how much the best beat the second best, in logprobs."""

    tokens: tuple[int, ...]
    top2_gaps: tuple[float, ...]


@dataclass
class Server:
    """One running engine of either kind, with the plugin."""

    kind: Kind
    url: str
    side_port: int
    model: str
    pid: int = 0
    http: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=300))
    _salt: int = 0

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        response = self.http.post(f"{self.url}{path}", json=dict(body))
        assert response.status_code == 200, response.text
        return response.json()

    def generate(self, prompt: Sequence[int], *, max_tokens: int = 16, local: bool = False, **sampling: Any) -> Answer:
        """A greedy answer, or whatever ``sampling`` says, that shares no cached prefix with another one.

        Args:
            local: Prefilled by this engine itself: it is asked for the prompt's logprobs too.
        """
        ask = self._generate_vllm if self.kind == "vllm" else self._generate_sglang
        return ask(list(prompt), max_tokens, local, {"temperature": 0, **sampling})

    def _generate_vllm(self, prompt: list[int], max_tokens: int, local: bool, sampling: dict[str, Any]) -> Answer:
        self._salt += 1
        body = {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, "logprobs": 2, **sampling}
        body |= {"return_token_ids": True, "cache_salt": f"{os.getpid()}-{self._salt}"}
        if local:
            body["prompt_logprobs"] = 0
        choice = self.post("/v1/completions", body)["choices"][0]
        tops = [sorted(top.values(), reverse=True) for top in choice["logprobs"]["top_logprobs"]]
        return Answer(tuple(choice["token_ids"]), tuple(top[0] - top[1] for top in tops))

    def _generate_sglang(self, prompt: list[int], max_tokens: int, local: bool, sampling: dict[str, Any]) -> Answer:
        self.flush()
        body: dict[str, Any] = {"input_ids": prompt, "return_logprob": True, "top_logprobs_num": 2}
        body["sampling_params"] = {"max_new_tokens": max_tokens, **sampling}
        if local:
            body["logprob_start_len"] = 0
        reply = self.post("/generate", body)
        tops = reply["meta_info"]["output_top_logprobs"]
        return Answer(tuple(reply["output_ids"]), tuple(top[0][0] - top[1][0] for top in tops))

    def flush(self) -> None:
        """SGLang: empty the prefix cache; refused while anything is under way, so this also waits for that."""
        for _ in range(200):
            if self.http.post(f"{self.url}/flush_cache").status_code == 200:
                return
            Event().wait(0.05)
        raise AssertionError(f"{self.url} is never idle")

    def snapshot(self) -> dict[str, Any]:
        return asyncio.run(fetch_snapshot("127.0.0.1", self.side_port, None, timeout_s=20.0))

    def landed(self) -> int:
        """Offloads so far whose KV arrived whole."""
        landed: int = self.snapshot()["decode"]["totals"].get("landed", 0)
        return landed

    def when(self, condition: Callable[[dict[str, Any]], bool], *, within_s: float = 60.0) -> dict[str, Any]:
        """The first snapshot that fulfils ``condition``; fails with the last one if none does in time."""
        until_s = time.monotonic() + within_s
        while not condition(view := self.snapshot()):
            assert time.monotonic() < until_s, f"not in {within_s:.0f} s: {str(view)[:6000]}"
            Event().wait(0.02)
        return view

    def wait_for_workers(self) -> None:
        self.when(has_worker)


def planned(kind: Kind) -> Server:
    """A server that will be started at these ports."""
    return Server(kind, f"http://127.0.0.1:{free_port()}", free_port(), "")


def start(
    stack: ExitStack,
    folder: Path,
    name: str,
    kind: Kind,
    model: Path,
    *,
    role: Literal["prefill", "decode"],
    workers: Sequence[Server] = (),
    core: int = 0,
    max_model_len: int = 4096,
    transfer: Mapping[str, Any] | None = None,
    at: "Server | None" = None,
    **more: Any,
) -> Server:
    """Start one server; ``stack`` ends it.

    Args:
        workers: The prefill engines of a decode engine; of one that does not run yet, its ``planned`` form.
        at: The ``planned`` form whose ports it gets.
        more: Further settings.
    """
    at = at or planned(kind)
    port, side_port = int(at.url.rpartition(":")[2]), at.side_port
    settings = {
        "side_channel": {"port": side_port, "peer_timeout_s": 30.0},  # four engines may share two cores
        "transfer": {"codec": "raw", "compile": False, "offer_timeout_s": 20.0, **(transfer or {})},
        "policy": {"offload": "threshold"},
        "split_policy": {"prompt_length_threshold": 24, "suspect_after_s": 30.0},
        "prefill_workers": [{"url": w.url, "side_channel": f"127.0.0.1:{w.side_port}"} for w in workers],
        **more,
    }
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump(settings))
    if kind == "vllm":
        extra = ["--kv-connector", "disagg", "--disagg-role", role, "--disagg-config", str(config)]
        extra += ["--max-model-len", str(max_model_len), "--max-num-batched-tokens", "512"]
        argv, env = vllm_command(str(model), port, core=core, extra=extra), vllm_env(core=core)
    else:
        extra = ["--disaggregation-transfer-backend", "disagg", "--disaggregation-mode", role]
        extra += ["--disagg-config", str(config), "--context-length", str(max_model_len)]
        extra += ["--chunked-prefill-size", "512", "--enable-metrics"]
        argv = sglang_command(str(model), port, extra=extra, python=sglang_python())
        env = sglang_env()
    url = f"http://127.0.0.1:{port}"
    process = stack.enter_context(serving(argv, f"{url}/health", folder / f"{name}.log", start_s=900, env=env))
    server = Server(kind, url, side_port, str(model), process.pid)
    stack.callback(server.http.close)
    return server


def sglang_python() -> str:
    """The interpreter that has SGLang: named by the environment, else the Makefile's."""
    if find_spec("sglang") is not None:
        return sys.executable
    named = os.environ.get(SGLANG_PYTHON) or str(Path(__file__).parents[1] / ".venv-sglang" / "bin" / "python")
    if not Path(named).exists():
        sys.exit(f"no SGLang at {named}: run `make venv-sglang`, or set {SGLANG_PYTHON}")
    return named


def prompt_of(tokens: int, seed: int = 0) -> list[int]:
    """Token ids that no other length or seed begins with."""
    return random.Random(f"{tokens}/{seed}").choices(range(10, 40_000), k=tokens)


def has_worker(view: dict[str, Any]) -> bool:
    """Whether a decode engine could offload now."""
    return any(worker["healthy"] for worker in view["prefill_workers"]["workers"].values())


def agreement(pairs: Sequence[tuple[Answer, Answer]]) -> tuple[float, float]:
    """(share of equal tokens, largest top-2 gap at a difference) of (offloaded, local) answers.

    After its first difference an answer is about something else: positions up to there count.
    """
    same = compared = 0
    worst_gap = 0.0
    for offloaded, local in pairs:
        for ours, theirs, gap in zip(offloaded.tokens, local.tokens, local.top2_gaps, strict=True):
            compared += 1
            if ours != theirs:
                worst_gap = max(worst_gap, gap)
                break
            same += 1
    return same / compared, worst_gap


def at_once(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run all calls in parallel threads; their results in order."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]
