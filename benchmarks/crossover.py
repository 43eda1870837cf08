"""Is the latency policy as good as the better of always-local and always-offload, at every prompt length?

    .venv/bin/python benchmarks/crossover.py --json [--repeats 30] [--lengths 16,64,...] [--decodes 4] [--png FILE]

One real pair, tiny model, a core per engine. Each round sends a fresh prompt of every length three times, in random
order: decided by ``latency``, forced to stay, forced to go. The first half of the rounds meets an idle decode engine,
in the second half it decodes for others all the time, which makes local prefills slower.

A length's ratio: median TTFT under ``latency`` over the smaller of the two forced medians. ``ci95`` is a percentile
bootstrap over the TTFTs of that length (both medians and which of them is smaller are drawn anew each time);
``worst_ratio`` is the largest ratio, with its own interval.
"""

import argparse
import itertools
import json
import random
import statistics
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event
from typing import Any

from crossover_policy import ALWAYS_LOCAL, ALWAYS_OFFLOAD, LATENCY
from real_pair import Client, fresh_prompt, start_disagg_pair, tiny_model

MODES = {"latency": LATENCY, "local": ALWAYS_LOCAL, "offload": ALWAYS_OFFLOAD}
BOOTSTRAPS = 2_000
Times = dict[str, list[float]]  # by mode, seconds


def ratio(times: Times) -> float:
    medians = {mode: statistics.median(seconds) for mode, seconds in times.items()}
    return medians["latency"] / min(medians["local"], medians["offload"])


def interval(times: Times) -> tuple[float, float]:
    """95 % of what the ratio would be over samples like these."""
    draw = random.Random(0)
    ratios = sorted(
        ratio({mode: draw.choices(seconds, k=len(seconds)) for mode, seconds in times.items()})
        for _ in range(BOOTSTRAPS)
    )
    return ratios[int(0.025 * BOOTSTRAPS)], ratios[int(0.975 * BOOTSTRAPS)]


@contextmanager
def decoding(client: Client, url: str, streams: int) -> Iterator[None]:
    """``streams`` requests decode on this engine all the time."""
    stop = Event()

    def keep_decoding() -> None:
        while not stop.is_set():
            client.post(url, fresh_prompt(12), max_tokens=400, priority=ALWAYS_LOCAL)

    with ThreadPoolExecutor(max(1, streams)) as pool:
        for _ in range(streams):
            pool.submit(keep_decoding)
        try:
            yield
        finally:
            stop.set()


def sweep(client: Client, url: str, lengths: list[int], rounds: int) -> dict[int, Times]:
    times: dict[int, Times] = {length: {mode: [] for mode in MODES} for length in lengths}
    for _, length in itertools.product(range(rounds), lengths):
        for mode in random.sample(list(MODES), len(MODES)):
            timed = client.stream(url, fresh_prompt(length), priority=MODES[mode])
            times[length][mode].append(timed.ttft_s)
    return times


def measure(options: argparse.Namespace, lengths: list[int]) -> tuple[dict[str, dict[int, Times]], dict[str, Any]]:
    """TTFTs by load and length, and the decode engine's last debug snapshot."""
    folder = Path(tempfile.mkdtemp(prefix="crossover-"))
    with ExitStack() as stack:
        pair = start_disagg_pair(
            stack,
            folder,
            tiny_model(),
            decode={
                "policy": {"module": "crossover_policy", "hook_timeout_ms": 50},
                "split_policy": {"prompt_length_threshold": 1},
            },
            env={"PYTHONPATH": str(Path(__file__).parent)},
            extra=["--scheduling-policy", "priority"],
        )
        client, url = Client(tiny_model()), pair.urls["decode"]
        found: dict[str, dict[int, Times]] = {}
        for load, streams in (("idle", 0), ("decoding", options.decodes)):
            with decoding(client, url, streams):
                sweep(client, url, lengths, 4)  # warm-up, and what the latency model learns from
                found[load] = sweep(client, url, lengths, options.repeats)
        return found, pair.view("decode")


def plot(found: dict[str, dict[int, Times]], path: str) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(6 * len(found), 4), sharey=True)
    for axis, (load, by_length) in zip(axes, found.items(), strict=True):
        for mode in ("local", "offload", "latency"):
            medians = [1e3 * statistics.median(times[mode]) for times in by_length.values()]
            axis.plot(list(by_length), medians, marker="o", label=mode, linewidth=3 if mode == "latency" else 1)
        axis.set(title=f"decode engine {load}", xlabel="prompt tokens", xscale="log", yscale="log")
    axes[0].set_ylabel("TTFT p50, ms")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object (always so)")
    parser.add_argument("--repeats", type=int, default=30, help="of each length, mode and load")
    parser.add_argument("--lengths", default="16,64,200,500,1000,2000,3000")
    parser.add_argument("--decodes", type=int, default=4, help="requests that decode meanwhile, in the second half")
    parser.add_argument("--png", default="", help="write the plot here")
    options = parser.parse_args()
    found, view = measure(options, [int(n) for n in options.lengths.split(",")])
    by_length: dict[str, dict[str, Any]] = {}
    for load, lengths in found.items():
        for length, times in lengths.items():
            low, high = interval(times)
            medians = {f"{mode}_s": statistics.median(seconds) for mode, seconds in times.items()}
            by_length[f"{load} {length}"] = {"ratio": ratio(times), "ci95": [low, high], **medians}
            print(
                f"{load:8} {length:>5} tokens: "
                + ", ".join(f"{mode} {1e3 * medians[f'{mode}_s']:.1f} ms" for mode in MODES)
                + f": {ratio(times):.3f} [{low:.3f}, {high:.3f}]"
            )
    worst = max(by_length.values(), key=lambda row: row["ratio"])
    print("decisions:", view["decode"]["decisions"])
    if options.png:
        plot(found, options.png)
    print(json.dumps({"worst_ratio": worst["ratio"], "ci95": worst["ci95"], "by_length": by_length}))


if __name__ == "__main__":
    main()
