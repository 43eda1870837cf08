"""When an engine that has prompts before it counts as paused: by its steps alone."""

from hypothesis import given
from hypothesis import strategies as st

from disagg_plugin.control.load import Load
from disagg_plugin.control.standstill import NOTHING_RUNS_S, Standstill

STEP_S = 20.0
QUEUED, RUNNING, IDLE = Load(queued_requests=1), Load(queued_requests=1, running_requests=1), Load()


def looks_until(watch: Standstill, until_s: float, *, steps: int, load: Load, every_s: float = 0.5) -> list[bool]:
    return [watch.look(at * every_s, steps=steps, load=load) for at in range(int(until_s / every_s) + 1)]


def test_a_free_engine_that_leaves_a_prompt_in_its_queue_is_at_rest() -> None:
    watch = Standstill(STEP_S)
    watch.look(0.0, steps=7, load=IDLE)
    looks = looks_until(watch, NOTHING_RUNS_S + 0.5, steps=7, load=QUEUED)
    assert looks == [False] * (len(looks) - 1) + [True]


def test_an_engine_that_computes_a_prompt_may_take_long_for_a_step() -> None:
    watch = Standstill(STEP_S)
    watch.look(0.0, steps=7, load=RUNNING)
    looks = looks_until(watch, STEP_S + 0.5, steps=7, load=RUNNING)
    assert looks == [False] * (len(looks) - 1) + [True]


def test_one_step_is_enough_to_go_on() -> None:
    watch = Standstill(STEP_S)
    watch.look(0.0, steps=7, load=QUEUED)
    assert looks_until(watch, 10.0, steps=7, load=QUEUED)[-1]
    assert not watch.look(10.5, steps=8, load=QUEUED)
    assert not watch.look(11.0, steps=8, load=QUEUED), "and it has all the time again"


def test_an_idle_engine_is_not_at_rest_however_long_nothing_comes() -> None:
    watch = Standstill(STEP_S)
    assert not any(looks_until(watch, 100.0, steps=7, load=IDLE))


def test_an_engine_that_does_not_count_its_steps_is_never_at_rest() -> None:
    watch = Standstill(STEP_S)
    assert not any(looks_until(watch, 100.0, steps=0, load=QUEUED))


def test_a_pause_of_our_own_is_not_the_engines() -> None:
    watch = Standstill(STEP_S)
    watch.look(0.0, steps=7, load=IDLE)
    watch.look(0.5, steps=7, load=QUEUED)
    assert not watch.look(60.5, steps=7, load=QUEUED, away_s=59.5), "the whole process stood still"


@given(gaps=st.lists(st.floats(0.01, 1.9), min_size=1, max_size=40))
def test_an_engine_that_steps_between_any_two_looks_is_never_at_rest(gaps: list[float]) -> None:
    watch, now_s = Standstill(STEP_S), 0.0
    for step, gap_s in enumerate(gaps, start=1):
        now_s += gap_s
        assert not watch.look(now_s, steps=step, load=QUEUED)
