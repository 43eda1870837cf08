"""docs/metrics.md and docs/profiling.md say what the code says."""

import re
import sys
from pathlib import Path

from disagg_plugin.observability import collect, spans

ROOT = Path(__file__).resolve().parents[3]
PROFILING = (ROOT / "docs/profiling.md").read_text()


def test_the_metrics_page_is_the_one_that_its_tool_writes():
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        from metrics_table import tables
    finally:
        sys.path.pop(0)
    assert tables() in (ROOT / "docs/metrics.md").read_text(), "run python tools/metrics_table.py"


def test_the_profiling_page_names_every_range_and_span():
    sources = [path.read_text() for folder in ("control", "kv") for path in (ROOT / "disagg_plugin" / folder).glob("*")]
    ranges = {name for source in sources for name in re.findall(r'profile_range\("([^"]+)"\)', source)}
    assert ranges == set(re.findall(r"^\| `(disagg [a-z]+)` \|", PROFILING, re.M))
    names = {name for children in spans._CHILDREN.values() for name, _, _ in children} | {*spans._PARENT.values()}
    assert names <= set(re.findall(r"`(disagg\.[a-z_]+)`", PROFILING))


def test_every_phase_of_a_transfer_is_measured_between_fields_that_exist():
    fields = {field for phases in collect.PHASES.values() for _, *ends in phases for field in ends}
    fields |= {field for children in spans._CHILDREN.values() for _, *ends in children for field in ends}
    rows = "".join(
        (ROOT / f"disagg_plugin/control/{name}.py").read_text() for name in ("decode_transfer", "prefill_ticket")
    )
    assert all(f'"{field}"' in rows or f"{field}: float" in rows for field in fields)
