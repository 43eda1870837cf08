"""TTFT of an offloaded prompt against a local prefill, and the hand-over it exposes; stock vLLM's beside it.

    .venv/bin/python benchmarks/handover.py --json [--repeats 7] [--lengths 100,400,1500,3000]

First a disagg pair (decode engine offloads by itself), then, after it has ended, a stock pair with NixlConnector,
driven as its proxies drive it: prefill with ``max_tokens=1`` on P, then the request on D. Tiny model, raw KV, one core
per engine. Every measurement of an offload stands directly beside a local prefill of another prompt of that length on
the pair's own prefill engine, which is an ordinary engine when asked directly. Ratios are of medians.

Exposed hand-over: from the end of P's last prefill step (recorded there) to D's first token at the client, less one
decode step of D (the median gap between its tokens): the token that D computes in any case.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from engines import free_port
from real_pair import Client, fresh_prompt, start, start_disagg_pair, tiny_model

Measure = Callable[[list[int]], tuple[float, float | None]]


def interleaved(
    lengths: list[int], repeats: int, local: Callable[[list[int]], float], offload: Measure
) -> tuple[dict[str, float], dict[str, dict[str, float]], list[float]]:
    """Local and offloaded TTFT of each length in turn: (ratios of medians, medians in seconds, exposed seconds)."""
    for length in lengths:  # warm-up: page-ins, NIXL wire-up
        local(fresh_prompt(length))
        offload(fresh_prompt(length))
    times: dict[int, tuple[list[float], list[float]]] = {length: ([], []) for length in lengths}
    exposed: list[float] = []
    for _ in range(repeats):
        for length in lengths:
            times[length][0].append(local(fresh_prompt(length)))
            ttft_s, exposed_s = offload(fresh_prompt(length))
            times[length][1].append(ttft_s)
            if exposed_s is not None:
                exposed.append(exposed_s)
    medians = {
        str(n): {"local": statistics.median(a), "offloaded": statistics.median(b)} for n, (a, b) in times.items()
    }
    return {n: m["offloaded"] / m["local"] for n, m in medians.items()}, medians, exposed


def disagg_pair(model: str, folder: Path, lengths: list[int], repeats: int) -> dict[str, Any]:
    with ExitStack() as stack:
        always = {"split_policy": {"prompt_length_threshold": 0}, "policy": {"offload": "threshold"}}
        pair = start_disagg_pair(stack, folder, model, decode=always)
        urls, view = pair.urls, pair.view
        client = Client(model)
        gaps: list[float] = []

        def local(prompt: list[int]) -> float:
            return client.stream(urls["prefill"], prompt).ttft_s

        def offload(prompt: list[int]) -> tuple[float, float | None]:
            timed = client.stream(urls["decode"], prompt)
            gaps.extend(timed.gaps_s)
            transfer = view("decode")["decode"]["recent"][-1]
            if transfer["state"] != "landed" or transfer["prompt_tokens"] != len(prompt):
                raise SystemExit(f"not offloaded: {transfer}")
            while True:
                sent = {t["transfer_id"]: t for t in view("prefill")["prefill"]["recent"]}
                if transfer["transfer_id"] in sent:
                    break
            return timed.ttft_s, timed.first_token_s - sent[transfer["transfer_id"]]["last_computed_s"]

        ratios, medians, exposed = interleaved(lengths, repeats, local, offload)
    return {"ratio": ratios, "medians_s": medians, **_exposed(exposed, gaps)}


def stock_pair(model: str, folder: Path, lengths: list[int], repeats: int) -> dict[str, Any]:
    connector = json.dumps({"kv_connector": "NixlConnector", "kv_role": "kv_both"})
    with ExitStack() as stack:
        urls = {}
        for core, role in enumerate(("prefill", "decode")):
            env = {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()), "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1"}
            urls[role] = start(stack, folder, f"stock-{role}", model, core, ["--kv-transfer-config", connector], env)
        client = Client(model)
        gaps: list[float] = []

        def local(prompt: list[int]) -> float:
            return client.stream(urls["prefill"], prompt).ttft_s

        def offload(prompt: list[int]) -> tuple[float, float | None]:
            started_s = time.monotonic()
            ask = {"do_remote_decode": True, "do_remote_prefill": False}
            ask |= dict.fromkeys(("remote_engine_id", "remote_block_ids", "remote_host", "remote_port"))
            reply = client.post(urls["prefill"], prompt, max_tokens=1, kv_transfer_params=ask)
            answered_s = time.monotonic()
            timed = client.stream(urls["decode"], prompt, started_s, kv_transfer_params=reply["kv_transfer_params"])
            gaps.extend(timed.gaps_s)
            return timed.ttft_s, timed.first_token_s - answered_s

        ratios, medians, exposed = interleaved(lengths, repeats, local, offload)
    return {"ratio": ratios, "medians_s": medians, **_exposed(exposed, gaps)}


def _exposed(exposed: list[float], gaps: list[float]) -> dict[str, Any]:
    """Less the decode step for the token that D computes in any case."""
    step_s = statistics.median(gaps)
    exposed_ms = sorted(1e3 * (e - step_s) for e in exposed)
    return {
        "decode_step_ms": 1e3 * step_s,
        "exposed_ms": {
            "p50": statistics.median(exposed_ms),
            "p99": exposed_ms[min(len(exposed_ms) - 1, int(0.99 * len(exposed_ms)))],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object (always so)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--lengths", default="100,400,1500,3000")
    parser.add_argument("--no-stock", action="store_true", help="only the disagg pair")
    options = parser.parse_args()
    lengths = [int(n) for n in options.lengths.split(",")]
    model = tiny_model()
    with tempfile.TemporaryDirectory(prefix="handover-") as name:
        folder = Path(os.environ.get("HANDOVER_LOGS", name))
        disagg = disagg_pair(model, folder, lengths, options.repeats)
        stock = None if options.no_stock else stock_pair(model, folder, lengths, options.repeats)
    result: dict[str, Any] = {
        "ratio": {"disagg": disagg["ratio"]},
        "worst_ratio": {"disagg": max(disagg["ratio"].values())},
        "exposed_ms": disagg["exposed_ms"],
        "decode_step_ms": disagg["decode_step_ms"],
        "medians_s": {"disagg": disagg["medians_s"]},
    }
    if stock is not None:
        result["ratio"]["stock"] = stock["ratio"]
        result["worst_ratio"]["stock"] = max(stock["ratio"].values())
        result["medians_s"]["stock"] = stock["medians_s"]
    for name_, medians in result["medians_s"].items():
        for length, m in medians.items():
            ratio = m["offloaded"] / m["local"]
            print(
                f"{name_:7} {length:>5} tokens: local {m['local']:.3f} s, offloaded {m['offloaded']:.3f} s: {ratio:.2f}"
            )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
