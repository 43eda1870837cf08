"""A pytest plugin: an engine test that fails is run once more in a fresh pair, and both outcomes are told.

Real engines on a shared machine fail now and then for no reason of ours. The second try must not hide that: the first
failure is kept with the engines' logs, a test that passes then is listed as FLAKY, and more than ``FLAKY_AT_MOST`` of
them fail the run. ``tools/flaky.py`` adds up the pytest sessions of a run.

Off in workers of pytest-xdist: they have no say in the summary and the exit status of the run.
"""

import json
import os
import re
import shutil
import time
import traceback
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple

import pytest
from _pytest.runner import runtestprotocol  # the three phases of a test; pytest has no public name for them

FLAKY_AT_MOST = 2
SECOND_TRIES_AT_MOST = 5  # a session: the run has failed then, and each of them costs the start of a fleet
FLAKY_LIST = "flaky.jsonl"
ENGINE_TESTS = ("tests/e2e", "tests/sglang_e2e", "tests/cross_engine", "tests/main_paths")

# outcomes of a report: neither passed nor failed nor skipped, so that nothing counts them
_FAILED_FIRST, _OF_A_FIRST_TRY = "failed first", "of a first try"


def flaky_dir(root: Path) -> Path:
    """Where first failures are kept; ``root`` is the repository."""
    return root / (os.environ.get("DISAGG_FLAKY_DIR") or ".flaky")


class FirstTry(NamedTuple):
    """A failure after which the test is run again."""

    test: str
    error: str  # one line
    seconds: float
    record: Path


