"""A failed engine test gets one more try in a fresh pair; the first failure stays on record, and counts."""

import json
import os
import runpy
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

import pytest
from second_try import FLAKY_AT_MOST, SECOND_TRIES_AT_MOST

TESTS = Path(__file__).parents[1]
FLAKY = TESTS.parent / "tools/flaky.py"
INI = f"""
[pytest]
addopts = --import-mode=importlib --strict-markers -ra
filterwarnings = error
pythonpath = {TESTS}
"""

# the engines are numbered in the order of their starts; a test names those with which it fails
CONFTEST = """
import pytest

pytest_plugins = ["second_try"]
STARTS = []

@pytest.fixture(scope="session")
def engine(tmp_path_factory):
    STARTS.append(1)
    number = len(STARTS)
    log = tmp_path_factory.mktemp("fleet") / "prefill.log"
    log.write_text(f"engine {number} starts\\n")
    yield number
    log.write_text(log.read_text() + "and ends\\n")
    if number == 1:
        raise RuntimeError("engine 1 would not end")
"""


class Run(NamedTuple):
    """One pytest session over generated tests."""

    returncode: int
    output: str
    folder: Path

    @property
    def flaky(self) -> list[dict[str, str | float]]:
        file = self.folder / "flaky.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def section(self) -> str:
        """What stands under FLAKY."""
        return self.output.partition("= FLAKY =")[2]


