"""Several decode engines share the prefill workers without talking to each other, and do not herd.

A simulation in virtual time: each P computes one prompt after the other and publishes its queue at intervals; each D
knows the last report and what it has itself sent since, nothing of the other Ds. Prompts arrive in bursts.
"""

import heapq
import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from disagg_policies.placement import least_loaded, power_of_two, round_robin, score
from disagg_policies.snapshots import DecodeState, Placement, PolicyState, Prompt, Snapshot, WorkerState

SPEED = 10_000.0  # prompt tokens a second and worker


class Fleet:
    """4 Ds, 2 Ps."""

    def __init__(self, policy: Callable[..., Placement], *, report_every_s: float, utilisation: float) -> None:
        self.policy, self.report_every_s = policy, report_every_s
        self.rng = random.Random(3)
        self.names = ("p0", "p1")
        self.free_at_s = dict.fromkeys(self.names, 0.0)
        self.tokens = dict.fromkeys(self.names, 0)
        self.seen = {f"d{d}": {name: self.report(name, 0.0) for name in self.names} for d in range(4)}
        self.turns = dict.fromkeys(self.seen, 0)
        self.gap_s = 1_500 / (utilisation * 2 * SPEED)  # 1,500 tokens a prompt

    def report(self, name: str, now_s: float) -> WorkerState:
        queued = int(max(0.0, self.free_at_s[name] - now_s) * SPEED)
        return WorkerState(
            name, healthy=True, queued_requests=queued // 1_500, max_prompt_tokens=9_000, queued_prefill_tokens=queued,
            prefill_tokens_per_s=SPEED, reported_s=now_s,
        )  # fmt: skip

    def place(self, engine: str, request: int, now_s: float) -> None:
        tokens = self.rng.randrange(500, 2_500)
        snapshot = Snapshot(
            Prompt(str(request), tokens, 0),
            DecodeState(engine),
            tuple(self.seen[engine].values()),
            now_s=now_s,
            previous=PolicyState(turn=self.turns[engine]),
        )
        self.turns[engine] += 1
        name = self.policy(snapshot).workers[0]
        self.tokens[name] += tokens
        self.free_at_s[name] = max(now_s, self.free_at_s[name]) + tokens / SPEED
        view = self.seen[engine][name]
        self.seen[engine][name] = replace(
            view, in_flight_requests=view.in_flight_requests + 1, in_flight_tokens=view.in_flight_tokens + tokens
        )

    def run(self, requests: int) -> float:
        """The larger worker's share of all tokens."""
        events = [(self.report_every_s, -1)]
        arrival_s = 0.0
        for request in range(requests):
            if request % 4 == 0:  # one for each D, at once
                arrival_s += self.rng.expovariate(1 / (4 * self.gap_s))
            heapq.heappush(events, (arrival_s, request))
        while events:
            now_s, request = heapq.heappop(events)
            if request >= 0:
                self.place(f"d{request % 4}", request, now_s)
                continue
            for views in self.seen.values():
                views.update({name: self.report(name, now_s) for name in self.names})
            if events:
                heapq.heappush(events, (now_s + self.report_every_s, -1))
        return max(self.tokens.values()) / sum(self.tokens.values())


@pytest.mark.parametrize("policy", [score, least_loaded, power_of_two, round_robin], ids=lambda p: p.__name__)
@pytest.mark.parametrize(
    ("report_every_s", "utilisation"),
    [
        pytest.param(0.02, 0.7, id="busy, fresh reports"),
        pytest.param(0.5, 0.7, id="busy, reports half a second old"),
        pytest.param(0.5, 0.1, id="mostly idle: every decision a tie"),
    ],
)
def test_four_decode_engines_share_two_workers_within_10_percent_of_even(
    policy: Callable[..., Placement], report_every_s: float, utilisation: float
) -> None:
    share = Fleet(policy, report_every_s=report_every_s, utilisation=utilisation).run(2_000)
    assert share <= 0.55


def test_a_burst_on_an_idle_fleet_goes_to_both() -> None:
    """All at the same instant, each D with the same reports."""
    fleet = Fleet(score, report_every_s=1.0, utilisation=0.5)
    for request in range(200):
        fleet.place(f"d{request % 4}", request, 0.0)
    assert max(fleet.tokens.values()) / sum(fleet.tokens.values()) <= 0.55


def test_breaking_ties_by_position_would_herd() -> None:
    """The same simulation sees what the hash prevents."""

    def first_of_the_best(snapshot: Snapshot) -> Placement:
        best = min(snapshot.workers, key=lambda w: w.queue_s)
        return Placement((best.worker,), "naive")

    assert Fleet(first_of_the_best, report_every_s=0.02, utilisation=0.1).run(2_000) > 0.6
