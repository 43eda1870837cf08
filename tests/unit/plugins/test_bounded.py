"""Somebody else's hook may hang, crawl or raise: the caller goes on in time, and no thread piles up."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from disagg_plugin.serving.bounded import STRIKES, Answered, BoundedHook, Late, Raised, Strikes

BOUND_S = 0.005
SLACK_S = 1.0  # a busy machine may wake us late; a hook that were waited for would cost 10 s
MakeHook = Callable[[Callable[[int], object]], BoundedHook[int]]


@pytest.fixture
def hook() -> Iterator[MakeHook]:
    made: list[BoundedHook[int]] = []

    def make(call: Callable[[int], object]) -> BoundedHook[int]:
        made.append(BoundedHook(call, name="test"))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """Set at the end of the test, so that stuck threads end too."""
    event = threading.Event()
    yield event
    event.set()


def test_an_answer_in_time_is_handed_over(hook: MakeHook) -> None:
    assert hook(lambda n: n + 1).ask(1, wait_s=5.0) == Answered(2)


def test_no_thread_is_started_before_the_first_question(hook: MakeHook) -> None:
    asked = hook(lambda n: n)
    assert not asked.running
    asked.ask(1, wait_s=5.0)
    assert asked.running


@pytest.mark.parametrize(
    "error", [ValueError("no"), SystemExit(3), KeyboardInterrupt()], ids=lambda e: type(e).__name__
)
def test_whatever_a_hook_raises_is_an_outcome_and_its_thread_lives_on(hook: MakeHook, error: BaseException) -> None:
    def raising(n: int) -> int:
        if n == 0:
            raise error
        return n

    asked = hook(raising)
    assert asked.ask(0, wait_s=5.0) == Raised(error)
    assert asked.ask(1, wait_s=5.0) == Answered(1)


def test_a_hook_that_sleeps_ten_seconds_is_not_waited_for(hook: MakeHook, released: threading.Event) -> None:
    asked = hook(lambda _: released.wait(10.0))
    started_s = time.monotonic()
    assert asked.ask(0, wait_s=BOUND_S) == Late()
    assert time.monotonic() - started_s < BOUND_S + SLACK_S


def test_a_late_answer_reaches_nobody(hook: MakeHook) -> None:
    go = threading.Event()

    def slow_at_zero(n: int) -> int:
        if n == 0:
            go.wait(30.0)
        return n

    asked = hook(slow_at_zero)
    assert asked.ask(0, wait_s=BOUND_S) == Late()
    go.set()
    assert asked.ask(7, wait_s=5.0) == Answered(7)


def test_a_question_that_was_given_up_is_not_put_to_the_hook(hook: MakeHook) -> None:
    go, seen = threading.Event(), []

    def noting(n: int) -> int:
        seen.append(n)
        if n == 0:
            go.wait(30.0)
        return n

    asked = hook(noting)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(asked.ask, 0, wait_s=30.0)
        while not seen:
            threading.Event().wait(0.001)
        for n in (1, 2):
            assert asked.ask(n, wait_s=BOUND_S) == Late()
        go.set()
        assert first.result() == Answered(0)
    assert asked.ask(9, wait_s=5.0) == Answered(9)
    assert seen == [0, 9]


def test_a_hook_that_never_returns_keeps_one_thread_however_often_it_is_asked(
    released: threading.Event,
) -> None:
    asked: BoundedHook[int] = BoundedHook(lambda _: released.wait(), name="never returns")
    for n in range(5):
        assert asked.ask(n, wait_s=BOUND_S) == Late()
    asked.close()
    assert [t.name for t in threading.enumerate() if "never returns" in t.name] == ["disagg-hook never returns"]


def test_a_closed_hook_ends_its_thread(hook: MakeHook) -> None:
    asked = hook(lambda n: n)
    asked.ask(1, wait_s=5.0)
    (thread,) = [t for t in threading.enumerate() if t is asked._thread]
    asked.close()
    thread.join(5.0)
    assert not asked.running


def test_a_hook_that_never_returns_does_not_hold_up_the_end_of_the_process() -> None:
    code = (
        "import threading\n"
        "from disagg_plugin.serving.bounded import BoundedHook, Late\n"
        "hook = BoundedHook(lambda n: threading.Event().wait(), name='stuck')\n"
        "assert hook.ask(0, wait_s=0.005) == Late()\n"
        "assert hook.running\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


def test_the_third_failure_in_a_row_disables_and_only_that_one_says_so() -> None:
    strikes = Strikes()
    assert [strikes.failure() for _ in range(STRIKES + 2)] == [False, False, True, False, False]
    assert strikes.disabled


def test_a_success_in_between_starts_the_count_again() -> None:
    strikes = Strikes()
    strikes.failure()
    strikes.failure()
    strikes.success()
    strikes.failure()
    strikes.failure()
    assert not strikes.disabled
