"""Write the tables of docs/edge-cases.md from tests/edge_cases.py.

python tools/edge_cases_table.py
"""

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from edge_cases import ENGINES, MOMENTS, REQUESTS, EdgeCase  # noqa: E402  found by the line before

TARGET = ROOT / "docs/edge-cases.md"
INTRODUCTION = """# Edge cases

What happens to requests, engines and moments that are not ordinary. Each row has a test, or is refused by name at
start. This page is made from [tests/edge_cases.py](../tests/edge_cases.py) by `python tools/edge_cases_table.py`.
"""


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for heading, cases in (("Requests", REQUESTS), ("Engines", ENGINES), ("Moments", MOMENTS)):
        parts.append(f"## {heading}\n\n{_table(cases)}\n")
    return "\n".join(parts)


def _table(cases: Sequence[EdgeCase]) -> str:
    rows = ["| case | what happens | how | shown by |", "|---|---|---|---|"]
    for case in cases:
        how = f"{case.how} Decision: `{case.reason}`." if case.reason else case.how
        tests = "<br>".join(f"`{test.removeprefix('tests/')}`" for test in case.tests)
        rows.append(f"| {case.name} | {case.outcome} | {how} | {tests} |")
    return "\n".join(rows)


if __name__ == "__main__":
    TARGET.write_text(page())
