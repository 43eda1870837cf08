"""The one I/O thread of a scheduler process: an asyncio loop owns every socket, so that the scheduler owns none."""

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

logger = logging.getLogger(__name__)


class IoThread:
    """An event loop in a daemon thread named ``disagg-io``.

    ``start`` runs ``opening`` and waits for it (start-up may fail: a port in use); from then on the scheduler's
    thread only posts callbacks.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="disagg-io", daemon=True)
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, opening: Callable[[], Awaitable[None]], *, timeout_s: float = 30.0) -> None:
        """Run the loop and ``opening`` in it.

        Raises:
            Whatever ``opening`` raises; the thread is ended then.
        """
        self._thread.start()

        async def guarded() -> None:
            await opening()

        try:
            asyncio.run_coroutine_threadsafe(guarded(), self._loop).result(timeout_s)
        except BaseException:  # not swallowed: no thread stays behind, whatever interrupts the wait
            self._stop_loop()
            raise

    def post(self, callback: Callable[..., object], *args: object) -> None:
        """Run ``callback(*args)`` in the loop soon; from any thread, never waits. A closed loop ignores it."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback, *args)

    def later(self, delay_s: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        """Run ``callback()`` in the loop after ``delay_s``; loop thread only."""
        return self._loop.call_later(delay_s, callback)

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start a task that the loop keeps alive; loop thread only."""
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def close(self, closing: Callable[[], Awaitable[None]] | None = None, *, timeout_s: float = 5.0) -> None:
        """Run ``closing``, cancel what is left, end the thread. Idempotent."""
        if self._loop.is_closed() or not self._thread.is_alive():
            return

        async def finish() -> None:
            if closing is not None:
                await closing()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

        try:
            asyncio.run_coroutine_threadsafe(finish(), self._loop).result(timeout_s)
        except TimeoutError:
            logger.warning("disagg: the I/O thread did not close within %.0f s", timeout_s)
        self._stop_loop()

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("disagg: a task of the I/O thread failed", exc_info=error)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5.0)
