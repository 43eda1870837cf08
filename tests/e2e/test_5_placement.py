"""One decode engine and two prefill engines: who gets a prompt, why, and what happens when a worker is flooded or gone.

Ordered; five engine starts: the three, one of them again, and a decode engine with a policy from a package of its own.
"""

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from e2e.client import Engine, at_once, same_tokens
from e2e.conftest import SPLIT, Plan, settings, settle
from e2e.offloads import prompt_of
from e2e.running import end_running_fleet
from engine_processes import end_tree, slowed
from engines import free_port
from models import tiny
from own_policy import install_own_policy

from disagg_plugin.serving.prefix_hash import CHUNK_TOKENS as DIGEST_TOKENS

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]


@dataclass
class Trio:
    """The engines, how they were started, and what ends them."""

    plans: dict[str, Plan]
    lives: dict[str, ExitStack]
    engines: dict[str, Engine]
    folder: Path

    def start(self, name: str) -> None:
        self.engines[name] = self.plans[name].start(self.lives[name], self.folder)

    @property
    def decode(self) -> Engine:
        return self.engines["d"]

    def worker(self, name: str) -> str:
        """The name under which the decode engine knows a prefill engine."""
        return f"127.0.0.1:{self.plans[name].settings['side_channel']['port']}"  # type: ignore[index]

    def seen(self, name: str, view: dict[str, Any]) -> dict[str, Any]:
        """What the decode engine knows of a prefill engine."""
        state: dict[str, Any] = view["prefill_workers"]["workers"][self.worker(name)]
        return state

    def holds_and_rests(self, name: str, view: dict[str, Any], chunks: int = 0) -> bool:
        """It has told the decode engine of at least so many chunks of prefixes, and of an empty queue."""
        seen = self.seen(name, view)
        return not (seen["queued_requests"] or seen["queued_prefill_tokens"]) and bool(seen["digest_chunks"] >= chunks)

    def has_p0_flooded(self, view: dict[str, Any]) -> bool:
        seen = self.seen("p0", view)
        return bool(seen["healthy"] and seen["queued_prefill_tokens"] > 0)

    def served_by(self, prompts: list[list[int]], *, at_the_same_time: bool = False, **params: Any) -> Counter[str]:
        """Which prefill engines' KV these prompts were answered with."""
        before = len(self.decode.snapshot()["decode"]["recent"])
        calls = [lambda p=prompt: self.decode.complete(p, max_tokens=2, **params) for prompt in prompts]
        _ = at_once(calls) if at_the_same_time else [call() for call in calls]
        recent = settle(self.decode)["decode"]["recent"][before:]
        assert [t["failure"] for t in recent] == [""] * len(recent)
        names = {self.worker(name): name for name in ("p0", "p1")}
        return Counter(names[transfer["peer"]] for transfer in recent)


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    end_running_fleet()
    folder = tmp_path_factory.mktemp("trio")
    plans, workers = {}, []
    for name, core in (("p0", 0), ("p1", 0)):
        port, side_port = free_port(), free_port()
        plans[name] = Plan(name, tiny(), port, core, settings("prefill", side_port))
        workers.append({"url": f"http://127.0.0.1:{port}", "side_channel": f"127.0.0.1:{side_port}"})
    # shared cores make a link look slow for a moment; a killed worker must be left as early as for a user
    split = {**SPLIT, "link_weight": 0.0, "suspect_after_s": 1.0}
    decode = settings("decode", free_port(), prefill_workers=workers, split_policy=split)
    plans["d"] = Plan("d", tiny(), free_port(), 1, decode)
    with ExitStack() as stack:
        trio = Trio(plans, {name: stack.enter_context(ExitStack()) for name in plans}, {}, folder)
        at_once([lambda name=name: trio.start(name) for name in plans])
        trio.decode.when(lambda v: all(w["healthy"] for w in v["prefill_workers"]["workers"].values()))
        for name in ("p0", "p1"):  # speeds are measured first while nobody disturbs
            for seed in range(6):
                trio.engines[name].complete(prompt_of(800, seed=200 + seed), max_tokens=1)
        trio.served_by([prompt_of(600, seed=i) for i in range(8)], at_the_same_time=True)  # wires both links up
        yield trio


def test_long_prompts_spread_over_both_workers(trio: Trio) -> None:
    """By seconds of work, so as far from 6 : 6 as the two speeds that were measured on shared cores are apart."""
    served = trio.served_by([prompt_of(1_500, seed=10 + i) for i in range(12)], at_the_same_time=True)
    assert served.total() == 12
    assert min(served["p0"], served["p1"]) >= 2, "neither is left idle while the other queues"


