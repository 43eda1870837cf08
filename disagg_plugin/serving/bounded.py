"""Calling somebody else's code with a bounded wait: one daemon thread a hook, and three strikes.

    answer = hook.ask(snapshot, wait_s=0.005)      # Answered(value) | Raised(error) | Late()

The caller waits on a lock, never on the code: when the time is over it goes on, and what the hook answers later is
discarded, because each question has a slot of its own which nobody reads any more. A question that was given up
before the thread came to it is not put to the hook at all.

A Python thread cannot be ended from outside. A hook that never returns keeps its one thread until the process ends;
the thread is a daemon, so it does not hold up the exit, and a disabled hook is never given another. What a bounded
wait cannot promise: native code that keeps the interpreter's lock stops every thread, and a pure Python busy loop
hands the lock over only each ``sys.getswitchinterval()`` (5 ms).
"""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

STRIKES = 3  # failures in a row after which a hook is disabled

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class Answered:
    """It answered in time; whether the answer makes sense is the caller's business."""

    value: object


@dataclass(frozen=True, slots=True)
class Raised:
    """It raised in time."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class Late:
    """No answer within the bound."""


Outcome = Answered | Raised | Late


class _Question(Generic[S]):
    """One call: whoever asked reads ``outcome`` after ``done`` could be acquired, or gives up."""

    __slots__ = ("done", "given_up", "outcome", "snapshot")

    def __init__(self, snapshot: S) -> None:
        self.snapshot = snapshot
        self.outcome: Outcome = Late()
        self.given_up = False
        self.done = threading.Lock()
        self.done.acquire()


class BoundedHook(Generic[S]):
    """One implementation of one hook, called on a thread of its own.

    The thread starts with the first question, so that loading plugins starts none, and a fork before that is safe.
    """

    def __init__(self, call: Callable[[S], object], *, name: str) -> None:
        self._call = call
        self._name = name
        self._questions: queue.SimpleQueue[_Question[S] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def ask(self, snapshot: S, *, wait_s: float) -> Outcome:
        """Put the question and wait at most ``wait_s`` for the answer, the wait for the thread included."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name=f"disagg-hook {self._name}", daemon=True)
            self._thread.start()
        question = _Question(snapshot)
        self._questions.put(question)
        if question.done.acquire(timeout=max(0.0, wait_s)):
            return question.outcome
        question.given_up = True
        return Late()

    def close(self) -> None:
        """Let the thread end when it is free; does not wait for it."""
        self._questions.put(None)

    @property
    def running(self) -> bool:
        """Whether the thread is there, stuck or not."""
        return self._thread is not None and self._thread.is_alive()

    def _serve(self) -> None:
        while (question := self._questions.get()) is not None:
            if question.given_up:
                continue
            try:
                question.outcome = Answered(self._call(question.snapshot))
            except BaseException as error:  # noqa: BLE001 - somebody else's code: SystemExit is an answer like any other
                question.outcome = Raised(error)
            question.done.release()


class Strikes:
    """Counts failures in a row; the third disables."""

    __slots__ = ("count", "disabled")

    def __init__(self) -> None:
        self.count = 0
        self.disabled = False

    def success(self) -> None:
        self.count = 0

    def failure(self) -> bool:
        """Count one; whether this is the one that disables."""
        self.count += 1
        if self.disabled or self.count < STRIKES:
            return False
        self.disabled = True
        return True
