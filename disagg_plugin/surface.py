"""What a connector takes from its engine: one table, and a check of it that imports nothing of the engine.

A connector's ``surface.py`` lists every name of its engine: what it imports, calls, overrides and reads. ``check``
looks for each of them in the engine's source files, so that a release which lacks one is told in one line, instead of
by a traceback from wherever the name is used first; ``tools/compat.py`` asks the same of a wheel that is not installed.
``disagg_plugin/sources.py`` says what is found.
"""

import os
from dataclasses import dataclass, field
from typing import Literal

from packaging.version import InvalidVersion, Version

from disagg_plugin.sources import Read, Sources, installed, place_of

Match = Literal["exists", "exact", "accepts"]

CHECKED_VARIABLE = "DISAGG_SURFACE_CHECKED"  # the release that fitted an engine's first process, for its children


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
        first: The first release that has it; older releases work without it.
        last: The last release that has it, or as many of its numbers as matter; later ones have something else instead.
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
        last = Version(self.last).release if self.last else release.release
        begun = not self.first or Version(self.first).release <= release.release
        return begun and release.release[: len(last)] <= last


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
        sources = Sources(self.package, read)
        wanted = [name for name in self.names if release is None or name.belongs_to(release)]
        found = [Mismatch(name, problem) for name in wanted if (problem := _problem(sources, name))]
        found += [Mismatch(name, "is abstract, and the connector has none") for name in _abstract(sources, wanted)]
        return sorted(found, key=lambda mismatch: bool(mismatch.name.without))

    def check(self, version: str, read: Read | None = None) -> str | None:
        """Why the connector cannot work with this release, as one line that names both; None if it can.

        An engine's child processes believe their parent, as long as they have the same engine from the same place.
        """
        token = f"{self.package}=={version} at {place_of(self.package)}" if read is None else ""
        if token and os.environ.get(CHECKED_VARIABLE) == token:
            return None
        if (problem := self.too_old(version) or self._first_mismatch(read or installed(self.package), version)) is None:
            if token:
                os.environ[CHECKED_VARIABLE] = token
            return None
        return f"disagg does not fit {self.engine} {version} (supported: {self.supported}): {problem}"

    def _first_mismatch(self, read: Read, version: str) -> str | None:
        if read(self.package) is None:
            return "its source files are not installed, so that nothing can be checked"
        return next((str(mismatch) for mismatch in self.mismatches(read, version) if not mismatch.name.without), None)

    def too_old(self, version: str) -> str | None:
        """As the end of ``check``'s line. Development builds are judged by their names: many are called 0.1.dev1."""
        release = _parsed(version)
        old = release is not None and not release.is_devrelease and release.release < Version(self.oldest).release
        return f"it is older than {self.oldest}" if old else None

    def unseen(self, version: str) -> str | None:
        """A line for the start of an engine that fits and was never run with us; None for one that was."""
        release = _parsed(version)
        if release is not None and any(release.release == Version(one).release for one in self.run):
            return None
        return f"disagg fits {self.engine} {version} by its names, but was run with {', '.join(self.run)} only"

    @property
    def supported(self) -> str:
        """The releases, as a range."""
        return self.oldest if self.oldest == self.newest else f"{self.oldest} to {self.newest}"


def _problem(sources: Sources, name: Name) -> str | None:
    """What is wrong with this name, as the end of a sentence that begins with it; None if nothing is."""
    found = sources.find(name.module, name.path)
    if isinstance(found, str):
        return found
    if name.parameters is not None:
        accepts = name.match == "accepts"
        return found.signature_problem(name.parameters, accepts=accepts, is_async=name.is_async)
    return "is a method" if found.is_method else None


def _abstract(sources: Sources, names: list[Name]) -> list[Name]:
    """Methods that whoever subclasses must have, of each class of which the table has overrides, and which it lacks."""
    ours = {(name.module, name.path) for name in names if name.match == "exact"}
    classes = sorted({(module, path.rpartition(".")[0]) for module, path in ours if "." in path})
    return [
        Name(module, f"{owner}.{method}")
        for module, owner in classes
        for method in sources.abstract_methods(module, owner)
        if (module, f"{owner}.{method}") not in ours
    ]


def _parsed(version: str) -> Version | None:
    try:
        return Version(version)
    except InvalidVersion:
        return None
