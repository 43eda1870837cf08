"""Import stand-in for sglang-kernel, whose only build is for CUDA: a CPU engine imports its names and calls none."""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn


class _Absent:
    """A kernel that is not there; only calling it is a mistake."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *_args: object, **_kwargs: object) -> NoReturn:
        raise NotImplementedError(f"{self._name} was called: tests/sglang_standins only lets it be imported")

    def __getattr__(self, name: str) -> "_Absent":
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self._name}.{name}")


class _AbsentModule(ModuleType):
    """A submodule in which every name is absent."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_Absent(self.__name__), name)


class _Submodules(MetaPathFinder, Loader):
    """Finds ``sgl_kernel.anything``."""

    def find_spec(
        self, fullname: str, _path: Sequence[str] | None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.startswith("sgl_kernel.") else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _AbsentModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


sys.meta_path.append(_Submodules())


def __getattr__(name: str) -> Any:
    return getattr(_Absent("sgl_kernel"), name)
