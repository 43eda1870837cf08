"""docs/edge-cases.md is the table of tests/edge_cases.py, and every row is shown by tests that exist."""

import runpy
from pathlib import Path

import pytest
from edge_cases import EDGE_CASES, REQUESTS, EdgeCase, Outcome

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_table_makes() -> None:
    page = runpy.run_path(str(ROOT / "tools/edge_cases_table.py"))["page"]
    assert (ROOT / "docs/edge-cases.md").read_text() == page(), "run python tools/edge_cases_table.py"


@pytest.mark.parametrize("case", EDGE_CASES, ids=lambda c: c.name)
def test_every_case_has_tests_that_exist(case: EdgeCase) -> None:
    assert case.tests
    for test in case.tests:
        path, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / path).read_text(), test


def test_no_case_stands_there_twice() -> None:
    names = [case.name for case in EDGE_CASES]
    assert len(set(names)) == len(names)


def test_requests_that_stay_say_why() -> None:
    assert all(case.reason for case in REQUESTS if case.fields and case.outcome is Outcome.LOCAL)
