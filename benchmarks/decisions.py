"""How many offload decisions a second does one core make, and how long does one take?

    .venv/bin/python benchmarks/decisions.py --json

64 prefill workers, each with a digest of 10,000 prefix chunks, and prompts of 4,096 tokens: half of them with a prefix
that some workers hold to different lengths, a quarter that one worker holds, a quarter that nobody holds. One decision
is: looking the prompt up in the prefix index, scoring all workers, the latency policy, both through pluggy, the record
with the whole snapshot, and the new in-flight figures of the worker that was chosen. The chunk hashes of a prompt are
computed when it arrives and are not counted.

The process is bound to one core. ``decisions_per_s`` is the median of the rounds, so that a neighbour's burst does not
count; the percentiles are over all decisions of all rounds. ``--profile`` prints where the time goes instead.
"""

import argparse
import cProfile
import gc
import json
import os
import pstats
import random
import statistics
import time
from collections import deque
from dataclasses import dataclass, replace

from disagg_plugin.plugins import PolicySettings, choose, load_plugins
from disagg_plugin.serving.decisions import Decider
from disagg_plugin.serving.prefix_hash import CHUNK_TOKENS, prefix_hashes
from disagg_plugin.serving.prefix_index import PrefixIndex
from disagg_policies.snapshots import (
    DecodeModel,
    DecodeState,
    Link,
    Offload,
    PrefillModel,
    Prompt,
    WorkerState,
)

WORKERS = 64
CHUNKS = 10_000
PROMPT_TOKENS = 4_096
PROMPTS = 512
IN_FLIGHT = 128  # offloads that have not ended
DECODE = DecodeState(
    engine="d-0",
    running_decodes=24,
    decode_context_tokens=60_000,
    queued_requests=3,
    queued_prefill_tokens=6_000,
    kv_usage=0.6,
    held_kv_tokens=8_000,
    held_kv_budget_tokens=200_000,
    prefill=PrefillModel(0.008, 1e-4, 2e-9, samples=500, error=0.08),
    decode=DecodeModel(0.012, 1e-4, 1e-7, samples=500, error=0.05),
)


@dataclass(slots=True)
class Fleet:
    """What D knows: the index, the workers, the prompts with their hashes."""

    index: PrefixIndex
    names: tuple[str, ...]
    workers: tuple[WorkerState, ...]
    prompts: list[tuple[Prompt, list[int]]]


def make_fleet(rng: random.Random) -> Fleet:
    names = tuple(f"10.0.0.{number}:5600" for number in range(WORKERS))
    hashed = [prefix_hashes([rng.randrange(128_000) for _ in range(PROMPT_TOKENS)]) for _ in range(PROMPTS)]
    index = PrefixIndex()
    held: dict[str, list[int]] = {name: [] for name in names}
    for number, hashes in enumerate(hashed):
        holders = {0: rng.randrange(2, 16), 1: rng.randrange(16, WORKERS), 2: 1, 3: 0}[number % 4]
        for name in rng.sample(names, holders):
            held[name] += hashes[: rng.randrange(1, len(hashes) + 1)]
    for name, chunks in held.items():
        others = [rng.getrandbits(64) for _ in range(max(0, CHUNKS - len(chunks)))]
        index.replace(name, [*chunks[:CHUNKS], *others])
    workers = tuple(
        WorkerState(
            worker=name,
            healthy=True,
            queued_requests=rng.randrange(12),
            max_prompt_tokens=32_768,
            queued_prefill_tokens=rng.randrange(30_000),
            running_requests=rng.randrange(8),
            kv_usage=rng.random(),
            prefill_tokens_per_s=rng.uniform(8_000, 16_000),
            overhead_s=0.004,
            prefill=PrefillModel(0.008, rng.uniform(6e-5, 2e-4), 2e-9, samples=200, error=0.1),
            link=Link(rng.uniform(2e9, 1e10), 0.001, 65_536.0, samples=200, error=0.1),
        )
        for name in names
    )
    prompts = [(Prompt(f"cmpl-{number:08x}", PROMPT_TOKENS, 0), hashes) for number, hashes in enumerate(hashed)]
    return Fleet(index, names, workers, prompts)


def run(fleet: Fleet, decider: Decider, count: int) -> tuple[list[int], int]:
    """Nanoseconds of each of ``count`` decisions, and how many went to a worker."""
    took_ns: list[int] = []
    index, names, prompts = fleet.index, fleet.names, fleet.prompts
    at = {name: number for number, name in enumerate(names)}
    workers = tuple(replace(w, reported_s=time.monotonic() + 3600) for w in fleet.workers)  # fresh to the end
    open_offloads: deque[int] = deque()
    offloads = 0
    for number in range(count):
        prompt, hashes = prompts[number % len(prompts)]
        started_ns = time.perf_counter_ns()
        overlap = index.overlap_tokens(hashes, names, chunk_tokens=CHUNK_TOKENS)
        decision = decider.decide(prompt, DECODE, workers, overlap).decision
        if type(decision) is Offload:
            chosen = at[decision.workers[0]]
            workers = in_flight(workers, chosen, 1)
            offloads += 1
            open_offloads.append(chosen)
        took_ns.append(time.perf_counter_ns() - started_ns)
        if len(open_offloads) > IN_FLIGHT:  # a transfer's end is not part of a decision
            workers = in_flight(workers, open_offloads.popleft(), -1)
    return took_ns, offloads


def in_flight(workers: tuple[WorkerState, ...], index: int, requests: int) -> tuple[WorkerState, ...]:
    """One worker with so many requests more in flight."""
    old = workers[index]
    new = replace(
        old,
        in_flight_requests=old.in_flight_requests + requests,
        in_flight_tokens=old.in_flight_tokens + requests * PROMPT_TOKENS,
    )
    return (*workers[:index], new, *workers[index + 1 :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--per-round", type=int, default=2_000)
    parser.add_argument("--placement", default="score")
    parser.add_argument("--offload", default="latency")
    options = parser.parse_args()

    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    settings = PolicySettings(offload=(options.offload,), placement=(options.placement,))
    decider = Decider(choose(load_plugins(settings), settings))
    fleet = make_fleet(random.Random(7))
    gc.collect()
    gc.freeze()  # as vLLM does once an engine is up
    run(fleet, decider, options.per_round)  # warm
    if options.profile:
        with cProfile.Profile() as profile:
            run(fleet, decider, 5 * options.per_round)
        pstats.Stats(profile).sort_stats("tottime").print_stats(18)
        return
    rounds = [run(fleet, decider, options.per_round) for _ in range(options.rounds)]
    every_ns = sorted(ns for took_ns, _ in rounds for ns in took_ns)
    result = {
        "decisions_per_s": round(statistics.median(1e9 * len(took) / sum(took) for took, _ in rounds)),
        "p50_us": round(every_ns[len(every_ns) // 2] / 1e3, 1),
        "p99_us": round(every_ns[len(every_ns) * 99 // 100] / 1e3, 1),
        "workers": WORKERS,
        "decisions": len(every_ns),
        "offloaded": sum(offloads for _, offloads in rounds),
        "digest_chunks": min(fleet.index.chunks(name) for name in fleet.names),
        "policies": f"{options.offload}, {options.placement}",
    }
    print(json.dumps(result) if options.json else "\n".join(f"{name:16} {value}" for name, value in result.items()))


if __name__ == "__main__":
    main()
