"""Definitions in the source files of a package, found by parsing: nothing of the package is imported.

An attribute is found where its class says it: in the body, in ``self.x = ...`` of a method, or in a base class of the
same package, also through re-exports. Attributes that exist only at run time cannot be found.
"""

import ast
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

_DEPTH = 8  # of imports of imports, and of base classes of base classes
_AS_ATTRIBUTES = frozenset({"property", "cached_property", "setter", "classproperty"})
_MISSING = "does not exist"

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Source(NamedTuple):
    """One file of a package."""

    text: str
    is_package: bool = False  # an __init__.py


Read = Callable[[str], Source | None]  # a module's name → its file; None where there is none


def place_of(package: str) -> str:
    """The file of an installed package, the same in every process; empty where there is none."""
    spec = find_spec(package)
    return (spec.origin or "") if spec is not None else ""


def installed(package: str) -> Read:
    """The source files of an installed package: its place is looked up, nothing of it is imported."""
    spec = find_spec(package)
    folders = [Path(place) for place in (spec.submodule_search_locations or ()) if place] if spec is not None else []

    def read(module: str) -> Source | None:
        relative = Path(*module.split(".")[1:])
        for folder in folders:
            for path in (folder / relative / "__init__.py", (folder / relative).with_suffix(".py")):
                if path.is_file():
                    return Source(path.read_text(encoding="utf-8"), path.name == "__init__.py")
        return None

    return read


@dataclass(frozen=True)
class Found:
    """What stands under a name; ``owner`` where it is a class's."""

    definition: ast.stmt
    owner: ast.ClassDef | None = None

    @property
    def is_method(self) -> bool:
        """Whether an attribute has to be called, so that reading it gives no value."""
        function = self.owner is not None and isinstance(self.definition, Function)
        return function and not _decorators(self.definition) & _AS_ATTRIBUTES

    def signature_problem(self, wanted: tuple[str, ...], *, accepts: bool, is_async: bool) -> str | None:
        """What is wrong with a function, as the end of a sentence; None if nothing is.

        Args:
            wanted: Its parameters by name and in order, with ``*`` and ``**``.
            accepts: Further parameters may be there if they have defaults; else there may be none.
        """
        definition = self.definition
        if not isinstance(definition, Function) or _decorators(definition) & _AS_ATTRIBUTES:
            return "is no function"
        if is_async != isinstance(definition, ast.AsyncFunctionDef):
            return "is no coroutine function" if is_async else "is a coroutine function"
        static = self.owner is not None and wanted[:1] not in (("self",), ("cls",))
        if static and "staticmethod" not in _decorators(definition):
            return "is no static method"
        found = parameters_of(definition)
        if accepts:
            named = dict(found)
            takes_any = any(parameter.startswith("**") for parameter in named)
            fits = all(parameter in named or takes_any for parameter in wanted)
            fits = fits and all(optional or parameter in wanted for parameter, optional in found)
        else:
            fits = tuple(parameter for parameter, _ in found) == wanted
        return None if fits else f"takes ({', '.join(named for named, _ in found)}), not ({', '.join(wanted)})"


class Sources:
    """A package's files, each parsed once."""

    def __init__(self, package: str, read: Read) -> None:
        self._package = package
        self._read = read
        self._modules: dict[str, _Module | None] = {}
        self._unreadable: dict[str, str] = {}

    def find(self, module: str, path: str = "") -> Found | str:
        """A module (no path), ``name``, ``Class.attribute``; or what is wrong, as the end of a sentence."""
        inside = self._module(module)
        if inside is None:
            return self._unreadable.get(module, _MISSING)
        if not path:
            return Found(inside.tree.body[0] if inside.tree.body else ast.Pass())
        outer, _, attribute = path.partition(".")
        if (place := self._find(inside, outer)) is None:
            return _MISSING
        if not attribute:
            return Found(place.definition)
        found = self._member(place, attribute) if isinstance(place.definition, ast.ClassDef) else None
        return found or _MISSING

    def abstract_methods(self, module: str, path: str) -> list[str]:
        """Of a class, its base classes' too; none of what is no class."""
        inside = self._module(module)
        place = self._find(inside, path) if inside is not None else None
        if place is None or not isinstance(place.definition, ast.ClassDef):
            return []
        names = {name for one in self._lineage(place) for name in _abstract_methods(one)}
        found = {name: self._member(place, name) for name in names}
        return sorted(name for name, one in found.items() if one and "abstractmethod" in _decorators(one.definition))

    def _module(self, name: str) -> "_Module | None":
        if name not in self._modules:
            self._modules[name] = None
            try:
                if (source := self._read(name)) is not None:
                    self._modules[name] = _Module(name, source.is_package, ast.parse(source.text))
            except (OSError, ValueError, SyntaxError) as error:  # an unknown encoding, newer syntax, ...
                self._unreadable[name] = f"cannot be read ({type(error).__name__}: {error})"
        return self._modules[name]

    def _find(self, module: "_Module", name: str) -> "_Place | None":
        """Where a module's name is defined; the import itself where that leads out of the package, or to a module."""
        definition = module.names.get(name)
        for _ in range(_DEPTH):
            if not isinstance(definition, ast.ImportFrom):
                break
            source, original = module.origin(definition, name)
            if source.partition(".")[0] != self._package:
                break
            target = self._module(source)
            if target is None or original not in target.names:
                known = self._module(f"{source}.{original}") is not None or (target is not None and target.is_open)
                return _Place(module, definition) if known else None
            module, name, definition = target, original, target.names[original]
        return None if definition is None else _Place(module, definition)

    def _member(self, place: "_Place", name: str) -> Found | None:
        for definition in self._lineage(place):
            if (found := member(definition, name)) is not None:
                return Found(found, definition)
        return None

    def _lineage(self, place: "_Place", depth: int = _DEPTH) -> Iterator[ast.ClassDef]:
        """A class and its base classes, as far as they are the package's."""
        if isinstance(place.definition, ast.ClassDef):
            yield place.definition
            for base in place.definition.bases if depth else ():
                if (inherited := self._base(place.module, base)) is not None:
                    yield from self._lineage(inherited, depth - 1)

    def _base(self, module: "_Module", expression: ast.expr) -> "_Place | None":
        """``Base``, ``module.Base`` or ``Base[...]``."""
        match expression:
            case ast.Subscript(value=inner):
                return self._base(module, inner)
            case ast.Name(id=name):
                return self._find(module, name)
            case ast.Attribute(value=ast.Name(id=name), attr=attribute):
                imported = module.names.get(name)
                if isinstance(imported, ast.ImportFrom):
                    inside = self._module(".".join(module.origin(imported, name)))
                    return self._find(inside, attribute) if inside is not None else None
        return None


