"""What a connector takes from its engine: one table, and a check of it that imports nothing of the engine.

A connector's ``surface.py`` lists every name of its engine: what it imports, calls, overrides and reads. ``check``
looks for each of them in the engine's source files, so that a release which lacks one is told in one line, instead of
by a traceback from wherever the name is used first; ``tools/compat.py`` asks the same of a wheel that is not installed.

An attribute is found where its class says it: in the body, in ``self.x = ...`` of a method, or in a base class of the
same engine, also through re-exports. What a class gets at run time only cannot be found, and does not belong here.
"""

import ast
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

from packaging.version import InvalidVersion, Version


class Source(NamedTuple):
    """One file of an engine."""

    text: str
    is_package: bool = False  # an __init__.py


Read = Callable[[str], Source | None]  # a module's name → its file; None where there is none
Match = Literal["exists", "exact", "accepts"]

CHECKED_VARIABLE = "DISAGG_SURFACE_CHECKED"  # the release that fitted an engine's first process, for its children
_FOLLOWED_IMPORTS = 8


@dataclass(frozen=True, slots=True)
class Name:
    """One thing of an engine.

    Attributes:
        module: Where it is looked for; it may be imported there from elsewhere.
        path: ``function``, ``Class``, ``Class.method`` or ``Class.attribute``; empty for the module itself.
        parameters: A function's, by name and in order, with ``*`` and ``**``; None where it is no function of interest.
        match: ``exact`` for what we override or wrap: the engine calls ours as it calls its own. ``accepts`` for what
            we call: parameters beyond ours must have defaults.
        is_async: Whether a function is a coroutine function.
        first: The first release that has it; older ones get on without.
        last: The last release that has it; newer ones have something else instead.
        without: What is lost where it is missing; empty if nothing works without.
    """

    module: str
    path: str = ""
    parameters: tuple[str, ...] | None = None
    match: Match = "exists"
    is_async: bool = False
    first: str = ""
    last: str = ""
    without: str = ""

    def __str__(self) -> str:
        return f"{self.module}.{self.path}" if self.path else self.module

    def belongs_to(self, release: Version) -> bool:
        """Whether an engine of this release has to have it."""
        return (not self.first or Version(self.first).release <= release.release) and (
            not self.last or release.release <= Version(self.last).release
        )


def reads(module: str, *paths: str, first: str = "", last: str = "", without: str = "") -> tuple[Name, ...]:
    """Modules (no path), classes, attributes and constants: they have to be there."""
    names = [Name(module, path, first=first, last=last, without=without) for path in paths or ("",)]
    return tuple(names)


def calls(module: str, *signatures: str, first: str = "", last: str = "", without: str = "") -> tuple[Name, ...]:
    """What we call, as ``Class.method(self, a, b)`` with the parameters that we pass; ``async`` before a coroutine."""
    return tuple(_function(module, text, "accepts", first, last, without) for text in signatures)


def overrides(module: str, *signatures: str, first: str = "", last: str = "", without: str = "") -> tuple[Name, ...]:
    """What we override or wrap, as in ``calls``, with all of its parameters."""
    return tuple(_function(module, text, "exact", first, last, without) for text in signatures)


