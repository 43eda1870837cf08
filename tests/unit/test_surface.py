"""What an engine has is found in its files, wherever and however it says it; what it lacks is told by name."""

import os

import pytest

from disagg_plugin.sources import Source, installed
from disagg_plugin.surface import CHECKED_VARIABLE, Surface, calls, overrides, reads

FILES = {
    "engine": Source("from .version import __version__\n", is_package=True),
    "engine.version": Source("__version__ = '1.4'\n"),
    "engine.api": Source(
        "from engine.core import Queue as Queue\nfrom other import Elsewhere\nfrom engine import deep\n"
    ),
    "engine.deep": Source("from .inner import Found\n", is_package=True),
    "engine.deep.inner": Source("from ..core import Queue as Found, Nothing\n"),
    "engine.newer": Source("class Queue(:\n"),
    "engine.core": Source(
        """
import os
from engine import core
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    LIMIT: int = 3
    from engine.deep import OnlyForTypes
try:
    from fast import parse
except ImportError:
    def parse(text): ...

class Base:
    inherited: int
    def close(self): ...
    @abstractmethod
    def drain(self): ...

def keep(function): ...
keep = cached(keep)

class Typed(core.Base[int]):
    @core.abstractmethod
    def pop(self): ...

class Queue(Base):
    size: int = 0
    names, others = (), ()
    def __init__(self, room, *, name=None):
        self.room = room
        if name:
            self.name, self.kind = name, ""
    @property
    def full(self): ...
    def drain(self): ...
    @staticmethod
    def parse(text): ...
    async def add(self, request, index): ...
    def take(self, count, *, timeout_s=1.0, **more): ...
    def nested(self):
        def inner():
            hidden = 1
"""
    ),
}


def surface(*names):
    return Surface("Engine", "engine", "1.2", "1.4", ("1.3",), names)


def lacks(*names, version="1.4"):
    return [str(mismatch) for mismatch in surface(*names).mismatches(FILES.get, version)]


@pytest.mark.parametrize(
    "path",
    [
        pytest.param("LIMIT", id="under a condition"),
        pytest.param("parse", id="in a try"),
        pytest.param("Queue.size", id="a field"),
        pytest.param("Queue.others", id="one of several in one assignment"),
        pytest.param("Queue.room", id="set by a method"),
        pytest.param("Queue.kind", id="one of several set by a method"),
        pytest.param("Queue.full", id="a property"),
        pytest.param("Queue.inherited", id="a base class's"),
        pytest.param("Typed.inherited", id="of a base class that is a module's, and generic"),
        pytest.param("keep", id="a function that is wrapped under its name"),
    ],
)
def test_what_a_module_says_in_any_way_is_found(path):
    assert lacks(*reads("engine.core", path)) == []


@pytest.mark.parametrize(
    ("module", "path"),
    [
        pytest.param("engine", "__version__", id="re-exported by the package"),
        pytest.param("engine.api", "Queue.inherited", id="re-exported with its base class"),
        pytest.param("engine.api", "Elsewhere", id="of another package"),
        pytest.param("engine.api", "deep", id="a module"),
        pytest.param("engine.deep", "Found.size", id="through a package's relative imports, by another name"),
    ],
)
def test_imports_are_followed(module, path):
    assert lacks(*reads(module, path)) == []


