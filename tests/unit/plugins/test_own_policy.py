"""A policy from a package of its own decides once it is installed and named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from own_policy import install_own_policy

ROOT = Path(__file__).parents[3]
DECIDES = """
import json
from dataclasses import replace
from disagg_plugin.plugins import PolicySettings, choose, load_plugins
from disagg_plugin.serving.decisions import Decider
from unit.plugins.situations import BUSY, PROMPT, WORKERS

settings = PolicySettings(offload=("when_busy",))
decider = Decider(choose(load_plugins(settings), settings), bound_s=5.0, clock=lambda: 0.5, log_interval_s=None)
idle = decider.decide(PROMPT, replace(BUSY, running_decodes=0), WORKERS)
busy = decider.decide(PROMPT, BUSY, WORKERS)
print(json.dumps([(record.decision.reason, record.decided_by) for record in (idle, busy)]))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_own_policy(tmp_path_factory.mktemp("own_policy"))


def python(installed: Path, *args: str) -> str:
    paths = [installed, ROOT, ROOT / "policies", ROOT / "connectors", ROOT / "tests"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, *args], env=environment, capture_output=True, text=True, check=True, timeout=60
    ).stdout


def test_it_decides_what_it_has_an_opinion_on_and_leaves_the_rest_to_the_built_in(installed: Path) -> None:
    assert json.loads(python(installed, "-c", DECIDES)) == [["decode_idle", "when_busy"], ["remote_faster", "latency"]]


def test_disagg_policies_lists_it_with_its_version(installed: Path) -> None:
    listed = python(installed, "-c", "from disagg_plugin.cli.policies import policies; policies(None)")
    row = next(line for line in listed.splitlines() if "when_busy" in line)
    assert "disagg_decide_offload" in row
    assert "disagg-own-policy 1.0.0" in row
