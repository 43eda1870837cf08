"""With codec int8, an offloaded context predicts what a locally computed one predicts: real model, real engines.

Teacher forcing over real engines: the context is offloaded once, so its KV on the decode engine is what came over the
wire; then every longer prefix of one fixed continuation is asked for one token's logprobs. Those short rests are below
the offload threshold, hit the landed context in the decode engine's prefix cache, and see it through every layer. The
reference is the prefill engine, asked directly: an ordinary engine that computed the same context itself.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from e2e.client import Engine, at_once
from e2e.conftest import Plan, settings, settle
from e2e.offloads import Offloads
from e2e.predictions import TOP, TOPICS, Compared, assert_predicts_the_same, compare, ids_of, texts_of, top_logprobs
from e2e.running import end_running_fleet
from engines import free_port, vllm_env
from models import smollm2

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

CONTEXT_TOKENS = 224  # 7 blocks of 32
POSITIONS = 101


@pytest.fixture(scope="module")
def real_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Engine]]:
    """(prefill, decode) serving SmolLM2 with int8, its guard done with measuring."""
    end_running_fleet()
    folder = tmp_path_factory.mktemp("int8")
    ports = [free_port() for _ in range(4)]
    transfer = {"codec": "int8", "guard_tokens": 256}
    policy = {"prompt_length_threshold": 128}
    extra = ("--max-logprobs", str(TOP), "--max-model-len", "1024")
    worker = {"url": f"http://127.0.0.1:{ports[0]}", "side_channel": f"127.0.0.1:{ports[1]}"}
    model = smollm2()
    p_plan = Plan(
        "smol-prefill", model, ports[0], 0, settings("prefill", ports[1], transfer=transfer, split_policy=policy), extra
    )
    d_settings = settings("decode", ports[3], transfer=transfer, split_policy=policy, prefill_workers=[worker])
    d_plan = Plan("smol-decode", model, ports[2], 1, d_settings, extra)
    with ExitStack() as stack:
        prefill, decode = at_once([lambda plan=plan: plan.start(stack, folder) for plan in (p_plan, d_plan)])
        decode.when(lambda v: any(w["healthy"] for w in v["prefill_workers"]["workers"].values()))
        warm_up = ids_of(decode, " ".join(TOPICS) * 5)[:400]
        decode.complete(warm_up, max_tokens=1, cache_salt="guard")
        yield prefill, decode


def one_text(prefill: Engine, decode: Engine, ids: list[int], number: int) -> list[Compared]:
    """A context that is offloaded once, and what both engines expect behind it."""
    counted = Offloads(decode)
    compared = compare(
        ids,
        CONTEXT_TOKENS,
        lambda prefix: top_logprobs(prefill, prefix, f"local-{number}"),
        lambda prefix: top_logprobs(decode, prefix, f"offloaded-{number}"),
    )
    totals = counted.totals()
    assert (totals["offered"], totals["landed"], totals["fallbacks"]) == (1, 1, 0), "the context, and nothing else"
    (transfer,) = [t for t in decode.snapshot()["decode"]["recent"] if t["wire_bytes"] == totals["wire_bytes"]][-1:]
    assert transfer["codecs"], "layers with biased key channels are centred first (int8c), none goes raw"
    assert set(transfer["codecs"]) <= {"int8", "int8c"}
    assert totals["wire_bytes"] <= 0.27 * totals["raw_bytes"], "of an fp32 cache"
    return compared


def test_int8_kv_predicts_what_local_kv_predicts(real_pair: tuple[Engine, Engine], record_property: Any) -> None:
    prefill, decode = real_pair
    texts = texts_of(prefill, CONTEXT_TOKENS + POSITIONS)
    compared = [c for number, ids in enumerate(texts) for c in one_text(prefill, decode, ids, number)]
    mean_kl, agreement = assert_predicts_the_same(compared)
    record_property("mean_kl", mean_kl)
    record_property("top1_agreement", agreement)
    settle(decode)


def test_the_offline_example_prefills_on_the_running_prefill_engine(
    real_pair: tuple[Engine, Engine], tmp_path: Path
) -> None:
    """`LLM(...)` in the decode role; raw, so that its text is exactly the local one."""
    prefill, _ = real_pair
    before = settle(prefill)["prefill"]["totals"]["sent"]
    config = tmp_path / "disagg.yaml"
    worker = {"url": prefill.url, "side_channel": f"127.0.0.1:{prefill.side_port}"}
    offline = {"prefill_workers": [worker], "side_channel": {"port": free_port()}, "transfer": {"codec": "raw"}}
    config.write_text(yaml.safe_dump({**offline, "policy": {"offload": "threshold"}}))
    script = Path(__file__).parents[2] / "examples" / "03_offline" / "offline.py"
    done = subprocess.run(
        [sys.executable, str(script), prefill.model, str(config), "float32"],
        env={**os.environ, **vllm_env(core=1)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    prompt = "List everything that a ship's captain should check before leaving the harbour. " * 30
    assert repr(prefill.complete(prompt, cache_salt="offline").text) in done.stdout.splitlines()
    assert settle(prefill)["prefill"]["totals"]["sent"] == before + 1
