"""What the documentation shows is true: every settings file loads, every command and module it names exists."""

import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from disagg_plugin.cli.main import app
from disagg_plugin.config import load_settings

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted([*ROOT.glob("examples/*.yaml"), *ROOT.glob("examples/*/*.yaml")])
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()


@pytest.mark.parametrize("path", EXAMPLES, ids=[str(p.relative_to(ROOT)) for p in EXAMPLES])
def test_every_example_settings_file_loads(path: Path) -> None:
    settings = load_settings(path)
    assert settings.role == path.stem.split(".")[0] or path.stem.startswith("disagg")


def test_the_settings_in_the_readme_load() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", README, re.S)
    assert blocks
    for block in blocks:
        load_settings(yaml.safe_load(block))


@pytest.mark.parametrize("words", sorted(set(re.findall(r"`disagg ([a-z-]+(?: [a-z]+)?)", README))))
def test_every_command_in_the_readme_exists(words: str) -> None:
    done = CliRunner().invoke(app, [*words.split(), "--help"])
    assert done.exit_code == 0, done.output


def test_the_architecture_names_every_module_and_no_other() -> None:
    named = set(re.findall(r"^\| `([a-z0-9_/]+\.py)` \|", ARCHITECTURE, re.M))
    connectors = ("connectors/disagg_lmcache", "connectors/disagg_sglang", "connectors/disagg_vllm")
    roots = ("disagg_plugin", *connectors, "policies/disagg_policies")
    existing = {
        str(path.relative_to(ROOT)).removeprefix("connectors/").removeprefix("policies/")
        for root in roots
        for path in (ROOT / root).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert named == existing
