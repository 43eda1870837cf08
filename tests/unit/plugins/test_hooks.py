"""Every hook has a contract, stands in docs/hooks.md, and is tested; what the document shows works."""

import re
import sys
import types
from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml
from unit.plugins.situations import BUSY, PROMPT, WORKERS

from disagg_plugin import builtin_policies, hookspecs
from disagg_plugin.plugins import HOOKS, PREFIX, PolicySettings, choose, load_plugins
from disagg_plugin.serving.decisions import Decider

DOCS = (Path(__file__).parents[3] / "docs" / "hooks.md").read_text()
TESTS = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
SPECS = [name for name in vars(hookspecs) if hasattr(getattr(hookspecs, name), "disagg_spec")]


def test_every_hook_has_our_prefix_and_a_setting_that_chooses_its_policy() -> None:
    assert all(name.startswith(PREFIX) for name in SPECS)
    assert sorted(SPECS) == sorted(HOOKS.values())
    assert HOOKS.keys() <= PolicySettings.model_fields.keys()


@pytest.mark.parametrize("hook", SPECS)
def test_every_hook_is_documented_with_its_arguments(hook: str) -> None:
    spec = getattr(hookspecs, hook)
    arguments = spec.__code__.co_varnames[: spec.__code__.co_argcount]
    assert f"`{hook}({', '.join(arguments)})`" in DOCS
    assert spec.__doc__


@pytest.mark.parametrize("hook", SPECS)
def test_every_hook_is_implemented_by_a_test(hook: str) -> None:
    assert re.search(rf"@hookimpl\n +def {hook}\(", TESTS)


@pytest.mark.parametrize("kind", HOOKS)
def test_the_document_names_the_built_ins_the_default_first(kind: str) -> None:
    row = next(line for line in DOCS.splitlines() if line.startswith("|") and HOOKS[kind] in line)  # type: ignore[index]
    assert ", ".join(f"`{name}`" for name in builtin_policies.names(kind)) in row
    assert PolicySettings.model_fields[kind].default == builtin_policies.names(kind)[:1]


def test_the_settings_in_the_document_are_the_defaults_with_comments() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", DOCS, re.S)
    values = yaml.safe_load(block)["policy"]
    assert PolicySettings.model_validate(values) == PolicySettings()
    assert values.keys() == PolicySettings.model_fields.keys()


def test_the_module_in_the_document_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", DOCS, re.S)
    module = types.ModuleType("acme_documented")
    exec(compile(block, "docs/hooks.md", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, "acme_documented", module)
    settings = PolicySettings(module="acme_documented")
    deciding = Decider(choose(load_plugins(settings), settings), bound_s=5.0, clock=lambda: 0.5, log_interval_s=None)
    urgent = deciding.decide(replace(PROMPT, priority=-1), BUSY, WORKERS)
    assert urgent.decision.reason == "urgent"
    near = (replace(WORKERS[1], worker="10.0.7.3:5600"), *WORKERS)
    record = deciding.decide(PROMPT, BUSY, near)
    assert record.snapshot.placement is not None
    assert (record.snapshot.placement.workers, record.placed_by) == (("10.0.7.3:5600",), "acme_documented")


def test_every_parameter_is_described() -> None:
    described = hookspecs.PolicyParameters.__doc__ or ""
    for parameter in fields(hookspecs.PolicyParameters):
        assert re.search(rf"\b{parameter.name}\b", described), parameter.name
