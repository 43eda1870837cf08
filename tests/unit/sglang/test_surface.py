"""The table of what we take from SGLang: whether the code uses nothing else, and what is said of another release."""

import logging
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from surface_uses import Use, uncovered, uses

import disagg_sglang
from disagg_plugin import surface
from disagg_plugin.sources import Found, Read, Source, Sources
from disagg_plugin.surface import CHECKED_VARIABLE, Name
from disagg_sglang import hooks
from disagg_sglang.surface import SURFACE

FOLDER = Path(disagg_sglang.__file__).parent
GONE = next(name for name in SURFACE.names if str(name).endswith("Scheduler.run_batch"))
ASKING = ["sglang", "--disaggregation-transfer-backend", "disagg"]


def release(*names: Name) -> Read:
    """An SGLang that has these names, and nothing else."""
    modules: dict[str, dict[str, list[Name]]] = {}
    for name in names:
        outer, _, _ = name.path.partition(".")
        modules.setdefault(name.module, {}).setdefault(outer, []).append(name)
    texts = {
        module: "\n".join(_definition(outer, held) for outer, held in of.items()) for module, of in modules.items()
    }
    texts.setdefault("sglang", "")
    return lambda module: Source(texts[module]) if module in texts else None


def _definition(outer: str, names: list[Name]) -> str:
    if members := [replace(name, path=name.path.partition(".")[2]) for name in names if "." in name.path]:
        inner = [_definition(member.path, [member]).replace("\n", "\n    ") for member in members]
        for at, member in enumerate(members):
            if member.parameters is not None and member.parameters[:1] not in (("self",), ("cls",)):
                inner[at] = f"@staticmethod\n    {inner[at]}"
        return "\n    ".join([f"class {outer}:", *inner])
    if (parameters := names[0].parameters) is None:
        return f"{outer} = None"
    keyword = "async def" if names[0].is_async else "def"
    return f"{keyword} {outer}({', '.join(parameters)}):\n    pass"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> "Installed":
    return Installed(monkeypatch)


class Installed:
    """A made-up SGLang, and what ``register`` does with it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.hooked = 0
        monkeypatch.setenv(CHECKED_VARIABLE, "")
        monkeypatch.setattr(hooks, "install", self._install)

    def _install(self) -> None:
        self.hooked += 1

    def register(self, version: str, read: Read, argv: list[str]) -> None:
        self._monkeypatch.setitem(sys.modules, "sglang.version", SimpleNamespace(__version__=version))
        self._monkeypatch.setattr(surface, "installed", lambda _package: read)
        self._monkeypatch.setattr(surface, "place_of", lambda _package: "made up")
        self._monkeypatch.setattr(sys, "argv", argv)
        disagg_sglang.register()


def test_the_code_takes_nothing_from_sglang_that_the_table_has_not() -> None:
    found = uses(FOLDER, "sglang")
    assert uncovered(SURFACE, found) == []
    names = {use.name for use in found}
    backend = "sglang.srt.disaggregation.base.conn.KVPoll.Success"
    assert {backend, "sglang.srt.entrypoints.http_server.app", str(GONE)} <= names, "all three kinds were looked for"


def test_the_table_has_every_hook_with_all_of_its_parameters() -> None:
    every = hooks.EVERYWHERE + hooks.IN_API_SERVER + hooks.IN_SCHEDULER
    wanted = {hook.target: "exists" if hook.kind == "replace" else "exact" for hook in every}
    assert {str(name): name.match for name in SURFACE.names if str(name) in wanted} == wanted


@pytest.mark.parametrize(
    ("text", "name"),
    [
        pytest.param("from engine.a import B", "engine.a.B", id="an import"),
        pytest.param("def f():\n  from engine.a import B as C", "engine.a.B", id="an import in a function"),
        pytest.param("if TYPE_CHECKING:\n  from engine.a import B", "engine.a.B", id="for type checking only"),
        pytest.param("from engine.a import B\nB.c.d", "engine.a.B.c", id="an attribute"),
        pytest.param("import engine.a as b\nb.c", "engine.a.c", id="an attribute of a module"),
        pytest.param("import engine.a\nengine.a.c", "engine.a.c", id="of a module with its whole name"),
        pytest.param('A = "engine.a"\nB = f"{A}.B"\nf(f"{B}.c")', "engine.a.B.c", id="a target in pieces"),
    ],
)
def test_what_the_table_has_not_is_found_in_the_source(tmp_path: Path, text: str, name: str) -> None:
    (tmp_path / "code.py").write_text(text)
    assert Use(name, "code.py") in uncovered(SURFACE, uses(tmp_path, "engine"))


def test_a_release_with_every_name_fits() -> None:
    assert SURFACE.check("0.5.23", release(*SURFACE.names)) is None


def test_a_class_that_is_made_anew_under_its_name_is_found() -> None:
    """As SGLang's ``ServerArgs``."""
    text = "class Thing:\n    def method(self): ...\nThing = remake(Thing)"
    sources = Sources("engine", lambda _module: Source(text))
    assert isinstance(sources.find("engine", "Thing.method"), Found)
    assert sources.find("engine", "Thing.other") == "does not exist"


@pytest.mark.parametrize(
    ("names", "said"),
    [
        pytest.param((), "run_batch does not exist", id="the thing is gone"),
        pytest.param(
            (replace(GONE, parameters=("self", "batch")),),
            "run_batch takes (self, batch), not (self, batch, pp_proxy_tensors)",
            id="its parameters are others",
        ),
    ],
)
@pytest.mark.parametrize("asks", [True, False], ids=["a command that asks for disagg ends", "any other goes on"])
def test_one_line_names_a_release_that_does_not_fit_and_the_thing(
    installed: Installed, caplog: pytest.LogCaptureFixture, names: tuple[Name, ...], said: str, asks: bool
) -> None:
    read = release(*(name for name in SURFACE.names if name != GONE), *names)
    if asks:
        with pytest.raises(SystemExit) as caught:
            installed.register("0.5.23", read, ASKING)
        line = str(caught.value)
    else:
        installed.register("0.5.23", read, ["sglang"])
        (line,) = caplog.messages
        line = line.removesuffix(". It stays out of this SGLang.")
    assert "\n" not in line
    assert line.startswith(f"disagg does not fit SGLang 0.5.23 (supported: {SURFACE.supported}): ")
    assert line.endswith(said)
    assert not installed.hooked


def test_an_older_release_is_named_as_too_old(installed: Installed) -> None:
    with pytest.raises(SystemExit, match=rf"SGLang 0\.4\.9 .*it is older than {SURFACE.oldest}$"):
        installed.register("0.4.9", release(*SURFACE.names), ASKING)


@pytest.mark.parametrize(
    ("version", "argv", "said"),
    [
        pytest.param(
            "99.0",
            ASKING,
            ["disagg fits SGLang 99.0 by its names, but was run with 0.5.22, 0.5.23 only"],
            id="a release that was never run is named",
        ),
        pytest.param("99.0", ["sglang"], [], id="but not where disagg does nothing"),
        pytest.param(SURFACE.newest, ASKING, [], id="one that was run is not"),
    ],
)
def test_a_release_that_fits_is_hooked(
    installed: Installed, caplog: pytest.LogCaptureFixture, version: str, argv: list[str], said: list[str]
) -> None:
    with caplog.at_level(logging.INFO):
        installed.register(version, release(*SURFACE.names), argv)
    assert installed.hooked == 1
    assert caplog.messages == said
