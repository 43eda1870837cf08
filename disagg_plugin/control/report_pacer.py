"""When a prefill engine reports its load: soon after it changed, never too often, never too seldom.

At most every ``AT_MOST_EVERY_S``, however many steps there were, and at least every ``AT_LEAST_EVERY_S`` while somebody
listens. An engine that does nothing is woken by the second timer alone.
"""

import time
from collections.abc import Callable
from typing import Protocol

AT_MOST_EVERY_S = 0.02
AT_LEAST_EVERY_S = 0.4  # 0.5 is promised; timers are late on a busy machine


class Timer(Protocol):
    """A call to come, as ``asyncio.TimerHandle``."""

    def cancel(self) -> None: ...


Later = Callable[[float, Callable[[], None]], Timer]


class ReportPacer:
    """Calls ``report`` in the I/O thread at the right times.

    Args:
        report: Sends what there is; answers whether anybody listens.
        post: Runs a call in the I/O thread soon; from any thread.
        later: Runs a call there after so many seconds; I/O thread only.
    """

    def __init__(
        self,
        report: Callable[[], bool],
        *,
        post: Callable[..., None],
        later: Later,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._report = report
        self._post = post
        self._later = later
        self._clock = clock
        self._waiting = False  # a change is on its way to the I/O thread, or to the timer
        self._sent_s = float("-inf")
        self._timer: Timer | None = None

    def changed(self) -> None:
        """There is something to report. Any thread; wakes the I/O thread once a report, not once a change."""
        if not self._waiting:
            self._waiting = True
            self._post(self.soon)

    def soon(self) -> None:
        """Report now, or as soon as it is allowed; I/O thread."""
        wait_s = self._sent_s + AT_MOST_EVERY_S - self._clock()
        if wait_s <= 0:
            self._now()
        else:
            self._waiting = True  # further changes need no further wake-up
            self._set_timer(wait_s)

    def stop(self) -> None:
        """No more reports by timer; I/O thread."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _now(self) -> None:
        self._waiting = False  # before the load is read: a change from now on is news
        self._sent_s = self._clock()
        if self._report():
            self._set_timer(AT_LEAST_EVERY_S)
        else:
            self.stop()

    def _set_timer(self, seconds: float) -> None:
        self.stop()
        self._timer = self._later(seconds, self._now)
