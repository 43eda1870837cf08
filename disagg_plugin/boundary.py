"""What happens to an error of ours in an engine's thread, where it would end the engine and every request with it."""

import functools
import logging
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

logger = logging.getLogger(__name__)


class Breakable(Protocol):
    """What can give up, once."""

    @property
    def broken(self) -> bool:
        """It has: its calls do nothing any more."""

    def give_up(self) -> None:
        """Let go of everything; afterwards it is broken."""


_Self = TypeVar("_Self", bound=Breakable)
_Args = ParamSpec("_Args")
_Answer = TypeVar("_Answer")


def boundary(call: Callable[Concatenate[_Self, _Args], _Answer]) -> Callable[Concatenate[_Self, _Args], _Answer | None]:
    """A method that never raises: its first exception is logged and makes its object give up; then it says None."""

    @functools.wraps(call)
    def within(self: _Self, /, *args: _Args.args, **kwargs: _Args.kwargs) -> _Answer | None:
        if self.broken:
            return None
        try:
            return call(self, *args, **kwargs)
        except Exception:
            logger.exception("disagg: %s failed; no KV is exchanged until a restart", call.__qualname__)
            self.give_up()
            return None

    return within