def _function(module: str, text: str, match: Match, first: str, last: str, without: str) -> Name:
    is_async = text.startswith("async ")
    path, _, inner = text.removeprefix("async ").rstrip(")").partition("(")
    parameters = tuple(part.strip() for part in inner.split(",") if part.strip())
    return Name(module, path, parameters, match, is_async, first, last, without)


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One name that is not as expected: ``str`` of it is the end of a sentence, after a colon."""

    name: Name
    problem: str

    def __str__(self) -> str:
        return f"{self.name} {self.problem}"


@dataclass(frozen=True)
class Surface:
    """All that a connector takes from an engine.

    Attributes:
        engine: As people call it.
        package: As Python calls it.
        oldest: First release that is supported.
        newest: Last release that the names were seen in.
        run: Releases on which real engines were run.
    """

    engine: str
    package: str
    oldest: str
    newest: str
    run: tuple[str, ...]
    names: tuple[Name, ...] = field(repr=False)

    def mismatches(self, read: Read, version: str) -> list[Mismatch]:
        """Every name of this release that is not as expected, those first without which nothing works."""
        release = _parsed(version)
        sources = Sources(read)
        wanted = [name for name in self.names if release is None or name.belongs_to(release)]
        found = [Mismatch(name, problem) for name in wanted if (problem := sources.problem(name))]
        return sorted(found, key=lambda mismatch: bool(mismatch.name.without))

    def check(self, version: str, read: Read | None = None) -> str | None:
        """Why the connector cannot work with this release, as one line that names both; None if it can.

        A process whose parent found that it fits believes it.
        """
        token = f"{self.package}=={version}"
        if read is None and os.environ.get(CHECKED_VARIABLE) == token:
            return None
        problem = self.too_old(version)
        if problem is None:
            missing = (m for m in self.mismatches(read or installed(self.package), version) if not m.name.without)
            problem = next(map(str, missing), None)
        if problem is not None:
            return f"disagg does not fit {self.engine} {version} (supported: {self.supported}): {problem}"
        if read is None:
            os.environ[CHECKED_VARIABLE] = token
        return None

    def too_old(self, version: str) -> str | None:
        """As the end of ``check``'s line; a version that cannot be read, as of a build of one's own, is not too old."""
        release = _parsed(version)
        old = release is not None and release.release < Version(self.oldest).release
        return f"it is older than {self.oldest}" if old else None

    def is_newer(self, version: str) -> bool:
        """Whether nobody has looked at this release yet."""
        release = _parsed(version)
        return release is not None and release.release > Version(self.newest).release

    @property
    def supported(self) -> str:
        """The releases, as a range."""
        return self.oldest if self.oldest == self.newest else f"{self.oldest} to {self.newest}"


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


class Sources:
    """Definitions in an engine's files, each file parsed once."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._modules: dict[str, _Module | None] = {}

    def problem(self, name: Name) -> str | None:
        """What is wrong with this name, as the end of a sentence that begins with it; None if nothing is."""
        if (module := self._module(name.module)) is None:
            return "does not exist"
        if not name.path:
            return None
        outer, _, member = name.path.partition(".")
        if (place := self._find(module, outer)) is None:
            return "does not exist"
        definition: ast.stmt | None = place.definition
        if member:
            definition = self._member(place, member) if isinstance(definition, ast.ClassDef) else None
        if definition is None:
            return "does not exist"
        return _signature_problem(name, definition) if name.parameters is not None else None

    def _module(self, name: str) -> "_Module | None":
        if name not in self._modules:
            source = self._read(name)
            self._modules[name] = None if source is None else _Module(name, source.is_package, ast.parse(source.text))
        return self._modules[name]

    def _find(self, module: "_Module", name: str) -> "_Place | None":
        """Where a module's name is defined; the import itself where that leads out of the engine."""
        definition = module.names.get(name)
        for _ in range(_FOLLOWED_IMPORTS):
            if not isinstance(definition, ast.ImportFrom):
                break
            source, original = module.origin(definition, name)
            target = self._module(source)
            if target is None or original not in target.names:
                break
            module, name, definition = target, original, target.names[original]
        return None if definition is None else _Place(module, definition)

    def _member(self, place: "_Place", name: str, depth: int = _FOLLOWED_IMPORTS) -> ast.stmt | None:
        assert isinstance(place.definition, ast.ClassDef)
        if (found := member(place.definition, name)) is not None:
            return found
        for base in place.definition.bases if depth else ():
            inherited = self._find(place.module, base.id) if isinstance(base, ast.Name) else None
            if inherited is None or not isinstance(inherited.definition, ast.ClassDef):
                continue
            if (found := self._member(inherited, name, depth - 1)) is not None:
                return found
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

        A definition counts before an import, and a class before what is assigned to its name, as it is made anew.
        """
        found: dict[str, ast.stmt] = {}
        for statement in _flat(self.tree.body):
            for name in _defined(statement):
                known = found.get(name)
                remade = isinstance(known, ast.ClassDef) and isinstance(statement, ast.Assign)
                if known is None or not (remade or isinstance(statement, ast.ImportFrom | ast.Import)):
                    found[name] = statement
        return found

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
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            for inner in _flat(statement.body):
                if isinstance(inner, ast.Assign | ast.AnnAssign) and name in _set_on_self(inner):
                    return inner
    return None


def parameters_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[tuple[str, bool]]:
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


def _signature_problem(name: Name, definition: ast.stmt) -> str | None:
    if not isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef):
        return "is no function"
    if name.is_async != isinstance(definition, ast.AsyncFunctionDef):
        return "is no coroutine function" if name.is_async else "is a coroutine function"
    found = parameters_of(definition)
    wanted = name.parameters or ()
    if name.match == "exact":
        fits = tuple(parameter for parameter, _ in found) == wanted
    else:
        named = dict(found)
        takes_any = any(parameter.startswith("**") for parameter in named)
        fits = all(parameter in named or takes_any for parameter in wanted)
        fits = fits and all(optional or parameter in wanted for parameter, optional in found)
    return None if fits else f"takes ({', '.join(named for named, _ in found)}), not ({', '.join(wanted)})"


def _flat(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements, and those inside of conditions, loops, ``try`` and ``with``, but not of classes and functions."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for part in ("body", "orelse", "finalbody", "handlers"):
            for inner in getattr(statement, part, ()):
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


def _parsed(version: str) -> Version | None:
    try:
        return Version(version)
    except InvalidVersion:
        return None
