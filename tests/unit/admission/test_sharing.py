"""Fair shares within a class, the ledger between two reports, and what routes learn."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from disagg_plugin.admission.fair_share import FairShare
from disagg_plugin.admission.learned import Route
from disagg_plugin.admission.ledger import EXPIRE_S, SETTLE_S, Ledger, Reservation
from disagg_policies.admission_snapshots import QueuedWork

PRESSED, CALM = 1.0, 0.2


def served_tokens(share: FairShare, demand: dict[str, int], rounds: int) -> dict[str, int]:
    """Each tenant asks once a round under pressure, for so many tokens."""
    served = dict.fromkeys(demand, 0)
    for now_s in range(rounds):
        for tenant, tokens in demand.items():
            if not share.overused(tenant, float(now_s), PRESSED):
                share.charge(tenant, tokens)
                served[tenant] += tokens
    return served


@given(st.dictionaries(st.sampled_from("abcd"), st.integers(1, 4_000), min_size=2))
def test_long_contexts_do_not_starve_the_others(demand: dict[str, int]) -> None:
    """Whoever asks for less than an equal share gets all of it; nobody is ahead by more than the burst."""
    rounds = 200
    served = served_tokens(FairShare(4_000), demand, rounds)
    smallest = min(demand.values())
    for tenant, tokens in demand.items():
        assert served[tenant] >= smallest * rounds - 4_000
        assert served[tenant] <= smallest * rounds + 4_000 + 2 * tokens


def test_nobody_is_refused_without_pressure_or_rivals() -> None:
    share = FairShare(100)
    for now_s in range(50):
        assert not share.overused("heavy", float(now_s), CALM)
        share.charge("heavy", 1_000)
        assert not share.overused("light", float(now_s), CALM)
        share.charge("light", 1)
    alone = FairShare(100)
    for now_s in range(50):
        assert not alone.overused("heavy", float(now_s), PRESSED)
        alone.charge("heavy", 1_000)


def test_idle_time_earns_nothing() -> None:
    share = FairShare(1_000)
    for now_s in range(100):
        share.overused("a", float(now_s), CALM)
        share.charge("a", 10_000)
    assert not share.overused("b", 100.0, PRESSED)  # comes, and starts level
    assert not share.overused("a", 100.0, PRESSED)
    share.charge("a", 1_500)
    assert share.overused("a", 101.0, PRESSED)
    share.charge("b", 1_000)
    assert not share.overused("a", 102.0, PRESSED)


def test_an_old_lead_is_forgotten() -> None:
    """Over an hour with room for all, one used a hundred times as much."""
    share = FairShare(1_000)
    for now_s in range(100):
        for tenant, tokens in (("a", 10_000), ("b", 100)):
            assert not share.overused(tenant, float(now_s), CALM)
            share.charge(tenant, tokens)
    counters = share.counters()
    assert counters["a"] - counters["b"] <= 2_000


def test_a_request_is_reserved_until_a_report_counts_it() -> None:
    ledger = Ledger()
    first = ledger.reserve(0, 100, 0.0)
    second = ledger.reserve(0, 50, 0.0)
    ledger.reserve(1, 7, 0.0)
    assert ledger.work() == [QueuedWork(0, 2, 150), QueuedWork(1, 1, 7)]
    ledger.sent(first, 11, 120)
    ledger.sent(second, 22, 50)
    ledger.reported((11, 99), 0.5)
    assert ledger.work() == [QueuedWork(0, 1, 50), QueuedWork(1, 1, 7)]
    ledger.release(second)
    ledger.release(second)
    assert ledger.work() == [QueuedWork(1, 1, 7)]
    ledger.reported((), SETTLE_S + 0.1)  # never had a mark: by now it is counted
    assert ledger.work() == []


class Ledgers(RuleBasedStateMachine):
    """Any order of calls leaves the sums right, and nothing behind in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.all: list[Reservation] = []
        self.now_s = 0.0

    @rule(priority=st.integers(-1, 1), tokens=st.integers(0, 99))
    def reserve(self, priority: int, tokens: int) -> None:
        self.now_s += 0.01
        self.all.append(self.ledger.reserve(priority, tokens, self.now_s))

    @rule(data=st.data(), mark=st.integers(0, 3), tokens=st.integers(0, 99))
    def send(self, data: st.DataObject, mark: int, tokens: int) -> None:
        if self.all:
            self.ledger.sent(data.draw(st.sampled_from(self.all)), mark, tokens)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.all:
            self.ledger.release(data.draw(st.sampled_from(self.all)))

    @rule(marks=st.lists(st.integers(0, 3)))
    def report(self, marks: list[int]) -> None:
        self.ledger.reported(tuple(marks), self.now_s)

    @invariant()
    def sums_are_those_of_the_open_ones(self) -> None:
        left = [one for one in self.all if one.open]
        assert len(self.ledger) == len(left)
        for work in self.ledger.work():
            of_priority = [one.tokens for one in left if one.priority == work.priority]
            assert (work.requests, work.tokens) == (len(of_priority), sum(of_priority))

    def teardown(self) -> None:
        self.ledger.reported((), self.now_s + EXPIRE_S + 1)
        assert (len(self.ledger), self.ledger.work()) == (0, [])


TestLedgers = Ledgers.TestCase
TestLedgers.settings = settings(deadline=None, max_examples=60)


def test_a_route_learns_how_dense_its_prompts_are() -> None:
    route = Route()
    assert route.prompt_tokens(4_000) == 1_000
    for _ in range(50):
        route.saw_length(6_000, 1_000)
    assert route.prompt_tokens(6_000) == 1_000
    route.saw_length(0, 1_000)
    assert route.prompt_tokens(0) == 1


def test_a_route_learns_its_cached_share_on_the_optimistic_side() -> None:
    route = Route()
    assert route.cached_tokens(30_000) == 0
    for at in range(100):
        route.saw_cached(1_000, 900 if at % 5 == 0 else 0)  # every fifth continues a conversation
    assert route.cached_tokens(30_000) == pytest.approx(27_000)
    assert route.cached_tokens(1) == 0
