"""Test models are made once, outside the repository, whole or not at all."""

from pathlib import Path

import models
import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def write_config(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def in_cache() -> list[str]:
    return [path.name for path in (models.cache_dir() / "models").iterdir()]


def test_the_cache_is_where_the_user_keeps_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert models.cache_dir() == tmp_path / "disagg-plugin"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert models.cache_dir() == Path.home() / ".cache" / "disagg-plugin"


def test_a_model_is_built_once() -> None:
    built: list[Path] = []

    def build(folder: Path) -> None:
        built.append(folder)
        write_config(folder)

    assert models._cached("a", build) == models._cached("a", build)
    assert len(built) == 1
    assert in_cache() == [f"a-v{models.RECIPE}"]


def test_a_failed_build_leaves_nothing_behind() -> None:
    def fail(folder: Path) -> None:
        write_config(folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        models._cached("a", fail)
    assert in_cache() == []


def test_of_two_builders_the_faster_one_counts() -> None:
    def build_while_another_finishes(folder: Path) -> None:
        write_config(folder)
        models._cached("a", write_config)

    target = models._cached("a", build_while_another_finishes)
    assert (target / "config.json").read_text() == "{}"
    assert in_cache() == [target.name]


def test_every_model_has_a_name_on_the_command_line() -> None:
    assert {"tiny", "tiny-other-seed", "smollm2"} == models.MODELS.keys()
