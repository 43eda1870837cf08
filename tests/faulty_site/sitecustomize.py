"""Damages one chunk on its way, in engines that were started with this folder on their PYTHONPATH.

There is no switch for this in the plugin. Python imports a module of this name when it starts; it waits for
``disagg_plugin.kv.poster`` to be imported and puts a wrapper around the write of a chunk. While the file named by
``DISAGG_TEST_DAMAGE`` exists, the rank whose number stands in it flips a byte of the next chunk that it writes, and
removes the file. The second attempt, if the peer asks for one, sends the right byte.
"""

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

TARGET = "disagg_plugin.kv.poster"
FLIPPED_BYTE = 300  # of the payload


class _Loader(importlib.abc.Loader):
    """The module's own loader, and then the wrapper."""

    def __init__(self, real: importlib.abc.Loader) -> None:
        self._real = real

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._real.exec_module(module)
        damage_writes(module.Poster, Path(os.environ["DISAGG_TEST_DAMAGE"]))


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def damage_writes(poster: Any, order: Path) -> None:
    """Wrap ``Poster._write``."""
    write = poster._write

    def damaging(self: Any, posted: Any) -> None:
        memory = self._memory(posted.chunk)
        if posted.attempt == 0 and _is_meant(order, self._transport.agent_name):
            memory[FLIPPED_BYTE] ^= 0x10
            self._damaged = posted.chunk
        elif posted.attempt == 1 and getattr(self, "_damaged", None) is posted.chunk:
            memory[FLIPPED_BYTE] ^= 0x10
        write(self, posted)

    poster._write = damaging


def _is_meant(order: Path, agent_name: str) -> bool:
    """Whether this rank is to damage a chunk now; ``<engine>-<rank>-<epoch>`` is its agent's name."""
    with suppress(FileNotFoundError):
        if order.read_text().strip() == agent_name.rsplit("-", 2)[1]:
            order.unlink()
            return True
    return False


if "DISAGG_TEST_DAMAGE" in os.environ:
    sys.meta_path.insert(0, _Finder())
