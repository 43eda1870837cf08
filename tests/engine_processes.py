"""What tests do to the processes of an engine that they started."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread
from typing import Protocol

import psutil

RUNS_S = 0.005
STANDS_AT_MOST_S = 0.4  # nobody takes it for dead
STANDS_TIMES = 24  # as long as it ran
SGLANG_STANDS_TIMES = 4  # its servers take longer for a chunk, and none may take the stall time-out


class Started(Protocol):
    """An engine of either family, by its first process."""

    pid: int


def processes_of(engine: Started) -> list[int]:
    """The pids of an engine, its first process last."""
    root = psutil.Process(engine.pid)
    return [process.pid for process in [*root.children(recursive=True), root]]


def end_tree(engine: Started, how: signal.Signals) -> None:
    """Signal every process of an engine."""
    for pid in processes_of(engine):
        os.kill(pid, how)


def is_alive(engine: Started) -> bool:
    """Whether its first process runs; one that has ended stays a zombie until its start is left."""
    return psutil.pid_exists(engine.pid) and psutil.Process(engine.pid).status() != psutil.STATUS_ZOMBIE


@contextmanager
def stopped_models(engine: Started) -> Iterator[None]:
    """A vLLM engine whose worker processes stand still for the body: its scheduler waits in the middle of a step."""
    with _standing_still(engine, "VLLM::Worker"):
        yield


@contextmanager
def stopped_schedulers(engine: Started) -> Iterator[None]:
    """A vLLM engine whose scheduler processes stand still for the body: its API servers go on and do not know."""
    with _standing_still(engine, "VLLM::EngineCore"):
        yield


@contextmanager
def _standing_still(engine: Started, title: str) -> Iterator[None]:
    children = psutil.Process(engine.pid).children(recursive=True)
    held = [child for child in children if title in " ".join(child.cmdline())]
    assert held, [child.cmdline() for child in children]
    for process in held:
        process.suspend()
    try:
        yield
    finally:
        for process in held:
            process.resume()


class Slices:
    """Turns in which an engine's processes run, and stand still for much longer; a thread's work, until ``end``."""

    def __init__(self, engine: Started, stands_times: int) -> None:
        self._pids = processes_of(engine)
        self._stands_times = stands_times
        self._over = Event()
        self._thread = Thread(target=self._take_turns, name="slowed-engine")
        self._thread.start()

    def stand(self) -> None:
        """No more turns, and no work either."""
        self._no_more_turns()

    def end(self) -> None:
        """The engine runs as ever."""
        self._no_more_turns()
        self._signal_all(signal.SIGCONT)

    def _no_more_turns(self) -> None:
        self._over.set()
        self._thread.join()

    def _take_turns(self) -> None:
        """Measured, because a busy machine makes a short turn longer."""
        while not self._over.is_set():
            self._signal_all(signal.SIGCONT)
            started_s = time.monotonic()
            self._over.wait(RUNS_S)
            self._signal_all(signal.SIGSTOP)
            self._over.wait(min(STANDS_AT_MOST_S, self._stands_times * (time.monotonic() - started_s)))

    def _signal_all(self, how: signal.Signals) -> None:
        for pid in self._pids:
            with suppress(ProcessLookupError):
                os.kill(pid, how)


@contextmanager
def slowed(engine: Started, stands_times: int = STANDS_TIMES) -> Iterator[Slices]:
    """The engine gets a small part of its time, in slices short enough that nobody takes it for dead.

    What passes in 0.2 s on a fast machine lasts for seconds, so that a test can act in the middle of it. The engine may
    be stopped (``stand``, until the end of the block) or ended inside.
    """
    slices = Slices(engine, stands_times)
    try:
        yield slices
    finally:
        slices.end()