def test_a_repeated_prefix_goes_where_the_prefix_is(trio: Trio) -> None:
    """Two prompts of other prefixes first, so that following the last choice or taking turns would fail."""
    for name in ("p0", "p1"):
        system = prompt_of(1_024, seed=30 + int(name[1]))
        held = trio.seen(name, trio.decode.snapshot())["digest_chunks"]
        direct = trio.engines[name].complete([*system, *prompt_of(200, seed=40)], max_tokens=1)
        assert direct.prompt_tokens == 1_224
        trio.decode.when(lambda v, name=name, held=held: trio.holds_and_rests(name, v, held + 1_224 // DIGEST_TOKENS))
    for number, name in enumerate(("p1", "p0", "p1", "p0")):
        system = prompt_of(1_024, seed=30 + int(name[1]))
        assert trio.served_by([[*system, *prompt_of(200, seed=41 + number)]]) == {name: 1}
        trio.decode.when(lambda v: all(trio.holds_and_rests(worker, v) for worker in ("p0", "p1")))


def test_a_worker_under_a_flood_of_direct_requests_is_avoided(trio: Trio) -> None:
    flooded = trio.engines["p0"]
    with ThreadPoolExecutor(16) as pool:
        with slowed(flooded, stands_times=8):
            flood = [pool.submit(flooded.complete, prompt_of(3_000, seed=60 + i), max_tokens=1) for i in range(16)]
            trio.decode.when(lambda v: trio.seen("p0", v)["queued_prefill_tokens"] > 12_000, every_s=0.02)
            served = trio.served_by([prompt_of(400, seed=80 + i) for i in range(4)])
            trio.decode.when(trio.has_p0_flooded, every_s=0.02)  # still, and not left for another reason
        for future in flood:
            future.result()
    assert served == {"p1": 4}


def test_a_killed_worker_is_left_within_a_second_and_used_again_after_its_restart(trio: Trio) -> None:
    local = trio.engines["p1"].complete(prompt_of(700, seed=91), cache_salt="local")
    end_tree(trio.engines["p0"], signal.SIGKILL)
    killed_s = time.monotonic()
    trio.decode.when(lambda v: not trio.seen("p0", v)["healthy"], every_s=0.02)
    assert time.monotonic() - killed_s < 1.5, "a second, and what the snapshots take"
    before = len(trio.decode.snapshot()["decode"]["recent"])
    assert same_tokens(trio.decode.complete(prompt_of(700, seed=91), cache_salt="killed"), local)
    served = trio.served_by([prompt_of(700, seed=92 + i) for i in range(3)], at_the_same_time=True)
    assert served == {"p1": 3}
    (first,) = trio.decode.snapshot()["decode"]["recent"][before : before + 1]
    assert (first["peer"], first["failure"]) == (trio.worker("p1"), "")
    trio.lives["p0"].close()
    trio.start("p0")
    trio.decode.when(lambda v: trio.seen("p0", v)["healthy"], within_s=60)
    served = trio.served_by([prompt_of(1_500, seed=100 + i) for i in range(10)], at_the_same_time=True)
    assert served["p0"] >= 1


def test_every_decision_is_counted_and_explained(trio: Trio) -> None:
    before = trio.decode.snapshot()["decode"]["decisions"]
    trio.decode.complete(prompt_of(20, seed=120), max_tokens=1)
    trio.decode.complete(prompt_of(500, seed=121), max_tokens=1)
    trio.decode.complete(prompt_of(500, seed=121), max_tokens=1)  # all but the last block is cached now
    view = settle(trio.decode)["decode"]
    counted = {reason: n - before.get(reason, 0) for reason, n in view["decisions"].items()}
    assert {reason: n for reason, n in counted.items() if n} == {
        "short_prompt": 1,
        "over_threshold": 1,
        "cached_enough": 1,
    }
    short, long, cached = view["decision_log"][-3:]
    assert [row["reason"] for row in (short, long, cached)] == ["short_prompt", "over_threshold", "cached_enough"]
    assert (long["action"], long["placed_by"], long["decided_by"]) == ("offload", "score", "threshold")
    assert set(long["workers"]) <= {trio.worker("p0"), trio.worker("p1")}
    assert cached["held_tokens"] == 480


def test_an_own_policy_that_is_installed_decides_in_a_real_engine(trio: Trio, tmp_path: Path) -> None:
    """``when_busy`` keeps what arrives at an idle engine, and leaves the rest to the built-in behind it."""
    trio.lives["d"].close()
    plan = trio.plans["d"]
    assert plan.settings is not None
    own = {**plan.settings, "policy": {"offload": ["when_busy", "latency"]}}
    paths = [str(install_own_policy(tmp_path)), *filter(None, [os.environ.get("PYTHONPATH")])]
    trio.plans["d"] = replace(plan, name="d-own", settings=own, env={"PYTHONPATH": os.pathsep.join(paths)})
    trio.start("d")
    trio.decode.when(lambda v: all(w["healthy"] for w in v["prefill_workers"]["workers"].values()))
    trio.decode.complete(prompt_of(900, seed=130), max_tokens=1)
    (row,) = trio.decode.snapshot()["decode"]["decision_log"]
    assert (row["reason"], row["decided_by"]) == ("decode_idle", "when_busy")
    with trio.decode.decoding(prompt_of(30, seed=131)):
        trio.decode.complete(prompt_of(900, seed=132), max_tokens=1)
    row = trio.decode.snapshot()["decode"]["decision_log"][-1]
    assert row["reason"] in ("remote_faster", "local_faster")
    assert row["decided_by"] == "latency"
    assert row["local_ttft_s"] > 0
    assert row["remote_ttft_s"] > 0
    assert "when_busy" in trio.decode.snapshot()["decode"]["policies"]["chains"]["offload"]
