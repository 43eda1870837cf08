"""What happens to an error of ours where an engine calls us: it must not end the engine, or requests of others."""

import functools
import logging
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast

logger = logging.getLogger(__name__)


class Breakable(Protocol):
    """What can give up, once.

    Its ``consequence``, if it has one, says what ends with it.
    """

    @property
    def broken(self) -> bool:
        """It has: its calls do nothing any more."""

    def give_up(self) -> None:
        """Let go of everything; afterwards it is broken."""


_Call = TypeVar("_Call", bound=Callable[..., Any])
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
        except Exception:  # whatever is wrong with us, the engine and everybody's requests go on
            consequence = getattr(self, "consequence", "no KV is exchanged")
            logger.exception("disagg: %s failed; %s until a restart", call.__qualname__, consequence)
            self.give_up()
            return None

    return within


def guarded(call: _Call) -> _Call:
    """A call that never raises and goes on being called: it says None, and its first exception is logged."""
    said = False

    @functools.wraps(call)
    def within(*args: Any, **kwargs: Any) -> Any:
        nonlocal said
        try:
            return call(*args, **kwargs)
        except Exception:  # whatever is wrong with us, the engine and everybody's requests go on
            if not said:
                said = True
                logger.exception("disagg: %s failed; further failures are not logged", call.__qualname__)
            return None

    return cast("_Call", within)
