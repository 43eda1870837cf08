"""A worker that fails is left alone for longer and longer, probed by one prompt at a time, and trusted again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_plugin.control.backoff import FIRST_S, JITTER, LONGEST_S, PROBE_LEASE_S, Backoff

KEYS = st.text(max_size=8)
TIMES = st.floats(0, 1e6)


@given(st.integers(1, 80), KEYS, TIMES)
def test_pauses_double_from_short_to_a_limit(failures: int, key: str, now_s: float) -> None:
    state = Backoff()
    for number in range(failures):
        before_s = now_s
        state = state.failed(now_s, key)
        wanted_s = min(FIRST_S * 2**number, LONGEST_S)
        assert wanted_s * (1 - JITTER) - 1e-6 <= state.until_s - before_s <= wanted_s * (1 + JITTER) + 1e-6
        assert not state.may_ask(before_s)
        now_s = state.until_s
        assert state.may_ask(now_s)
        state = state.asked(now_s)


def test_engines_do_not_probe_at_once() -> None:
    pauses_s = {round(Backoff().failed(0.0, f"d{number}|p").until_s, 3) for number in range(16)}
    assert len(pauses_s) >= 14


@given(st.lists(st.floats(0, 0.3), max_size=50), KEYS)
def test_what_fails_while_waiting_says_nothing_new(delays_s: list[float], key: str) -> None:
    first = state = Backoff().failed(100.0, key)
    for delay_s in delays_s:
        state = state.failed(100.0 + delay_s, key)
    assert state == first


def test_one_probe_at_a_time() -> None:
    state = Backoff().failed(100.0, "k")
    now_s = state.until_s + 1
    probing = state.asked(now_s)
    assert not probing.may_ask(now_s + 1)
    assert probing.undecided().may_ask(now_s + 1), "its client left: the next prompt is the probe"
    assert probing.may_ask(now_s + PROBE_LEASE_S), "nobody ever reported back"


@pytest.mark.parametrize(
    ("state", "after"),
    [
        pytest.param(Backoff(), Backoff(), id="trusted"),
        pytest.param(Backoff(2, 200.0), Backoff(2, 200.0), id="an older offload lands while waiting"),
        pytest.param(Backoff(2, 200.0, probe_s=201.0), Backoff(), id="the probe lands"),
    ],
)
def test_success_resets_if_it_is_the_probes(state: Backoff, after: Backoff) -> None:
    assert state.succeeded() == after


def test_a_trusted_worker_is_never_probing() -> None:
    assert Backoff().asked(5.0) == Backoff().undecided() == Backoff()


@given(st.lists(st.tuples(st.sampled_from(["fail", "ask", "succeed", "undecided"]), st.floats(0, 40)), max_size=40))
def test_nobody_is_left_alone_for_ever(steps: list[tuple[str, float]]) -> None:
    state, now_s = Backoff(), 100.0
    for action, pause_s in steps:
        if action == "fail":
            state = state.failed(now_s, "k")
        elif action == "ask" and state.may_ask(now_s):
            state = state.asked(now_s)
        elif action == "succeed":
            state = state.succeeded()
        elif action == "undecided":
            state = state.undecided()
        now_s += pause_s
    assert state.may_ask(now_s + LONGEST_S * (1 + JITTER) + PROBE_LEASE_S)
