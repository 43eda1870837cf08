"""Conversations of several turns, whose KV the engines' own caches cannot keep: who computes how much again?

    .venv/bin/python benchmarks/multiround.py --json [--turns 8] [--conversations 3] [--model smollm2|tiny]

The same conversations, turn by turn in rotation, against four set-ups, one after the other: ``stock`` vLLM, ``stock``
with LMCache's own connector (``stock_lmcache``), our pair (``disagg``), and our pair with LMCache on both engines
(``disagg_lmcache``; one server each, one folder as second tier). Every engine has the same small KV cache: about one
conversation at its end fits, so that the others evict it between two of its turns. A turn adds what the user says
(drawn by seed, the same for all set-ups) and what the model answered (fixed, too: the next prompt is made from tokens
that do not depend on the set-up).

``computed_tokens``: prompt tokens computed, over all engines of a set-up, by vLLM's own counter
``prompt_tokens_by_source{source="local_compute"}``. ``ttft_s``: median over the turns after the first.
``computed_per_turn`` and ``ttft_per_turn_s`` have the turns one by one, summed and averaged over the conversations.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from real_pair import Client, start

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import models
from engines import free_port
from lmcache_servers import CHUNK, LMCacheServer, is_written, prompt_tokens_by_source

FIRST_TOKENS, TURN_TOKENS, ANSWER_TOKENS = 160, 60, 20
BLOCK = 32


@dataclass
class SetUp:
    """Engines that serve the conversations."""

    url: str  # that the client talks to
    engines: list[str]
    servers: list[LMCacheServer]


def computed(client: Client, engines: list[str]) -> float:
    """Prompt tokens that these engines have computed."""
    return sum(prompt_tokens_by_source(client.http.get(f"{url}/metrics").text)["local_compute"] for url in engines)


class Bench:
    """Starts the set-ups; every engine alike."""

    def __init__(self, model: str, longest_tokens: int) -> None:
        self.model = model
        blocks = longest_tokens // BLOCK + 8
        self.flags = ["--num-gpu-blocks-override", str(blocks), "--max-model-len", str(longest_tokens + 2 * BLOCK)]

    @contextmanager
    def stock(self) -> Iterator[SetUp]:
        with ExitStack() as stack:
            url = start(stack, folder(), "stock", self.model, 0, self.flags, {})
            yield SetUp(url, [url], [])

    @contextmanager
    def stock_lmcache(self) -> Iterator[SetUp]:
        with ExitStack() as stack:
            where = folder()
            server = self._server(stack, where, "stock")
            transfer = {
                "kv_connector": "LMCacheMPConnector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": server.port},
            }
            flags = [*self.flags, "--kv-transfer-config", json.dumps(transfer)]
            url = start(stack, where, "stock-lmcache", self.model, 0, flags, {})
            yield SetUp(url, [url], [server])

    @contextmanager
    def disagg(self) -> Iterator[SetUp]:
        with ExitStack() as stack:
            yield self._pair(stack, folder(), lmcache=False)

    @contextmanager
    def disagg_lmcache(self) -> Iterator[SetUp]:
        with ExitStack() as stack:
            yield self._pair(stack, folder(), lmcache=True)

    def _server(self, stack: ExitStack, where: Path, name: str) -> LMCacheServer:
        server = LMCacheServer(name, where)
        stack.callback(server.stop)
        server.start(l2=where / "l2", l1_gb=1.0)
        return server

    def _pair(self, stack: ExitStack, where: Path, *, lmcache: bool) -> SetUp:
        servers = [self._server(stack, where, role) for role in ("prefill", "decode")] if lmcache else []
        sides = {"prefill": free_port(), "decode": free_port()}
        urls: dict[str, str] = {}
        for core, role in enumerate(("prefill", "decode")):
            settings: dict[str, Any] = {
                "role": role,
                "side_channel": {"port": sides[role]},
                "transfer": {"codec": "raw", "compile": False},
                "policy": {"offload": "threshold"},
                "split_policy": {"prompt_length_threshold": BLOCK},
            }
            if lmcache:
                settings["cache"] = {"reuse_prefix": True, "lmcache": {"url": servers[core].url}}
            if role == "decode":
                worker = {"url": urls["prefill"], "side_channel": f"127.0.0.1:{sides['prefill']}"}
                settings["prefill_workers"] = [worker]
            config = where / f"{role}.yaml"
            config.write_text(yaml.safe_dump(settings))
            flags = [*self.flags, "--kv-connector", "disagg", "--disagg-config", str(config)]
            urls[role] = start(stack, where, f"disagg-{role}", self.model, core, flags, {})
        return SetUp(urls["decode"], list(urls.values()), servers)


def folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="multiround-"))


def prompts_of(conversation: int, turns: int) -> list[list[int]]:
    """The prompt of each turn: the one before, an answer, and what the user says now."""
    draw = random.Random(conversation)
    prompt = draw.choices(range(10, 40_000), k=FIRST_TOKENS)
    prompts = [prompt]
    for _ in range(turns - 1):
        prompt = prompt + draw.choices(range(10, 40_000), k=ANSWER_TOKENS + TURN_TOKENS)
        prompts.append(prompt)
    return prompts


def run(setup: SetUp, model: str, options: argparse.Namespace) -> dict[str, Any]:
    """All conversations, their turns in rotation."""
    client = Client(model)
    warm_up = random.Random(-1).choices(range(10, 40_000), k=FIRST_TOKENS)
    for _ in range(2):  # the first transfer wires agents up, the first look-up starts threads
        client.post(setup.url, warm_up, max_tokens=2, cache_salt="warm-up")
    conversations = [prompts_of(number, options.turns) for number in range(options.conversations)]
    per_turn: list[float] = []
    ttft_s: list[list[float]] = []
    for turn in range(options.turns):
        before = computed(client, setup.engines)
        times = []
        for prompts in conversations:
            times.append(client.stream(setup.url, prompts[turn], max_tokens=ANSWER_TOKENS).ttft_s)
            for server in setup.servers:
                server.when(is_written, within_s=60)  # a user reads and types before the next turn
        per_turn.append(computed(client, setup.engines) - before)
        ttft_s.append(times)
    return {
        "computed_tokens": int(sum(per_turn)),
        "computed_per_turn": [int(n) for n in per_turn],
        "ttft_s": round(statistics.median([t for times in ttft_s[1:] for t in times]), 3),
        "ttft_per_turn_s": [round(statistics.mean(times), 3) for times in ttft_s],
    }


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--conversations", type=int, default=3)
    parser.add_argument("--model", choices=["smollm2", "tiny"], default="smollm2")
    parser.add_argument("--only", choices=["stock", "stock_lmcache", "disagg", "disagg_lmcache"], nargs="*")
    options = parser.parse_args()
    model = str(models.smollm2() if options.model == "smollm2" else models.tiny())
    longest = FIRST_TOKENS + options.turns * (TURN_TOKENS + ANSWER_TOKENS)
    bench = Bench(model, longest)
    set_ups: dict[str, Callable[[], Any]] = {
        name: getattr(bench, name) for name in options.only or ("stock", "stock_lmcache", "disagg", "disagg_lmcache")
    }
    results = {}
    for name, set_up in set_ups.items():
        with set_up() as running:
            results[name] = run(running, model, options)
        print(f"{name:16} {results[name]}", flush=True)
    out: dict[str, Any] = {
        key: {name: result[key] for name, result in results.items()}
        for key in ("computed_tokens", "ttft_s", "computed_per_turn", "ttft_per_turn_s")
    }
    tokens = out["computed_tokens"]
    if {"stock_lmcache", "disagg_lmcache"} <= tokens.keys():
        out["disagg_lmcache_over_stock_lmcache"] = round(tokens["disagg_lmcache"] / tokens["stock_lmcache"], 4)
    out |= {"chunk_tokens": CHUNK, "turns": options.turns, "conversations": options.conversations}
    if options.json:
        print(json.dumps(out))


if __name__ == "__main__":
    main()
