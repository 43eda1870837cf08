"""Do short queries wait behind long ones? TTFT of 20-token prompts between bursts of 2,000-token prompts.

    .venv/bin/python benchmarks/short_behind_long.py --json [--longs 12] [--shorts 60]

The same arrivals at a disagg pair that offloads by predicted latency (the default), at one that offloads by length, and
at a single stock engine, one after the other: ``longs`` prompts at once, then a short one every ``gap`` seconds while
they are served. Tiny model, a core per engine; a pair has two engines where the single engine is one: that is what is
compared.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from real_pair import Client, fresh_prompt, start, start_disagg_pair, tiny_model

LONG_TOKENS, SHORT_TOKENS = 2_000, 20
ALONE = 30


def burst(client: Client, url: str, options: argparse.Namespace) -> list[float]:
    """TTFT of each short prompt, seconds, open loop."""
    short_s: list[float] = []
    with ThreadPoolExecutor(options.longs + options.shorts) as pool:
        longs = [pool.submit(client.stream, url, fresh_prompt(LONG_TOKENS)) for _ in range(options.longs)]
        beat = threading.Event()
        shorts = []
        for _ in range(options.shorts):
            shorts.append(pool.submit(client.stream, url, fresh_prompt(SHORT_TOKENS), time.monotonic()))
            beat.wait(options.gap_s)
            if all(future.done() for future in longs):
                break
        short_s = [future.result().ttft_s for future in shorts]
        for future in longs:
            future.result()
    return short_s


def quantiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "n": len(ordered),
        "p50_s": statistics.median(ordered),
        "p99_s": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object (always so)")
    parser.add_argument("--longs", type=int, default=12)
    parser.add_argument("--shorts", type=int, default=100, help="at most; they end with the last long one")
    parser.add_argument("--bursts", type=int, default=4)
    parser.add_argument("--gap-s", type=float, default=0.05)
    options = parser.parse_args()
    model = tiny_model()
    folder = Path(tempfile.mkdtemp(prefix="short-behind-long-"))
    result: dict[str, Any] = {}
    for policy in ("latency", "threshold"):
        with ExitStack() as stack:
            pair = start_disagg_pair(stack, folder, model, decode={"policy": {"offload": policy}})
            result[policy] = _measured(policy, pair.urls["decode"], options, model)
            result[policy]["decisions"] = pair.view("decode")["decode"]["decisions"]
    with ExitStack() as stack:
        url = start(stack, folder, "stock", model, 1, [], {})
        result["stock"] = _measured("stock", url, options, model)
    result["p99_ratio"] = {p: result[p]["p99_s"] / result["stock"]["p99_s"] for p in ("latency", "threshold")}
    print(json.dumps(result))


def _measured(name: str, url: str, options: argparse.Namespace, model: str) -> dict[str, Any]:
    client = Client(model)
    burst(client, url, options)  # warm-up
    found: dict[str, Any] = quantiles([s for _ in range(options.bursts) for s in burst(client, url, options)])
    alone_s = [client.stream(url, fresh_prompt(SHORT_TOKENS), time.monotonic()).ttft_s for _ in range(ALONE)]
    found["p50_vs_alone"] = found["p50_s"] / statistics.median(alone_s)
    print(
        f"{name:9} short prompts: TTFT p50 {1e3 * found['p50_s']:.0f} ms, p99 {1e3 * found['p99_s']:.0f} ms, "
        f"p50 {found['p50_vs_alone']:.2f} x alone"
    )
    return found


if __name__ == "__main__":
    main()
