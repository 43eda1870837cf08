"""Named ranges around what profilers should show: encode, decode, scatter, decide.

    with profile_range("disagg encode"): ...

NVTX (nsys, ncu) where torch was built for CUDA, and ``record_function`` while a torch.profiler runs; otherwise one
comparison and nothing else. It imports no torch by itself: a process without it has nothing to show.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

_OFF = nullcontext()


class _Range:
    """One range, in each of the profilers that listen."""

    __slots__ = ("_name", "_pop", "_push", "_record")

    def __init__(
        self, name: str, push: Callable[[str], Any] | None, pop: Callable[[], Any] | None, record: Any
    ) -> None:
        self._name, self._push, self._pop, self._record = name, push, pop, record

    def __enter__(self) -> None:
        if self._push is not None:
            self._push(self._name)
        if self._record is not None:
            self._record.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._record is not None:
            self._record.__exit__(kind, error, trace)
        if self._pop is not None:
            self._pop()


def profile_range(name: str) -> AbstractContextManager[None]:
    """A range of this name in whatever profiler is there."""
    torch = sys.modules.get("torch")
    if torch is None:
        return _OFF
    cuda = torch.version.cuda is not None
    recording = torch.autograd._profiler_enabled()
    if not (cuda or recording):
        return _OFF
    nvtx = torch.cuda.nvtx if cuda else None
    record = torch.profiler.record_function(name) if recording else None
    return _Range(name, nvtx.range_push if nvtx else None, nvtx.range_pop if nvtx else None, record)
