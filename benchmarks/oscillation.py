"""Whether admitted load swings: both admission policies in front of the same fleet, in virtual time.

    python benchmarks/oscillation.py [--json] [--seconds 600] [--out oscillation.png]

The setting is Mooncake's (arXiv 2407.00079, section 7): many prefill workers, each of which takes long for a prompt,
feed one decode engine. Whoever is let in because the decode engine is empty arrives there seconds later, together with
all others that were. Prompts come at twice the capacity, Poisson; prefill and decode have equal capacities; a decode
lasts longer in a larger batch. The policies are the ones that the plugin ships; both see the fleet's true state at each
arrival, and estimate with the true models: what differs is only what they make of it.

What is measured, each second after a warm-up of 60 s: the batch of the decode engine, and the prompts in the prefill
workers. Variance, and variation (variance over the square of the mean). Beside it what that costs: served requests, and
how many of them met each SLO.
"""

import argparse
import heapq
import json
import math
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from disagg_policies.admission import current_queue, projected
from disagg_policies.admission_snapshots import (
    Admission,
    AdmissionSnapshot,
    Admitted,
    Arrival,
    QueuedWork,
    ServiceClass,
)
from disagg_policies.snapshots import DecodeModel, DecodeState, PrefillModel, WorkerState

WORKERS = 8
PREFILL = PrefillModel(base_s=0.0, per_token_s=1e-3, per_pair_s=0.0)  # of one worker
HERE = PrefillModel(base_s=0.0, per_token_s=4e-3, per_pair_s=0.0)  # of the decode engine, which has other things to do
DECODE = DecodeModel(base_s=0.01, per_request_s=5e-4, per_context_token_s=0.0)
BATCH = 30  # at which a step takes as long as the SLO allows
CLASSES = (ServiceClass("normal", 0, ttft_slo_s=10.0, tpot_slo_s=DECODE.seconds(BATCH, 0)),)
OUTPUT_TOKENS = 750
PROMPT_TOKENS = (2_500, 7_500)  # uniform
MEAN_TOKENS = sum(PROMPT_TOKENS) // 2
LASTS_S = OUTPUT_TOKENS * DECODE.seconds(BATCH, 0)
CAPACITY_PER_S = min(WORKERS / PREFILL.seconds(MEAN_TOKENS, 0), BATCH / LASTS_S)
WARM_UP_S = 60.0
POLICIES: dict[str, Callable[[AdmissionSnapshot], Admission]] = {"projected": projected, "current_queue": current_queue}


@dataclass
class Fleet:
    """Prefill workers in front of one decode engine."""

    now_s: float = 0.0
    free_s: list[float] = field(default_factory=lambda: [0.0] * WORKERS)  # when each is through with all it has
    prefills: list[tuple[float, int]] = field(default_factory=list)  # end, tokens
    batch: dict[int, float] = field(default_factory=dict)  # tokens still to decode
    entered_s: dict[int, float] = field(default_factory=dict)
    tpots_s: list[float] = field(default_factory=list)
    number: int = 0

    def advance(self, to_s: float) -> None:
        """Move on to ``to_s``: prompts become decodes, decodes end."""
        while self.now_s < to_s:
            step_s = DECODE.seconds(len(self.batch), 0)
            prefilled_s = self.prefills[0][0] if self.prefills else math.inf
            decoded_s = self.now_s + min(self.batch.values()) * step_s if self.batch else math.inf
            until_s = min(to_s, prefilled_s, decoded_s)
            for request in self.batch:
                self.batch[request] -= (until_s - self.now_s) / step_s
            self.now_s = until_s
            for request in [request for request, left in self.batch.items() if left <= 1e-9]:
                del self.batch[request]
                self.tpots_s.append((self.now_s - self.entered_s.pop(request)) / OUTPUT_TOKENS)
            while self.prefills and self.prefills[0][0] <= self.now_s:
                heapq.heappop(self.prefills)
                self.number += 1
                self.batch[self.number], self.entered_s[self.number] = float(OUTPUT_TOKENS), self.now_s

    def admit(self, tokens: int) -> float:
        """Give a prompt to the least loaded worker; its seconds to the first token."""
        worker = min(range(WORKERS), key=self.free_s.__getitem__)
        self.free_s[worker] = max(self.free_s[worker], self.now_s) + PREFILL.seconds(tokens, 0)
        heapq.heappush(self.prefills, (self.free_s[worker], tokens))
        return self.free_s[worker] - self.now_s

    def seen(self, tokens: int) -> AdmissionSnapshot:
        """What the decode engine knows; prompts that no worker has begun are the prefill queue."""
        speed, waiting = 1 / PREFILL.per_token_s, max(0, len(self.prefills) - WORKERS)
        workers = tuple(
            WorkerState(
                f"p{at}",
                healthy=True,
                queued_requests=waiting // WORKERS + (at < waiting % WORKERS),
                max_prompt_tokens=100_000,
                queued_prefill_tokens=max(0, round((free_s - self.now_s) * speed)),
                prefill_tokens_per_s=speed,
                prefill=PREFILL,
            )
            for at, free_s in enumerate(self.free_s)
        )
        return AdmissionSnapshot(
            Arrival("normal", tokens),
            CLASSES,
            DecodeState(running_decodes=len(self.batch), prefill=HERE, decode=DECODE),
            workers,
            landing=(QueuedWork(0, len(self.prefills), 0),),
            decode_lasts_s=OUTPUT_TOKENS * DECODE.seconds(max(1, len(self.batch)), 0),
            mean_prefill_s=PREFILL.seconds(MEAN_TOKENS, 0) / WORKERS,
            mean_decode_s=CLASSES[0].ttft_slo_s / BATCH,  # so that a full batch is where it begins to refuse
        )


