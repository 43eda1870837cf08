"""A prefill engine that is to leave hears of it in time, from whoever says so."""

import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from disagg_plugin.control.leaving import LeavingWord, before_handler

SIGNAL = signal.SIGUSR2


@pytest.fixture
def heard() -> Iterator[list[str]]:
    """What was called, in order; the process has a handler of its own."""
    calls: list[str] = []
    before = signal.signal(SIGNAL, lambda *_: calls.append("engine"))
    yield calls
    signal.signal(SIGNAL, before)


def test_the_word_stands_until_it_is_taken_back_whoever_looks(tmp_path: Path) -> None:
    one, other = LeavingWord(tmp_path), LeavingWord(tmp_path)
    for _ in range(2):
        one.say()
        assert other.stands
    for _ in range(2):
        other.take_back()
        assert not one.stands


def test_we_hear_a_signal_before_the_engine_does(heard: list[str]) -> None:
    before_handler(SIGNAL, lambda: heard.append("we"))
    signal.raise_signal(SIGNAL)
    assert heard == ["we", "engine"]


def test_afterwards_the_engines_handler_is_alone_again(heard: list[str]) -> None:
    undo = before_handler(SIGNAL, lambda: heard.append("we"))
    undo()
    undo()
    signal.raise_signal(SIGNAL)
    assert heard == ["engine"]


def test_a_handler_that_came_later_stays(heard: list[str]) -> None:
    undo = before_handler(SIGNAL, lambda: heard.append("we"))
    signal.signal(SIGNAL, lambda *_: heard.append("later"))
    undo()
    signal.raise_signal(SIGNAL)
    assert heard == ["later"]


def test_a_process_that_a_signal_ends_at_once_is_left_alone() -> None:
    assert signal.getsignal(SIGNAL) is signal.SIG_DFL
    before_handler(SIGNAL, lambda: None)()
    assert signal.getsignal(SIGNAL) is signal.SIG_DFL


def test_outside_of_the_main_thread_nothing_is_changed(heard: list[str]) -> None:
    thread = threading.Thread(target=before_handler, args=(SIGNAL, lambda: heard.append("we")))
    thread.start()
    thread.join()
    signal.raise_signal(SIGNAL)
    assert heard == ["engine"]