@pytest.mark.parametrize(
    ("module", "path"),
    [
        pytest.param("engine.gone", "", id="no module"),
        pytest.param("engine.gone", "Queue", id="no module of a name"),
        pytest.param("engine.core", "Stack", id="no class"),
        pytest.param("engine.core", "Queue.weight", id="no attribute"),
        pytest.param("engine.core", "Queue.hidden", id="a local name of a method"),
        pytest.param("engine.core", "LIMIT.bits", id="of what is no class"),
        pytest.param("engine.core", "OnlyForTypes", id="imported for type checkers only"),
        pytest.param("engine.deep.inner", "Nothing", id="imported from where it is not"),
    ],
)
def test_what_is_not_there_is_told_by_its_full_name(module, path):
    assert lacks(*reads(module, path)) == [f"{module}{'.' if path else ''}{path} does not exist"]


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        pytest.param(overrides("engine.core", "async Queue.add(self, request, index)"), None, id="overridden"),
        pytest.param(
            overrides("engine.core", "Queue.take(self, count)"), "takes (self, count, timeout_s, **more)", id="grew"
        ),
        pytest.param(overrides("engine.core", "Queue.add(self, request, index)"), "is a coroutine", id="awaited now"),
        pytest.param(overrides("engine.core", "async Queue.close(self)"), "is no coroutine", id="not awaited any more"),
        pytest.param(calls("engine.core", "Queue.take(self, count)"), None, id="called without what has a default"),
        pytest.param(calls("engine.core", "Queue.take(self, count, other)"), None, id="called with what it passes on"),
        pytest.param(calls("engine.core", "Queue.__init__(self)"), "takes (self, room, name), not", id="needs more"),
        pytest.param(calls("engine.core", "parse(text, strict)"), "takes (text), not (text, strict)", id="takes less"),
        pytest.param(calls("engine.core", "Queue.size(self)"), "is no function", id="no function"),
        pytest.param(calls("engine.core", "Queue.full(self)"), "is no function", id="a property now"),
        pytest.param(reads("engine.core", "Queue.take"), "is a method", id="a method now"),
        pytest.param(overrides("engine.core", "Queue.parse(text)"), None, id="a static method"),
        pytest.param(overrides("engine.core", "Queue.take(count)"), "is no static method", id="not static any more"),
        pytest.param(reads("engine.newer", "Queue"), "cannot be read (SyntaxError", id="a newer Python's file"),
    ],
)
def test_an_override_must_match_exactly_and_a_call_must_be_accepted(names, problem):
    found = lacks(*names)
    assert found == [] if problem is None else problem in found[0]


def test_a_name_counts_in_the_releases_that_have_it():
    since, until = reads("engine.gone", first="1.3"), reads("engine.gone", last="1.3")
    assert [bool(lacks(*since, version=version)) for version in ("1.2.9", "1.3", "1.3.1.dev7+g12")] == [
        False,
        True,
        True,
    ]
    assert [bool(lacks(*until, version=one)) for one in ("1.2.9", "1.3", "1.3.1", "1.4")] == [True, True, True, False]


def test_the_line_names_the_release_what_is_supported_and_the_thing():
    lost = reads("engine.gone", without="something")
    needed = reads("engine.core", "Stack")
    line = "disagg does not fit Engine 1.4 (supported: 1.2 to 1.4): engine.core.Stack does not exist"
    assert surface(*lost, *needed).check("1.4", FILES.get) == line
    assert surface(*lost).check("1.4", FILES.get) is None
    assert "older than 1.2" in str(surface().check("1.1.9", FILES.get))


def test_a_release_that_was_never_run_is_judged_by_its_names_and_named():
    fits = surface(*reads("engine.core", "Queue"))
    assert [fits.check(version, FILES.get) for version in ("1.5", "built-here", "0.1.dev1+g12ab")] == [None] * 3
    assert fits.unseen("1.5") == "disagg fits Engine 1.5 by its names, but was run with 1.3 only"
    assert fits.unseen("built-here") is not None
    assert fits.unseen("1.3+cpu") is None


def test_an_engine_without_source_files_cannot_be_checked_and_does_not_fit():
    assert "source files are not installed" in str(surface().check("1.4", {}.get))


def test_whoever_subclasses_must_have_all_abstract_methods():
    typed = overrides("engine.core", "Typed.pop(self)")
    lines = ["engine.core.Typed.drain is abstract, and the connector has none"]
    assert lacks(*typed) == lines
    assert lacks(*typed, *overrides("engine.core", "Typed.drain(self)")) == []
    assert lacks(*overrides("engine.core", "Queue.take(self, count, timeout_s, **more)")) == [], "it has its own"


def test_child_processes_believe_their_parent_about_the_same_release_only(monkeypatch):
    monkeypatch.setenv(CHECKED_VARIABLE, "")
    ours = Surface("pytest", "pytest", "1", "2", (), reads("pytest", "raises"))
    theirs = Surface("pytest", "pytest", "1", "2", (), reads("pytest", "nothing_of_this_name"))
    assert ours.check("1") is None
    assert os.environ[CHECKED_VARIABLE] == f"pytest==1 at {pytest.__file__}", "nothing that differs between processes"
    assert theirs.check("1") is None
    assert theirs.check("2") is not None


def test_an_installed_package_is_read_where_it_lies():
    read = installed("disagg_plugin")
    assert "class Surface" in read("disagg_plugin.surface").text
    assert read("disagg_plugin").is_package
    assert read("disagg_plugin.nothing") is None
    assert installed("a_package_that_nobody_has")("a_package_that_nobody_has.x") is None