class SecondTry:
    """The hooks of one session."""

    def __init__(self, config: pytest.Config, terminal: pytest.TerminalReporter) -> None:
        self._root = config.rootpath
        self._folder = flaky_dir(config.rootpath)
        self._basetemp: Path = config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]  # pytest's own
        self._terminal = terminal
        self._now: FirstTry | None = None  # set while a test is run again
        self._passed = False
        self._flaky: list[FirstTry] = []
        self._failed_twice: list[FirstTry] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        tries = len(self._flaky) + len(self._failed_twice)
        if (
            self._now
            or tries == SECOND_TRIES_AT_MOST
            or not any(item.path.is_relative_to(self._root / folder) for folder in ENGINE_TESTS)
        ):
            return None  # to pytest
        started = time.monotonic()
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        reports = runtestprotocol(item, log=False, nextitem=nextitem)  # logged below: it may end before it has failed
        failed = [report for report in reports if report.failed]
        for report in reports:
            if failed:
                report.outcome = _FAILED_FIRST if report is failed[0] else _OF_A_FIRST_TRY  # type: ignore[assignment]
                report.when = f"first {report.when}"  # type: ignore[assignment]  # keeps junitxml's case open
            item.ihook.pytest_runtest_logreport(report=report)
        if failed:
            self._run_again(item, nextitem, reports, started)
        else:
            item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def _run_again(
        self, item: pytest.Item, nextitem: pytest.Item | None, reports: Sequence[pytest.TestReport], started: float
    ) -> None:
        error = _one_line(next(report for report in reports if report.outcome == _FAILED_FIRST))
        self._terminal.write_line(f"FIRST TRY FAILED {item.nodeid}: {error}", yellow=True)
        # session-scoped fixtures too; what pytest has torn down it sets up anew
        taken_down = pytest.CallInfo.from_call(
            lambda: item.session._setupstate.teardown_exact(None),
            when="teardown",
            reraise=(pytest.exit.Exception, KeyboardInterrupt),
        )
        seconds = time.monotonic() - started
        record = self._keep(item.nodeid, _text(item.nodeid, reports, taken_down))
        self._now = first = FirstTry(item.nodeid, error, seconds, record)
        self._terminal.write_line(f"  kept in {record}; once more in a fresh pair", yellow=True)
        item._report_sections.clear()  # else the second report shows what the first try wrote
        failed_before = item.session.testsfailed
        self._passed = False
        started = time.monotonic()
        try:
            # all hooks again: pytest-timeout's clock has been stopped by the failure
            item.ihook.pytest_runtest_protocol(item=item, nextitem=nextitem)
        finally:
            self._now = None
        seconds = time.monotonic() - started
        if item.session.testsfailed > failed_before or not self._passed:  # one that is skipped has shown nothing
            self._failed_twice.append(first)
            self._terminal.write_line(f"SECOND TRY FAILED {item.nodeid}", red=True)
            return
        self._flaky.append(first)
        self._terminal.write_line(f"SECOND TRY PASSED {item.nodeid}", yellow=True)
        told = {"test": first.test, "record": str(first.record), "error": first.error}
        told_s = {"first_s": round(first.seconds, 1), "second_s": round(seconds, 1)}
        with (self._folder / FLAKY_LIST).open("a") as flaky:
            flaky.write(json.dumps(told | told_s) + "\n")

    def _keep(self, nodeid: str, text: str) -> Path:
        """A folder of its own for the text and for the logs of all engines so far."""
        name = re.sub(r"[^\w.-]+", "_", nodeid, flags=re.ASCII)[:200]
        numbered = (self._folder / (f"{name}-{n}" if n > 1 else name) for n in count(1))
        folder = next(folder for folder in numbered if not folder.exists())
        folder.mkdir(parents=True)
        (folder / "first.txt").write_text(text, errors="backslashreplace")
        for log in self._basetemp.rglob("*.log"):
            shutil.copyfile(log, folder / "__".join(log.relative_to(self._basetemp).parts))
        return folder / "first.txt"

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._passed |= report.when == "call" and report.passed
        if self._now and report.failed:
            report.sections.append(("First try", f"failed too: {self._now.error}\nkept in {self._now.record}"))

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        if report.outcome == _FAILED_FIRST:
            return "flaky first try", "R", "FIRST TRY FAILED"
        return ("", "", "") if report.outcome == _OF_A_FIRST_TRY else None

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if len(self._flaky) > FLAKY_AT_MOST and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self) -> None:
        if self._flaky or self._failed_twice:
            self._terminal.section("FLAKY")
        for word, tries in (("flaky", self._flaky), ("failed twice", self._failed_twice)):
            for first in tries:
                self._terminal.write_line(f"{word}: {first.test}: {first.error}\n  {first.record}")
        if len(self._flaky) > FLAKY_AT_MOST:
            self._terminal.write_line(too_many(len(self._flaky)), red=True)


def too_many(flaky: int) -> str:
    """Why the run fails."""
    return f"{flaky} flaky tests, at most {FLAKY_AT_MOST} are allowed: the run fails"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-second-try", action="store_true", help="an engine test that fails is not run once more")


@pytest.hookimpl(trylast=True)  # after the terminal's and tmp_path's
def pytest_configure(config: pytest.Config) -> None:
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal and not config.getoption("no_second_try") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(SecondTry(config, terminal), "disagg-second-try")


def _one_line(report: pytest.TestReport) -> str:
    """The error without its explanation, as in pytest's short summary."""
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = (crash.message if crash else report.longreprtext).strip().splitlines() or [""]
    return str(lines[0 if crash else -1])


def _text(nodeid: str, reports: Sequence[pytest.TestReport], taken_down: pytest.CallInfo[None]) -> str:
    """All that pytest knows of a first failure."""
    parts = [nodeid]
    parts += [f"--- {report.when}\n{report.longreprtext}" for report in reports if report.longrepr]
    if taken_down.excinfo:
        error = "".join(traceback.format_exception(taken_down.excinfo.value))
        parts.append(f"--- taking down what was left alive\n{error}")
    parts += [f"--- {name}\n{content}" for name, content in reports[-1].sections]
    return "\n\n".join(parts) + "\n"
