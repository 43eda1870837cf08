"""What tests do to the processes of an engine that they started."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread

import psutil
from e2e.client import Engine

RUNS_S = 0.005
STANDS_S = 0.045


def end_tree(engine: Engine, how: signal.Signals) -> None:
    """Signal every process of an engine."""
    root = psutil.Process(engine.pid)
    for process in [*root.children(recursive=True), root]:
        os.kill(process.pid, how)


@contextmanager
def slowed(engine: Engine) -> Iterator[None]:
    """The engine gets a tenth of its time, in slices short enough that nobody takes it for dead.

    What passes in 0.2 s on a fast machine lasts for seconds, so that a test can act in the middle of it. The engine may
    be ended inside.
    """
    root = psutil.Process(engine.pid)
    pids = [process.pid for process in [*root.children(recursive=True), root]]
    over = Event()

    def signal_all(how: signal.Signals) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, how)

    def take_turns() -> None:
        while not over.is_set():
            signal_all(signal.SIGSTOP)
            over.wait(STANDS_S)
            signal_all(signal.SIGCONT)
            over.wait(RUNS_S)

    thread = Thread(target=take_turns, name="slowed-engine")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