def run(policy: Callable[[AdmissionSnapshot], Admission], seconds: float, seed: int) -> dict[str, list[float]]:
    """Decode batch and prefills by the second, and what became of the served."""
    chance, fleet = random.Random(seed), Fleet()
    batches, prefills, ttfts_s = [], [], []
    arrival_s, tick_s = 0.0, 0.0
    while tick_s < seconds:
        arrival_s += chance.expovariate(2 * CAPACITY_PER_S)
        while tick_s <= arrival_s:
            fleet.advance(tick_s)
            if tick_s >= WARM_UP_S:
                batches.append(float(len(fleet.batch)))
                prefills.append(float(len(fleet.prefills)))
            tick_s += 1.0
        fleet.advance(arrival_s)
        tokens = chance.randint(*PROMPT_TOKENS)
        if isinstance(policy(fleet.seen(tokens)), Admitted):
            ttfts_s.append(fleet.admit(tokens))
    return {"batch": batches, "prefills": prefills, "ttft_s": ttfts_s, "tpot_s": fleet.tpots_s}


def figures(traces: list[dict[str, list[float]]]) -> dict[str, float]:
    def mean(of: str) -> float:
        return statistics.mean(statistics.mean(trace[of]) for trace in traces)

    def variance(of: str) -> float:
        return statistics.mean(statistics.pvariance(trace[of]) for trace in traces)

    (promised,) = CLASSES
    in_time = [ttft <= promised.ttft_slo_s for trace in traces for ttft in trace["ttft_s"]]
    fluent = [tpot <= (promised.tpot_slo_s or 0.0) for trace in traces for tpot in trace["tpot_s"]]
    return {
        "decode_variance": round(variance("batch"), 1),
        "decode_variation": round(variance("batch") / mean("batch") ** 2, 4),
        "decode_mean": round(mean("batch"), 1),
        "prefill_variance": round(variance("prefills"), 1),
        "prefill_variation": round(variance("prefills") / mean("prefills") ** 2, 4),
        "served": round(len(in_time) / len(traces), 1),
        "ttft_attainment": round(statistics.mean(in_time), 3),
        "tpot_attainment": round(statistics.mean(fluent), 3),
    }


def plot(traces: dict[str, dict[str, list[float]]], out: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    chart, axes = pyplot.subplots(2, 1, figsize=(9, 6), sharex=True)
    for name, trace in traces.items():
        shown = slice(0, 240)
        axes[0].plot(trace["batch"][shown], label=name)
        axes[1].plot(trace["prefills"][shown], label=name)
    axes[0].axhline(BATCH, color="grey", linestyle=":", label="batch at the TPOT SLO")
    axes[0].set_ylabel("decodes running")
    axes[1].axhline(WORKERS, color="grey", linestyle=":", label="prefill workers")
    axes[1].set_ylabel("prompts in prefill")
    axes[1].set_xlabel("s, after a warm-up of 60 s")
    axes[0].set_title("Load that was admitted, at twice the capacity")
    for axis in axes:
        axis.legend(loc="upper right", fontsize="small")
        axis.set_ylim(bottom=0)
    chart.tight_layout()
    chart.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("oscillation.png"))
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    arguments = parser.parse_args()
    traces = {
        name: [run(policy, arguments.seconds, seed) for seed in range(arguments.seeds)]
        for name, policy in POLICIES.items()
    }
    measured = {name: figures(runs) for name, runs in traces.items()}
    plot({name: runs[0] for name, runs in traces.items()}, arguments.out)
    for name, values in measured.items():
        print(f"{name:>14}  " + "  ".join(f"{key} {value:g}" for key, value in values.items()))
    print(f"plot: {arguments.out}")
    if arguments.json:
        print(json.dumps(measured))


if __name__ == "__main__":
    main()