class _Place(NamedTuple):
    module: "_Module"
    definition: ast.stmt


@dataclass(frozen=True)
class _Module:
    name: str
    is_package: bool
    tree: ast.Module

    @cached_property
    def names(self) -> Mapping[str, ast.stmt]:
        """What the module defines or imports, also in conditions and ``try``.

        A definition counts before an import, and a class or a function before what is made of it under its name. What
        is imported for type checkers only is not there.
        """
        found: dict[str, ast.stmt] = {}
        for statement in _flat(self.tree.body):
            for name in _defined(statement):
                known = found.get(name)
                remade = isinstance(known, ast.ClassDef | Function) and isinstance(statement, ast.Assign)
                if known is None or not (remade or isinstance(statement, ast.ImportFrom | ast.Import)):
                    found[name] = statement
        return found

    @cached_property
    def is_open(self) -> bool:
        """Whether it has names that its text does not say."""
        return "__getattr__" in self.names or "*" in self.names

    def origin(self, statement: ast.ImportFrom, name: str) -> tuple[str, str]:
        """The module that a name is imported from, and its name there."""
        original = next(alias.name for alias in statement.names if (alias.asname or alias.name) == name)
        if not statement.level:
            return statement.module or "", original
        parts = self.name.split(".")
        base = parts[: len(parts) - statement.level + self.is_package]
        return ".".join([*base, *filter(None, [statement.module])]), original


def member(definition: ast.ClassDef, name: str) -> ast.stmt | None:
    """What a class has by itself under this name: in its body, or because a method assigns it to ``self``."""
    found = None
    for statement in _flat(definition.body):
        if name in _defined(statement):
            found = statement
    if found is not None:
        return found
    for statement in _flat(definition.body):
        if isinstance(statement, Function):
            for inner in _flat(statement.body):
                if isinstance(inner, ast.Assign | ast.AnnAssign) and name in _set_on_self(inner):
                    return inner
    return None


def parameters_of(function: Function) -> list[tuple[str, bool]]:
    """A function's parameters by name and in order, with ``*`` and ``**``, and whether a call may leave each out."""
    given = function.args
    positional = [*given.posonlyargs, *given.args]
    required = len(positional) - len(given.defaults)
    found = [(one.arg, at >= required) for at, one in enumerate(positional)]
    if given.vararg is not None:
        found.append((f"*{given.vararg.arg}", True))
    found += [(one.arg, default is not None) for one, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    if given.kwarg is not None:
        found.append((f"**{given.kwarg.arg}", True))
    return found


def _abstract_methods(definition: ast.ClassDef) -> list[str]:
    functions = [one for one in _flat(definition.body) if isinstance(one, Function)]
    return [one.name for one in functions if "abstractmethod" in _decorators(one)]


def _decorators(definition: ast.stmt) -> set[str]:
    """The last part of each one's name."""
    return {ast.unparse(one).partition("(")[0].rpartition(".")[2] for one in getattr(definition, "decorator_list", ())}


def _flat(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements, and those inside of conditions, loops, ``try`` and ``with``, but not of classes and functions."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.ClassDef | Function):
            continue
        for_types = isinstance(statement, ast.If) and ast.unparse(statement.test).endswith("TYPE_CHECKING")
        for part in ("body", "orelse", "finalbody", "handlers"):
            for inner in getattr(statement, part, ()):
                if for_types and part == "body" and isinstance(inner, ast.Import | ast.ImportFrom):
                    continue
                yield from _flat(inner.body if isinstance(inner, ast.ExceptHandler) else [inner])


def _defined(statement: ast.stmt) -> list[str]:
    match statement:
        case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            return [name]
        case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
            return [alias.asname or alias.name for alias in aliases]
        case ast.Assign() | ast.AnnAssign():
            return [target.id for target in _targets(statement) if isinstance(target, ast.Name)]
        case _:
            return []


def _set_on_self(statement: ast.Assign | ast.AnnAssign) -> list[str]:
    attributes = [target for target in _targets(statement) if isinstance(target, ast.Attribute)]
    return [one.attr for one in attributes if isinstance(one.value, ast.Name) and one.value.id == "self"]


def _targets(statement: ast.Assign | ast.AnnAssign) -> list[ast.expr]:
    """What is assigned to, each of a tuple's alone."""
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    return [one for target in targets for one in (target.elts if isinstance(target, ast.Tuple) else [target])]
