"""A pair of real engines under a benchmark, and a client that takes the time."""

import asyncio
import itertools
import random
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from engines import free_port, serving, vllm_command, vllm_env
from models import tiny

from disagg_plugin.control.service import fetch_snapshot

TOKENS_OUT = 6


@dataclass
class Timed:
    """One streamed request; ``time.monotonic`` seconds."""

    ttft_s: float
    first_token_s: float
    gaps_s: list[float] = field(default_factory=list)


class Client:
    """Streams completions and takes the time."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.http = httpx.Client(timeout=600)

    def stream(
        self,
        url: str,
        prompt: list[int],
        started_s: float | None = None,
        *,
        on_gap: Callable[[float], object] | None = None,
        over: threading.Event | None = None,
        **more: Any,
    ) -> Timed:
        """One completion, token by token.

        Args:
            on_gap: Gets the seconds between two tokens, at once.
            over: Leave when it is set.
        """
        body = {"model": self.model, "prompt": prompt, "max_tokens": TOKENS_OUT, "temperature": 0, "stream": True}
        body |= {"ignore_eos": True, **more}
        started_s = started_s or time.monotonic()
        arrivals: list[float] = []
        with self.http.stream("POST", f"{url}/v1/completions", json=body) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                arrivals.append(time.monotonic())
                if on_gap is not None and len(arrivals) > 1:
                    on_gap(arrivals[-1] - arrivals[-2])
                if over is not None and over.is_set():
                    break
        gaps = [b - a for a, b in itertools.pairwise(arrivals)]
        return Timed(arrivals[0] - started_s, arrivals[0], gaps)

    def post(self, url: str, prompt: list[int], **more: Any) -> dict[str, Any]:
        body = {"model": self.model, "prompt": prompt, "temperature": 0, "ignore_eos": True, **more}
        response = self.http.post(f"{url}/v1/completions", json=body)
        response.raise_for_status()
        reply: dict[str, Any] = response.json()
        return reply


def tiny_model() -> str:
    """A random Llama of 4 layers; made on first use."""
    return str(tiny())


def fresh_prompt(tokens: int) -> list[int]:
    """No two prompts share a cached block."""
    return random.choices(range(10, 40_000), k=tokens)


def start(
    stack: ExitStack, folder: Path, name: str, model: str, core: int, extra: list[str], env: dict[str, str]
) -> str:
    port = free_port()
    stack.enter_context(
        serving(
            vllm_command(model, port, core=core, extra=extra),
            f"http://127.0.0.1:{port}/health",
            folder / f"{name}.log",
            start_s=600,
            env={**vllm_env(core=core), **env},
        )
    )
    return f"http://127.0.0.1:{port}"


@dataclass
class DisaggPair:
    """A prefill and a decode engine of ours, connected."""

    urls: dict[str, str]
    side_ports: dict[str, int]

    def view(self, role: str) -> dict[str, Any]:
        """The debug snapshot of one of them."""
        return asyncio.run(fetch_snapshot("127.0.0.1", self.side_ports[role], None))


def start_disagg_pair(
    stack: ExitStack,
    folder: Path,
    model: str,
    *,
    decode: Mapping[str, Any],
    prefill: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
    extra: list[str] | None = None,
) -> DisaggPair:
    """Both engines, each on a core of its own, raw KV; returns once the decode engine knows the other.

    Args:
        decode, prefill: Settings of the engines beyond each other's addresses.
        env, extra: Environment and flags of the decode engine.
    """
    pair = DisaggPair({}, {"prefill": free_port(), "decode": free_port()})
    for core, role in enumerate(("prefill", "decode")):
        settings: dict[str, Any] = {
            "role": role,
            "side_channel": {"port": pair.side_ports[role]},
            "transfer": {"codec": "raw", "compile": False},
        }
        if role == "prefill":
            settings |= prefill or {}
        flags = []
        if role == "decode":
            worker = {"url": pair.urls["prefill"], "side_channel": f"127.0.0.1:{pair.side_ports['prefill']}"}
            settings |= {"prefill_workers": [worker], **decode}
            flags = list(extra or [])
        config = folder / f"{role}.yaml"
        config.write_text(yaml.safe_dump(settings))
        flags += ["--kv-connector", "disagg", "--disagg-config", str(config)]
        mine = dict(env or {}) if role == "decode" else {}
        pair.urls[role] = start(stack, folder, f"disagg-{role}", model, core, flags, mine)
    while not any(w["healthy"] for w in pair.view("decode")["prefill_workers"]["workers"].values()):
        time.sleep(0.2)
    return pair
