"""That a prefill engine is about to leave, and how its scheduler processes learn of it in time.

    POST /disagg/drain    an API server ──▶ LeavingWord ──▶ ControlService, with every heartbeat
    SIGTERM               before the engine's own handler: ``before_handler``

The word is a file between the processes of one server on one machine: there while it stands, so that it reaches every
scheduler process and outlives every API server. What a leaving engine does is in ``prefill_service`` (it refuses, and
says so to its decode engines) and ``prefill_side`` (it hands back what it has not begun).
"""

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType


class LeavingWord:
    """Said by API servers, looked at by scheduler processes."""

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: Where the processes of one server meet, see ``meeting_folder``.
        """
        self._path = folder / "leaving"

    @property
    def stands(self) -> bool:
        """Whether the engine is to leave."""
        return self._path.exists()

    def say(self) -> None:
        """It is; idempotent.

        Raises:
            OSError: The folder is gone: the process that started this server has ended.
        """
        self._path.touch()

    def take_back(self) -> None:
        """It stays after all; idempotent."""
        self._path.unlink(missing_ok=True)


def before_handler(number: signal.Signals, call: Callable[[], None]) -> Callable[[], None]:
    """Have ``call`` run first when the signal comes, then the handler that this process has already.

    A process without a handler of its own ends at once, and a signal reaches the main thread only: then nothing is
    changed.

    Returns:
        Puts things back as they were, if nobody has changed them since; main thread only.
    """
    before = signal.getsignal(number)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        return lambda: None

    def handler(signum: int, frame: FrameType | None) -> None:
        call()
        before(signum, frame)

    def undo() -> None:
        if threading.current_thread() is threading.main_thread() and signal.getsignal(number) is handler:
            signal.signal(number, before)

    signal.signal(number, handler)
    return undo
