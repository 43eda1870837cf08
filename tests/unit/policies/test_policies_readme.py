"""The README of the policies: its examples run, and it has a section for each policy."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[3] / "policies/disagg_policies/README.md").read_text()
POLICIES = [
    "offload.latency",
    "offload.threshold",
    "placement.score",
    "placement.least_loaded",
    "placement.round_robin",
    "placement.power_of_two",
    "codec.by_link",
    "admission.projected",
    "admission.current_queue",
]


def test_the_examples_run() -> None:
    exec(compile("\n".join(re.findall(r"```python\n(.*?)```", README, re.S)), "README.md", "exec"), {})


@pytest.mark.parametrize("policy", POLICIES)
def test_each_policy_says_inputs_parameters_and_example(policy: str) -> None:
    section = re.search(rf"^## {re.escape(policy)}\n(.*?)(?=^## |\Z)", README, re.S | re.M)
    assert section
    for part in ("**Inputs**", "**Parameters**", "# Example"):
        assert part in section[1]
