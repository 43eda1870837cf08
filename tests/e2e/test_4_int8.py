"""With codec int8, an offloaded context predicts what a locally computed one predicts: real model, real engines.

Teacher forcing over real engines: the context is offloaded once, so its KV on the decode engine is what came over the
wire; then every longer prefix of one fixed continuation is asked for one token's logprobs. Those short rests are below
the offload threshold, hit the landed context in the decode engine's prefix cache, and see it through every layer. The
reference is the prefill engine, asked directly: an ordinary engine that computed the same context itself.
"""

import math
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
from e2e.running import end_running_fleet
from engines import free_port, vllm_env
from models import smollm2

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

CONTEXT_TOKENS = 224  # 7 blocks of 32
POSITIONS = 101
TOP = 200
TOPICS = (
    "The lighthouse keeper wrote in his diary every evening, even in winter when",
    "A compiler translates a program in several passes. First it",
    "In 1666 a great fire destroyed most of the city. Historians agree that",
    "To bake bread you need flour, water, salt and patience. Begin by",
    "The patient was admitted with a fever and a persistent cough; the doctors",
)


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


def ids_of(engine: Engine, text: str) -> list[int]:
    response = engine.http.post(f"{engine.url}/tokenize", json={"model": engine.model, "prompt": text})
    ids: list[int] = response.json()["tokens"]
    return ids


def top_logprobs(engine: Engine, prompt: list[int], salt: str) -> dict[str, float]:
    """Logprobs of the most likely next tokens, by token id."""
    body = {"model": engine.model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": TOP}
    body |= {"cache_salt": salt, "return_tokens_as_token_ids": True}
    response = engine.http.post(f"{engine.url}/v1/completions", json=body)
    assert response.status_code == 200, response.text
    top: dict[str, float] = response.json()["choices"][0]["logprobs"]["top_logprobs"][0]
    return top


def kl_divergence(local: dict[str, float], offloaded: dict[str, float]) -> float:
    """KL(local || offloaded) in nats, over the tokens that both name and one bucket for all others.

    The bucket bounds the tail from below by the data-processing inequality; with 200 tokens named it holds little.
    """
    both = local.keys() & offloaded.keys()
    kl = sum(math.exp(local[t]) * (local[t] - offloaded[t]) for t in both)
    rest_p = max(1e-12, 1 - sum(math.exp(local[t]) for t in both))
    rest_q = max(1e-12, 1 - sum(math.exp(offloaded[t]) for t in both))
    return kl + rest_p * math.log(rest_p / rest_q)


def one_text(prefill: Engine, decode: Engine, topic: str, number: int) -> list[tuple[float, bool, float]]:
    """(KL, same first choice, local mass outside the compared tokens) at each position of one text."""
    seed_ids = ids_of(prefill, topic)
    wanted = CONTEXT_TOKENS + POSITIONS
    body = {"model": prefill.model, "prompt": seed_ids, "max_tokens": wanted, "temperature": 0.8, "seed": number}
    body |= {"ignore_eos": True, "return_token_ids": True, "cache_salt": f"make-{number}"}
    reply = prefill.http.post(f"{prefill.url}/v1/completions", json=body).json()
    ids = (seed_ids + reply["choices"][0]["token_ids"])[:wanted]
    counted = Offloads(decode)
    compared = []
    for position in range(CONTEXT_TOKENS, wanted):
        prefix = ids[: position + 1]
        local, offloaded = at_once(
            [
                lambda p=prefix: top_logprobs(prefill, p, f"local-{number}"),
                lambda p=prefix: top_logprobs(decode, p, f"offloaded-{number}"),
            ]
        )
        named = sum(math.exp(local[t]) for t in local.keys() & offloaded.keys())
        same = max(local, key=local.__getitem__) == max(offloaded, key=offloaded.__getitem__)
        compared.append((kl_divergence(local, offloaded), same, 1 - named))
    totals = counted.totals()
    assert (totals["offered"], totals["landed"], totals["fallbacks"]) == (1, 1, 0), "the context, and nothing else"
    (transfer,) = [t for t in decode.snapshot()["decode"]["recent"] if t["wire_bytes"] == totals["wire_bytes"]][-1:]
    assert transfer["codecs"], "layers with biased key channels are centred first (int8c), none goes raw"
    assert set(transfer["codecs"]) <= {"int8", "int8c"}
    assert totals["wire_bytes"] <= 0.27 * totals["raw_bytes"], "of an fp32 cache"
    return compared


def test_int8_kv_predicts_what_local_kv_predicts(real_pair: tuple[Engine, Engine], record_property: Any) -> None:
    prefill, decode = real_pair
    compared = [c for number, topic in enumerate(TOPICS) for c in one_text(prefill, decode, topic, number)]
    mean_kl = sum(kl for kl, _, _ in compared) / len(compared)
    agreement = sum(same for _, same, _ in compared) / len(compared)
    record_property("mean_kl", mean_kl)
    record_property("top1_agreement", agreement)
    print(f"\n{len(compared)} positions: mean KL {mean_kl:.2e}, top-1 agreement {agreement:.4f}")
    assert len(compared) >= 500
    assert sum(tail for _, _, tail in compared) / len(compared) < 0.2, "most of the probability is compared by token"
    assert mean_kl <= 5e-4
    assert agreement >= 0.99
    settle(decode)
    settle(prefill)


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
        [sys.executable, str(script), prefill.model, str(config)],
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