def run(root: Path, *options: str, **files: str) -> Run:
    """Run pytest on tests whose path is their keyword: ``e2e__test_a`` is ``tests/e2e/test_a.py``."""
    (root / "tests").mkdir()
    (root / "pytest.ini").write_text(INI)
    (root / "tests/conftest.py").write_text(CONFTEST)
    for name, text in files.items():
        file = root / "tests" / f"{name.replace('__', '/')}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    argv = [sys.executable, "-m", "pytest", f"--basetemp={root / 'temp'}", "-p", "pytest_timeout", *options]
    env = {**os.environ, "DISAGG_FLAKY_DIR": str(root / "kept"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(argv, cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return Run(done.returncode, done.stdout, root / "kept")


TWO_FLAKY = """
import signal
import pytest

@pytest.fixture
def nothing_leaks(engine):
    yield
    assert engine != 2, "a block has leaked"

def test_before(engine):
    assert engine == 1

@pytest.mark.timeout(600)
@pytest.mark.parametrize("word", ["a b/c"])
def test_flaky(engine, word):
    print(f"said by the test to engine {engine}")
    assert engine != 1, "the engine was slow"
    assert signal.getitimer(signal.ITIMER_REAL)[0] > 0, "no time-out for the second try"

def test_next(engine):
    assert engine == 2

def test_leaks(nothing_leaks):
    pass

def test_last(engine):
    assert engine == 3
"""


@pytest.fixture(scope="module")
def two_flaky(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("two_flaky")
    return run(root, "--durations=0", "-vv", f"--junitxml={root / 'junit.xml'}", e2e__test_two=TWO_FLAKY)


def test_a_test_that_passes_then_is_flaky_and_the_run_is_green(two_flaky: Run) -> None:
    """And the tests after it use the fresh engine: they assert its number."""
    assert two_flaky.returncode == 0, two_flaky.output
    assert "5 passed, 2 flaky first try in" in two_flaky.output
    test, leaks = "tests/e2e/test_two.py::test_flaky[a b/c]", "tests/e2e/test_two.py::test_leaks"
    told = [line for line in two_flaky.output.splitlines() if line.startswith(("FIRST TRY", "SECOND TRY", "  kept in"))]
    record = two_flaky.folder / "tests_e2e_test_two.py_test_flaky_a_b_c_/first.txt"
    assert told[:3] == [
        f"FIRST TRY FAILED {test}: AssertionError: the engine was slow",
        f"  kept in {record}; once more in a fresh pair",
        f"SECOND TRY PASSED {test}",
    ]
    assert told[3::2] == [f"FIRST TRY FAILED {leaks}: AssertionError: a block has leaked", f"SECOND TRY PASSED {leaks}"]
    assert f"flaky: {test}: AssertionError: the engine was slow\n  {record}\n" in two_flaky.section
    assert f"flaky: {leaks}" in two_flaky.section


def test_the_first_failure_is_kept_with_the_logs_of_the_engines(two_flaky: Run) -> None:
    """Also what went wrong when the engine was ended, which belongs to no test any more."""
    flaky, leaks = (Path(str(test["record"])) for test in two_flaky.flaky)
    text = flaky.read_text()
    assert "said by the test to engine 1" in text
    assert "AssertionError: the engine was slow" in text
    assert "RuntimeError: engine 1 would not end" in text
    assert {log.name: log.read_text() for log in flaky.parent.glob("*.log")} == {
        "fleet0__prefill.log": "engine 1 starts\nand ends\n"
    }
    assert "a block has leaked" in leaks.read_text()
    assert "engine 2 starts" in (leaks.parent / "fleet1__prefill.log").read_text()


def test_a_flaky_test_is_listed_with_its_error_and_the_seconds_of_both_tries(two_flaky: Run) -> None:
    flaky, leaks = two_flaky.flaky
    assert flaky["test"] == "tests/e2e/test_two.py::test_flaky[a b/c]"
    assert (flaky["error"], leaks["error"]) == (
        "AssertionError: the engine was slow",
        "AssertionError: a block has leaked",
    )
    assert all(isinstance(test[key], float) for test in (flaky, leaks) for key in ("first_s", "second_s"))


def test_junitxml_has_the_second_outcome_and_durations_has_both(two_flaky: Run) -> None:
    suite = ET.parse(two_flaky.folder.with_name("junit.xml")).getroot()[0]
    assert [suite.get(key) for key in ("tests", "failures", "errors")] == ["5", "0", "0"]
    assert len(suite.findall("testcase")) == 5
    assert not list(suite.iter("failure")) + list(suite.iter("error"))
    for when in ("first call", "call    "):
        assert f"s {when} tests/e2e/test_two.py::test_flaky" in two_flaky.output


FAILING = """
import pytest

@pytest.fixture
def peer(engine):
    raise ConnectionError(f"no peer for engine {engine}")

def test_always(engine):
    print(f"said to engine {engine}")
    assert not engine, "wrong token"

def test_never_starts(peer):
    pass

def test_with_three(engine):
    assert engine == 3
"""


def test_what_fails_twice_is_a_failure_and_a_test_without_engines_has_one_try(tmp_path: Path) -> None:
    unit = "def test_unit():\n    raise KeyError('of the unit')\n"
    done = run(tmp_path, e2e__test_failing=FAILING, unit__test_unit=unit, lmcache_child__test_child=unit)
    assert done.returncode == 1
    assert "3 failed, 1 passed, 1 error, 2 flaky first try in" in done.output
    assert "SECOND TRY PASSED" not in done.output
    for test, error in (
        ("test_always", "AssertionError: wrong token"),
        ("test_never_starts", "ConnectionError: no peer for engine 2"),
    ):
        record = done.folder / f"tests_e2e_test_failing.py_{test}/first.txt"
        assert error in record.read_text()
        nodeid = f"tests/e2e/test_failing.py::{test}"
        assert f"FIRST TRY FAILED {nodeid}: {error}" in done.output
        assert f"SECOND TRY FAILED {nodeid}" in done.output
        assert f" First try -\nfailed too: {error}\nkept in {record}\n" in done.output.replace("-" * 2, "")
        assert f"failed twice: {nodeid}: {error}\n  {record}" in done.section
    assert done.output.count("FIRST TRY FAILED") == 2
    assert "said to engine 2" in done.output
    assert "said to engine 1" not in done.output  # it is in the record
    assert not done.flaky


def test_more_flaky_tests_than_allowed_fail_the_run(tmp_path: Path) -> None:
    flaky = "".join(f"def test_{n}(engine):\n    assert engine != {n}\n" for n in range(1, FLAKY_AT_MOST + 2))
    done = run(tmp_path, cross_engine__test_crossed=flaky)
    assert len(done.flaky) == FLAKY_AT_MOST + 1
    assert f"{FLAKY_AT_MOST + 1} flaky tests, at most {FLAKY_AT_MOST} are allowed: the run fails" in done.output
    assert done.returncode == 1


def test_the_second_try_can_be_switched_off(tmp_path: Path) -> None:
    done = run(tmp_path, "--no-second-try", sglang_e2e__test_a="def test_a(engine):\n    assert engine != 1\n")
    assert done.returncode == 1
    assert "FIRST TRY" not in done.output
    assert not done.folder.exists()


@pytest.mark.parametrize(
    ("flaky", "status", "said"),
    [
        pytest.param(0, 0, "no flaky tests\n", id="none is good"),
        pytest.param(FLAKY_AT_MOST, 0, "", id="as many as allowed are told"),
        pytest.param(FLAKY_AT_MOST + 1, 1, "the run fails\n", id="more fail the run"),
    ],
)
def test_the_tool_adds_up_a_run(
    flaky: int,
    status: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def tool(*options: str) -> int:
        monkeypatch.setattr(sys, "argv", ["flaky.py", *options])
        return int(runpy.run_path(str(FLAKY))["main"]())

    monkeypatch.setenv("DISAGG_FLAKY_DIR", str(tmp_path))
    others = tmp_path / "other.txt"
    others.touch()
    for n in range(flaky):
        record = tmp_path / str(n) / "first.txt"
        record.parent.mkdir()
        record.touch()
        with (tmp_path / "flaky.jsonl").open("a") as file:
            print(json.dumps({"test": f"test_{n}", "record": str(record), "error": "slow"}), file=file)
    assert tool() == status
    output = capsys.readouterr().out
    assert output.endswith(said)
    assert output.startswith("FLAKY\n") == bool(flaky)
    for n in range(flaky):
        assert f"  test_{n}: slow\n    {tmp_path}/{n}/first.txt\n" in output
    assert tool("--clear") == 0
    assert list(tmp_path.iterdir()) == [others]
    assert tool() == 0
    assert capsys.readouterr().out == "no flaky tests\n"


def test_where_everything_fails_not_everything_is_tried_again(tmp_path: Path) -> None:
    tests = "".join(f"def test_{number}(engine):\n    assert not engine\n" for number in range(8))
    done = run(tmp_path, e2e__test_a=tests)
    assert done.returncode == 1
    assert done.output.count("SECOND TRY FAILED") == SECOND_TRIES_AT_MOST
    assert "8 failed" in done.output
