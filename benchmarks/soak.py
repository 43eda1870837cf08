"""Thousands of requests with random faults: how many were lost, hung, answered wrongly, or left something behind.

    .venv/bin/python benchmarks/soak.py --json [--requests 2000] [--seed 1]
    .venv/bin/python benchmarks/soak.py --json --engines [--requests 200]

Without ``--engines``: two prefill engines and a decode engine in processes of their own, synthetic but for the plugin
(``tests/faults``): real NIXL, side channel and HTTP, every link through a relay, and KV of which every byte is checked.
With it: a real vLLM pair with the tiny model; the text of each request is compared with what the prefill engine said
of the same prompt beforehand, by itself.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import httpx
from e2e.client import Answer, Engine, same_tokens
from e2e.conftest import Plan, is_quiet, settings
from e2e.offloads import prompt_of
from engine_processes import end_tree
from engines import free_port
from faults.harness import Fleet, Zygote
from faults.soak import Soak
from models import tiny

from disagg_plugin.control.keys import generate

ENDS_WITHIN_S = 120.0
AT_ONCE = 5


def synthetic(requests: int, seed: int) -> dict[str, Any]:
    """The engine-free harness."""
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys"
        generate(keys, fleet=True)
        zygote = Zygote(Path(folder))
        fleet = Fleet(zygote, prefills=2, keys=dict.fromkeys(("p1", "p2", "d"), str(keys)))
        try:
            soak = Soak(fleet, seed)
            tally = soak.run(requests)
        finally:
            fleet.close()
            zygote.close()
    for found in tally.found:
        print(found, file=sys.stderr)
    return tally.report()


class EnginePair:
    """A real prefill and decode engine, and the faults that they can be put through."""

    def __init__(self, stack: ExitStack, folder: Path, seed: int) -> None:
        self._folder, self._random = folder, random.Random(seed)
        p_port, p_side, d_port, d_side = (free_port() for _ in range(4))
        self._life = stack.enter_context(ExitStack())
        self._plan = Plan("prefill", tiny(), p_port, 0, settings("prefill", p_side))
        worker = {"url": f"http://127.0.0.1:{p_port}", "side_channel": f"127.0.0.1:{p_side}"}
        decode = settings("decode", d_side, prefill_workers=[worker])
        self.prefill = self._plan.start(self._life, folder)
        self.decode = Plan("decode", tiny(), d_port, 1, decode).start(stack, folder)
        self.wait_until_connected()

    def wait_until_connected(self) -> None:
        self.decode.when(
            lambda v: any(w["healthy"] for w in v["prefill_workers"]["workers"].values()), within_s=ENDS_WITHIN_S
        )

    def strike(self, fault: str) -> None:
        if fault == "p_stopped":
            end_tree(self.prefill, signal.SIGSTOP)
            threading.Event().wait(self._random.choice((0.5, 4.0)))
            end_tree(self.prefill, signal.SIGCONT)
        elif fault == "p_killed":
            end_tree(self.prefill, signal.SIGKILL)

    def mend(self, fault: str) -> None:
        if fault == "p_killed":
            self._life.close()
            self.prefill = self._plan.start(self._life, self._folder)
            self.wait_until_connected()


def on_engines(requests: int, seed: int) -> dict[str, Any]:
    """A real pair: 20 prompts, again and again under other cache salts."""
    noise = random.Random(seed)
    prompts = [prompt_of(noise.choice((200, 700, 1_500, 2_500)), seed=number) for number in range(20)]
    counted: Counter[str] = Counter()
    by_fault: Counter[str] = Counter()
    rounds = requests // AT_ONCE
    killed = {rounds // 3, 2 * rounds // 3}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        pair = EnginePair(stack, Path(folder), seed)
        expected = [pair.prefill.complete(prompt, cache_salt="expected") for prompt in prompts]
        pair.decode.complete(prompts[0], cache_salt="warm-up")
        for number in range(rounds):
            fault = "p_killed" if number in killed else noise.choice(("none", "p_stopped", "d_aborts", "d_aborts"))
            by_fault[fault] += AT_ONCE
            chosen = [noise.randrange(len(prompts)) for _ in range(AT_ONCE)]
            with ThreadPoolExecutor(AT_ONCE) as pool:
                gone = fault == "d_aborts"
                futures = [
                    pool.submit(ask, pair.decode, prompts[which], f"{number}-{at}", gone and at % 2 == 0)
                    for at, which in enumerate(chosen)
                ]
                threading.Event().wait(noise.choice((0.0, 0.1, 0.5)))
                pair.strike(fault)
                for which, future in zip(chosen, futures, strict=True):
                    counted[judge(future.result(), expected[which])] += 1
            pair.mend(fault)
            counted["leaked"] += leaks(pair)
        fallbacks = pair.decode.snapshot()["decode"]["fallbacks"]
        landed = pair.decode.snapshot()["decode"]["totals"]["landed"]
    names = ("lost", "hung", "wrong", "leaked")
    return {
        "requests": rounds * AT_ONCE,
        **{name: counted[name] for name in names},
        "by_fault": dict(by_fault),
        "outcomes": {"right": counted["right"], "gone": counted["gone"], "landed": landed, "fallbacks": fallbacks},
    }


def ask(engine: Engine, prompt: list[int], salt: str, goes_away: bool) -> Answer | str:
    """An answer, or in a word why there is none."""
    if goes_away:
        body = {"model": engine.model, "prompt": prompt, "max_tokens": 16, "cache_salt": salt}
        try:
            httpx.post(f"{engine.url}/v1/completions", json=body, timeout=random.choice((0.05, 0.3, 1.0)))
        except httpx.TimeoutException:
            return "gone"
        return "gone"
    try:
        with httpx.Client(timeout=ENDS_WITHIN_S) as http:
            own = Engine(engine.url, engine.model, engine.side_port, http=http)
            return own.complete(prompt, cache_salt=salt)
    except httpx.TimeoutException:
        return "hung"
    except (httpx.HTTPError, AssertionError):
        return "lost"


def judge(answer: Answer | str, expected: Answer) -> str:
    if isinstance(answer, str):
        return answer
    return "right" if same_tokens(answer, expected) else "wrong"


def leaks(pair: EnginePair) -> int:
    """Engines that are not quiet after a while."""
    found = 0
    for engine in (pair.decode, pair.prefill):
        try:
            engine.when(is_quiet, within_s=60.0)
        except AssertionError as error:
            print(error, file=sys.stderr)
            found += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--engines", action="store_true")
    parser.add_argument("--requests", type=int)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    started = time.monotonic()
    run, usual = (on_engines, 200) if arguments.engines else (synthetic, 2_000)
    figures = run(arguments.requests or usual, arguments.seed)
    figures["seconds"] = round(time.monotonic() - started, 1)
    if not arguments.json:
        for name, value in figures.items():
            print(f"{name:>10}  {value}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
