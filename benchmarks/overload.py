"""Twice the capacity on a real engine pair: who is served in time, who is refused, and whether that was right.

    python benchmarks/overload.py --json [--seconds 60]

Engines: the tiny model, a prefill and a decode engine of ours, one core each; every prompt is offloaded
(``--offload``), however long the queue, as where TPOT matters. A new pair for each of ``none`` (no admission),
``projected`` and ``current_queue``. On the first one the unloaded TTFT and TPOT are measured (median of 10, one at a
time) and the capacity (requests per second that 24 clients get who ask again at once). Then the load is open loop:
Poisson arrivals, independent of completions, 30 % high and 70 % low, prompts of 1,500 to 2,500 fresh token ids (so long
that the engines are the bottleneck, and not the API servers and this client beside them on the same cores), 16 output
tokens; at 2 x the capacity for every policy, and at 0.8 x under ``projected``. The SLOs are multiples of the unloaded
figures: TTFT 10 x for high and 20 x for low, TPOT 8 x for both.

    high_attainment   share of the high requests that met both SLOs; a refused one has not
    high_vs_low_ttft  median TTFT of the low ones served, over that of the high ones
    served_ratio      requests served per second, over the capacity
    refused_share     of all requests
    high_missed       how many high ones were refused, for which SLO, and how many of the others missed which
    false_refusals    every fifteenth of those refused is served all the same (``refused_probe``): the share of these
                      that met both SLOs
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from real_pair import DisaggPair, fresh_prompt, start_disagg_pair
from refused_probe import NAME, PROBES, install

TOKENS_OUT = 16
TTFT_MULTIPLES = {"high": 10.0, "low": 20.0}
TPOT_MULTIPLE = 8.0
HIGH_SHARE = 0.3
PROMPT_TOKENS = (1_500, 2_500)  # up to, without
CLIENTS = 24
PRIORITY = {"high": 0, "low": 1}


@dataclass
class Outcome:
    """One request; times in seconds."""

    service_class: str
    prompt_tokens: int
    refused: bool = False
    code: str = ""
    probe: bool = False
    ttft_s: float = 0.0
    tpot_s: float = 0.0

    def met(self, slo: dict[str, tuple[float, float]]) -> bool:
        ttft_s, tpot_s = slo[self.service_class]
        return not self.refused and self.ttft_s <= ttft_s and self.tpot_s <= tpot_s


class Load:
    """Requests to one decode engine."""

    def __init__(self, session: aiohttp.ClientSession, url: str, model: str, *, classes: bool) -> None:
        self._session = session
        self._url = f"{url}/v1/completions"
        self._model = model
        self._classes = classes
        self._lengths: list[int] = []

    def _length(self) -> int:
        """No two of a run are equal, as far as they reach: probes are told by class and length."""
        if not self._lengths:
            self._lengths = random.sample(range(*PROMPT_TOKENS), len(range(*PROMPT_TOKENS)))
        return self._lengths.pop()

    async def one(self, service_class: str) -> Outcome:
        """One streamed request."""
        tokens = self._length()
        prompt = fresh_prompt(tokens)
        body: dict[str, Any] = {"model": self._model, "prompt": prompt, "max_tokens": TOKENS_OUT, "temperature": 0}
        body |= {"ignore_eos": True, "stream": True}
        if self._classes:
            body["priority"] = service_class
        started_s = time.monotonic()
        async with self._session.post(self._url, json=body) as response:
            if response.status == 429:
                return Outcome(service_class, tokens, refused=True, code=(await response.json())["error"]["code"])
            response.raise_for_status()
            arrivals = [time.monotonic() async for line in response.content if line.startswith(b"data: {")]
        tpot_s = (arrivals[-1] - arrivals[0]) / max(1, len(arrivals) - 1)
        return Outcome(service_class, tokens, ttft_s=arrivals[0] - started_s, tpot_s=tpot_s)

    async def open_loop(self, per_s: float, seconds: float) -> tuple[list[Outcome], float]:
        """Outcomes, and the seconds until the last one was there."""
        self._lengths.clear()
        tasks, started_s, due_s = [], time.monotonic(), 0.0
        while due_s < seconds:
            await asyncio.sleep(max(0.0, started_s + due_s - time.monotonic()))
            service_class = "high" if random.random() < HIGH_SHARE else "low"
            tasks.append(asyncio.create_task(self.one(service_class)))
            due_s += random.expovariate(per_s)
        outcomes = await asyncio.gather(*tasks)
        return outcomes, time.monotonic() - started_s

    async def closed_loop(self, seconds: float) -> float:
        """Requests per second with as many clients as keep both engines busy; the first half does not count."""
        started_s, ended = time.monotonic(), list[float]()

        async def client() -> None:
            while time.monotonic() - started_s < seconds:
                await self.one("low")
                ended.append(time.monotonic() - started_s)

        await asyncio.gather(*(client() for _ in range(CLIENTS)))
        counted = [at for at in ended if seconds / 2 < at <= seconds]
        return len(counted) / (seconds / 2)


def figures(
    outcomes: list[Outcome], took_s: float, capacity: float, slo: dict[str, tuple[float, float]]
) -> dict[str, Any]:
    served = [one for one in outcomes if not one.refused]
    high = [one for one in outcomes if one.service_class == "high"]
    probes = [one for one in outcomes if one.probe]
    probed = [one.ttft_s <= slo[one.service_class][0] and one.tpot_s <= slo[one.service_class][1] for one in probes]

    def p50(service_class: str) -> float:
        return statistics.median([one.ttft_s for one in served if one.service_class == service_class] or [0.0])

    return {
        "requests": len(outcomes),
        "high_attainment": round(statistics.mean(one.met(slo) for one in high), 3),
        "low_attainment": round(statistics.mean(one.met(slo) for one in outcomes if one.service_class == "low"), 3),
        "high_missed": {
            "refused": sum(one.refused for one in high),
            "refused_for": dict(Counter(one.code or "probe" for one in high if one.refused)),
            "ttft": sum(not one.refused and one.ttft_s > slo["high"][0] for one in high),
            "tpot": sum(not one.refused and one.tpot_s > slo["high"][1] for one in high),
        },
        "high_vs_low_ttft": round(p50("low") / p50("high"), 2) if p50("high") else None,
        "ttft_p50_s": {name: round(p50(name), 3) for name in PRIORITY},
        "tpot_p99_s": round(quantile([one.tpot_s for one in served], 0.99), 4),
        "served_ratio": round((len(served) + len(probes)) / took_s / capacity, 3),
        "refused_share": round(1 - len(served) / len(outcomes), 3),
        "false_refusals": round(statistics.mean(probed), 3) if probed else None,
        "probes": len(probes),
    }


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def mark_probes(outcomes: list[Outcome], probes: Path) -> None:
    """What the policy served although it was to be refused counts as refused, with the times that it was served in."""
    found = {tuple(line.split()) for line in probes.read_text().splitlines()} if probes.exists() else set()
    for one in outcomes:
        one.probe = (one.service_class, str(one.prompt_tokens)) in found
        one.refused = one.refused or one.probe


def settings(policy: str, offload: str, slo: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """Of both engines."""
    policies = {"offload": offload, "hook_timeout_ms": 50.0}  # for the probes, which are somebody else's code
    offloads = {"split_policy": {"prefill_queue_max": 100_000}}  # none is prefilled by D for its length
    if policy == "none":
        return {"policy": policies, **offloads}
    classes = {
        name: {"ttft_slo_s": slo[name][0], "tpot_slo_s": slo[name][1], "priority": PRIORITY[name]} for name in PRIORITY
    }
    qos = {"enable_early_rejection": True, "classes": classes, "default_class": "high"}
    return {"qos": qos, "policy": {**policies, "admission": [NAME, policy]}, **offloads}


async def measure(
    pair: DisaggPair, model: str, policy: str, seconds: float, probes: Path, known: dict[str, Any]
) -> None:
    """One pair's runs; what later pairs need goes into ``known``."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        load = Load(session, pair.urls["decode"], model, classes=policy != "none")
        warm = [await load.one("high") for _ in range(14)][4:]
        if policy == "none":
            ttft_s, tpot_s = (statistics.median(getattr(one, what) for one in warm) for what in ("ttft_s", "tpot_s"))
            known["slo"] = {name: (ttft_s * times, tpot_s * TPOT_MULTIPLE) for name, times in TTFT_MULTIPLES.items()}
            known["capacity_per_s"] = await load.closed_loop(seconds)
            known["unloaded"] = {"ttft_s": round(ttft_s, 4), "tpot_s": round(tpot_s, 4)}
        else:
            await load.closed_loop(seconds / 2)  # the first one's was one as well: models are fitted, memory is touched
        capacity = known["capacity_per_s"]
        for run, times in {"normal_load": 0.8, policy: 2.0}.items() if policy == "projected" else ((policy, 2.0),):
            probes.unlink(missing_ok=True)
            outcomes, took_s = await load.open_loop(times * capacity, seconds)
            mark_probes(outcomes, probes)
            known[run] = figures(outcomes, took_s, capacity, known["slo"])


