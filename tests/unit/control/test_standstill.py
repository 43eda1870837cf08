"""When an engine that has prompts before it counts as paused: by its steps alone."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_plugin.control.load import Load
from disagg_plugin.control.standstill import AT_MOST_S, NOTHING_RUNS_S, TRY_AGAIN_S, Standstill, Steps

STEP_S = 20.0
EVERY_S = 0.5
QUEUED, RUNNING, IDLE = Load(queued_requests=1), Load(queued_requests=1, running_requests=1), Load()


class Watched:
    """An engine that is looked at every half second."""

    def __init__(self) -> None:
        self.watch = Standstill(STEP_S)
        self.now_s = 0.0
        self.look(Steps(7, 5), IDLE)

    def look(self, steps: Steps, load: Load, *, away_s: float = 0.0) -> bool:
        self.now_s += EVERY_S + away_s
        return self.watch.look(self.now_s, steps=steps, load=load, away_s=away_s)

    def looks(self, seconds: float, steps: Steps, load: Load) -> Iterator[bool]:
        for _ in range(int(seconds / EVERY_S)):
            yield self.look(steps, load)


@pytest.fixture
def engine() -> Watched:
    return Watched()


@pytest.fixture
def resting(engine: Watched) -> Watched:
    assert list(engine.looks(NOTHING_RUNS_S + 2 * EVERY_S, Steps(7, 5), QUEUED))[-1]
    return engine


def test_a_free_engine_that_leaves_a_prompt_in_its_queue_is_at_rest(engine: Watched) -> None:
    looks = list(engine.looks(NOTHING_RUNS_S + 2 * EVERY_S, Steps(7, 5), QUEUED))
    assert looks == [False] * (len(looks) - 1) + [True]


def test_an_engine_that_computes_a_prompt_may_take_long_for_a_step(engine: Watched) -> None:
    looks = list(engine.looks(STEP_S + 2 * EVERY_S, Steps(7, 5), RUNNING))
    assert looks == [False] * (len(looks) - 1) + [True]


def test_one_step_that_computes_ends_it_and_the_next_has_all_the_time_again(resting: Watched) -> None:
    assert not resting.look(Steps(8, 6), QUEUED)
    assert not any(resting.looks(NOTHING_RUNS_S, Steps(8, 6), QUEUED))


def test_a_step_that_only_forgets_what_was_aborted_does_not_end_it(resting: Watched) -> None:
    assert resting.look(Steps(8, 5), IDLE)
    assert resting.look(Steps(9, 5), IDLE)


def test_it_lasts_while_anything_waits_but_is_tried_again_all_the_same(resting: Watched) -> None:
    looks = list(resting.looks(AT_MOST_S + EVERY_S, Steps(7, 5), QUEUED))
    assert looks == [True] * (len(looks) - 1) + [False]


def test_when_nothing_has_waited_for_a_while_it_is_tried_again(resting: Watched) -> None:
    looks = list(resting.looks(TRY_AGAIN_S + EVERY_S, Steps(7, 5), IDLE))
    assert looks == [True] * (len(looks) - 1) + [False]
    assert list(resting.looks(NOTHING_RUNS_S + 2 * EVERY_S, Steps(7, 5), QUEUED))[-1], "and found as it was"


def test_an_idle_engine_is_not_at_rest_however_long_nothing_comes(engine: Watched) -> None:
    assert not any(engine.looks(100.0, Steps(7, 5), IDLE))


def test_an_engine_that_does_not_count_its_steps_is_never_at_rest() -> None:
    watch = Standstill(STEP_S)
    assert not any(watch.look(at * EVERY_S, steps=Steps(), load=QUEUED) for at in range(200))


def test_a_pause_of_our_own_is_not_the_engines(engine: Watched) -> None:
    engine.look(Steps(7, 5), QUEUED)
    assert not engine.look(Steps(7, 5), QUEUED, away_s=60.0), "the whole process stood still"


@given(gaps=st.lists(st.floats(0.01, NOTHING_RUNS_S), min_size=1, max_size=40))
def test_an_engine_that_steps_between_any_two_looks_is_never_at_rest(gaps: list[float]) -> None:
    """Even if it computes nothing: its cache is full of what is being sent, say."""
    watch, now_s = Standstill(STEP_S), 0.0
    for step, gap_s in enumerate(gaps, start=1):
        now_s += gap_s
        assert not watch.look(now_s, steps=Steps(step, 0), load=QUEUED)
