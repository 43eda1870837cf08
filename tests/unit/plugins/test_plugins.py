"""Policies are found and chosen by name; whatever could never be called is refused with one line."""

import importlib.metadata
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from disagg_plugin import builtin_policies
from disagg_plugin.errors import ConfigError
from disagg_plugin.hookspecs import hookimpl
from disagg_plugin.plugins import (
    HOOKS,
    Kind,
    PolicySettings,
    choose,
    installed_policies,
    load_plugins,
)
from disagg_policies.snapshots import Local, Snapshot


class Stays:
    """A good plugin with one hook."""

    @hookimpl
    def disagg_decide_offload(self, snapshot: Snapshot) -> Local:
        return Local("stays")


def names(settings: PolicySettings, *extra: tuple[str, object]) -> dict[str, list[str]]:
    chosen = choose(load_plugins(settings, extra=extra), settings)
    return {kind: [policy.name for policy in chosen.of(kind)] for kind in HOOKS}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, object], str]:
    """Make an importable module out of one hook function."""

    def make(name: str, hook: object) -> str:
        made = types.ModuleType(name)
        made.disagg_decide_offload = hook  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, made)
        return name

    return make


@pytest.fixture
def entry_point(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Pretend that a package with this entry point is installed."""
    found: list[importlib.metadata.EntryPoint] = []

    def entry_points(*, group: str, name: str | None = None) -> list[importlib.metadata.EntryPoint]:
        assert group == "disagg"
        return [entry_point for entry_point in found if name in (None, entry_point.name)]

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    return lambda name, value: found.append(importlib.metadata.EntryPoint(name, value, "disagg"))


def test_without_settings_the_default_built_ins_decide() -> None:
    assert names(PolicySettings()) == {
        "offload": ["latency"],
        "placement": ["score"],
        "codec": ["by_link"],
        "admission": ["projected"],
    }


def test_a_name_may_stand_alone_or_in_a_list() -> None:
    assert PolicySettings.model_validate({"offload": "threshold"}).offload == ("threshold",)
    assert PolicySettings.model_validate({"offload": ["a", "b"]}).offload == ("a", "b")
    types_in_schema = [one["type"] for one in PolicySettings.model_json_schema()["properties"]["offload"]["anyOf"]]
    assert types_in_schema == ["string", "array"]


@pytest.mark.parametrize("kind", HOOKS)
def test_every_built_in_can_be_chosen_by_its_short_name(kind: Kind) -> None:
    for name in builtin_policies.names(kind):
        assert names(PolicySettings.model_validate({kind: name}))[kind] == [name]


def test_behind_a_policy_of_somebody_else_stands_the_default_built_in() -> None:
    assert names(PolicySettings(offload=("mine",)), ("mine", Stays()))["offload"] == ["mine", "latency"]


def test_another_built_in_can_be_named_behind_it() -> None:
    settings = PolicySettings(offload=("mine", "threshold"))
    assert names(settings, ("mine", Stays()))["offload"] == ["mine", "threshold"]


def test_a_module_of_the_users_own_is_asked_first_for_what_it_implements(module: Callable[[str, object], str]) -> None:
    settings = PolicySettings(offload=("threshold",), module=module("acme_policies", Stays().disagg_decide_offload))
    assert names(settings) == {
        "offload": ["acme_policies", "threshold"],
        "placement": ["score"],
        "codec": ["by_link"],
        "admission": ["projected"],
    }


def test_an_installed_package_is_imported_only_when_it_is_named(entry_point: Callable[[str, str], None]) -> None:
    entry_point("broken", "no.such.module")
    assert names(PolicySettings())["offload"] == ["latency"]
    with pytest.raises(ConfigError, match=r"policy broken: no\.such\.module cannot be imported: ModuleNotFoundError"):
        load_plugins(PolicySettings(offload=("broken",)))


def test_an_installed_package_is_chosen_by_the_name_of_its_entry_point(
    entry_point: Callable[[str, str], None], module: Callable[[str, object], str]
) -> None:
    entry_point("mine", module("acme_policies", Stays().disagg_decide_offload))
    assert names(PolicySettings(offload=("mine",)))["offload"] == ["mine", "latency"]


def test_a_broken_package_is_listed_with_its_problem_and_hides_no_other(
    entry_point: Callable[[str, str], None], module: Callable[[str, object], str]
) -> None:
    entry_point("broken", "no.such.module")
    entry_point("mine", module("acme_policies", Stays().disagg_decide_offload))
    found = {installed.name: installed for installed in installed_policies()}
    assert "cannot be imported" in found["broken"].problem
    assert found["mine"].kinds == ("offload",)
    assert found["score"].source == "built-in"


def test_a_name_that_a_built_in_has_as_well_means_the_built_in(entry_point: Callable[[str, str], None]) -> None:
    entry_point("latency", "no.such.module")
    assert names(PolicySettings())["offload"] == ["latency"]


def refused(plugin: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load_plugins(extra=[("mine", plugin)])
    assert "\n" not in str(caught.value)
    return str(caught.value)


class MisspeltHook:
    @hookimpl
    def disagg_decide_ofload(self, snapshot: Snapshot) -> None: ...


class UnmarkedHook:
    def disagg_decide_offload(self, snapshot: Snapshot) -> None: ...


class UnknownArgument:
    @hookimpl
    def disagg_decide_offload(self, snapshot: Snapshot, wokers: object) -> None: ...


class Coroutine:
    @hookimpl
    async def disagg_decide_offload(self, snapshot: Snapshot) -> None: ...


class Wrapper:
    @hookimpl(wrapper=True)
    def disagg_decide_offload(self, snapshot: Snapshot) -> object:
        return (yield)


@pytest.mark.parametrize(
    ("plugin", "says"),
    [
        pytest.param(
            MisspeltHook(), "no hook disagg_decide_ofload: there are disagg_decide_offload", id="misspelt hook"
        ),
        pytest.param(UnmarkedHook(), "disagg_decide_offload lacks the decorator", id="hook without its decorator"),
        pytest.param(UnknownArgument(), "{'wokers'} are declared in the hookimpl", id="argument that the hook lacks"),
        pytest.param(Coroutine(), "is a coroutine: must be a plain function", id="coroutine"),
        pytest.param(Wrapper(), "is a wrapper: return None", id="wrapper"),
        pytest.param(object(), "implements none of disagg_decide_offload", id="no hook at all"),
        pytest.param(Stays, "Stays is a class: name an instance", id="class instead of an object"),
    ],
)
def test_a_plugin_that_would_never_be_called_is_refused(plugin: object, says: str) -> None:
    assert says in refused(plugin)


def test_a_refused_plugin_leaves_nothing_behind() -> None:
    manager = load_plugins()
    from disagg_plugin.plugins import register

    with pytest.raises(ConfigError):
        register(manager, "first", MisspeltHook())
    register(manager, "first", Stays())
    assert manager.has_plugin("first")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        pytest.param({"offload": "latancy"}, "is not installed; there are latency, threshold", id="misspelt policy"),
        pytest.param({"placement": "latency"}, "there are score, least_loaded", id="policy of another kind"),
        pytest.param(
            {"codec": "mine"}, "does not implement disagg_choose_codec; there are by_link", id="lacks that hook"
        ),
        pytest.param({"offload": ["latency", "mine"]}, "latency always answers: mine is never asked", id="never asked"),
        pytest.param({"module": "no.such.module"}, "policy.module = 'no.such.module': cannot be", id="no such module"),
    ],
)
def test_a_choice_that_cannot_be_meant_is_one_line_with_what_there_is(values: dict[str, object], says: str) -> None:
    settings = PolicySettings.model_validate(values)
    with pytest.raises(ConfigError) as caught:
        choose(load_plugins(settings, extra=[("mine", Stays())]), settings)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_module_that_raises_while_it_is_imported_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "acme_broken.py").write_text("raise RuntimeError('two\\nlines')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="cannot be imported: RuntimeError: two lines"):
        load_plugins(PolicySettings(module="acme_broken"))