def main() -> None:
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from models import tiny

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of each run's arrivals")
    parser.add_argument("--offload", default="threshold", help="offload policy of the decode engine")
    parser.add_argument(
        "--policies", nargs="+", default=["none", "projected", "current_queue"], help="none comes first"
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    arguments = parser.parse_args()
    random.seed(6)
    model, known = str(tiny()), dict[str, Any]()
    for policy in arguments.policies:
        with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
            # the prefill engine's, too: it orders by priority as well
            own = settings(policy, arguments.offload, known.get("slo", {}))
            env = {**install(Path(folder)), "PROBED_POLICY": policy} if policy != "none" else {}
            prefill = {**own, "policy": {"offload": arguments.offload}}
            pair = start_disagg_pair(stack, Path(folder), model, decode=own, prefill=prefill, env=env)
            asyncio.run(measure(pair, model, policy, arguments.seconds, Path(folder) / PROBES, known))
        for run in {policy, *(["normal_load"] if policy == "projected" else [])}:
            print(run, json.dumps(known[run]), flush=True)
    known["capacity_per_s"] = round(known["capacity_per_s"], 2)
    known["slo"] = {name: [round(limit, 4) for limit in limits] for name, limits in known["slo"].items()}
    if arguments.json:
        print(json.dumps(known))


if __name__ == "__main__":
    main()
