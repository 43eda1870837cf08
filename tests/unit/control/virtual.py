"""A clock and timers that a test moves by hand."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(eq=False, slots=True)
class VirtualTimer:
    """A call to come."""

    at_s: float
    call: Callable[[], object]
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


class VirtualLoop:
    """Time, posted calls and timers of an I/O thread, without a thread."""

    def __init__(self, now_s: float = 100.0) -> None:
        self.now_s = now_s
        self.posts = 0
        self.wakeups = 0
        self._posted: list[tuple[Callable[..., object], tuple[object, ...]]] = []
        self._timers: list[VirtualTimer] = []

    def clock(self) -> float:
        return self.now_s

    def post(self, callback: Callable[..., object], *args: object) -> None:
        self.posts += 1
        self._posted.append((callback, args))

    def later(self, delay_s: float, callback: Callable[[], object]) -> VirtualTimer:
        timer = VirtualTimer(self.now_s + delay_s, callback)
        self._timers.append(timer)
        return timer

    def run_posted(self) -> None:
        while self._posted:
            callback, args = self._posted.pop(0)
            callback(*args)

    def pass_s(self, seconds: float) -> None:
        """Let time pass; what is due in it happens in its order."""
        end_s = self.now_s + seconds
        self.run_posted()
        while due := [t for t in self._timers if not t.cancelled and t.at_s <= end_s]:
            timer = min(due, key=lambda t: t.at_s)
            self._timers.remove(timer)
            self.now_s = max(self.now_s, timer.at_s)
            self.wakeups += 1
            timer.call()
            self.run_posted()
        self.now_s = end_s
