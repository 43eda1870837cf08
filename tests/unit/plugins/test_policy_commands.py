"""``disagg policies``, ``disagg decisions`` and ``disagg replay-decision`` say what decides, and why."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner
from unit.plugins.situations import BUSY, PROMPT, WORKERS, decider

from disagg_plugin.cli import decisions, policies
from disagg_plugin.control import service
from disagg_plugin.errors import PeerLost
from disagg_plugin.serving.decision_record import to_json

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(policies.policies)
app.command()(decisions.decisions)
app.command()(decisions.replay_decision)


def disagg(*args: str | Path, text: str | None = None) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of one command."""
    result = CliRunner().invoke(app, [str(arg) for arg in args], input=text)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, object] | Exception], None]:
    """What the engine at the other end answers."""

    def answers(view: Mapping[str, object] | Exception) -> None:
        async def fetch(host: str, port: int, _keys: object, **_: object) -> Mapping[str, object]:
            assert (host, port) == ("127.0.0.1", 5600)
            if isinstance(view, Exception):
                raise view
            return view

        monkeypatch.setattr(service, "fetch_snapshot", fetch)

    return answers


def row_of(table: str, policy: str) -> list[str]:
    return next(line for line in table.splitlines() if f" {policy} " in line).replace("│", " ").split()


def test_policies_lists_the_built_ins_and_which_are_asked() -> None:
    code, out, err = disagg("policies")
    assert (code, err) == (0, "")
    assert row_of(out, "latency") == ["latency", "disagg_decide_offload", "built-in", "alone"]
    assert row_of(out, "threshold") == ["threshold", "disagg_decide_offload", "built-in"]


def test_policies_shows_the_order_that_a_settings_file_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "acme_listed.py").write_text(
        "from disagg_plugin.hookspecs import hookimpl\n\n\n@hookimpl\ndef disagg_decide_offload(snapshot): ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "disagg.yaml").write_text("policy: {offload: threshold, module: acme_listed}\nrole: decode\n")
    code, out, _ = disagg("policies", "--config", tmp_path / "disagg.yaml")
    assert code == 0
    assert row_of(out, "acme_listed")[-3:] == ["1", "of", "2"]
    assert row_of(out, "threshold")[-3:] == ["2", "of", "2"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        pytest.param(
            "policy: {offload: latancy}", "'latancy': is not installed; there are latency", id="unknown policy"
        ),
        pytest.param("policy: {ofload: latency}", "policy.ofload = 'latency'", id="unknown field"),
        pytest.param("policy: latency", "policy must hold fields and values", id="no section"),
    ],
)
def test_a_mistake_in_the_settings_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "disagg.yaml").write_text(text)
    code, out, err = disagg("policies", "--config", tmp_path / "disagg.yaml")
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.splitlines()) == 1


def test_decisions_prints_the_latest_ones_as_a_table(engine: Callable[[Mapping[str, object]], None]) -> None:
    deciding = decider()
    for number in range(5):
        deciding.decide(replace(PROMPT, request_id=f"cmpl-{number}"), BUSY, WORKERS)
    engine({"decode": {"decision_log": json.loads(json.dumps(deciding.rows()))}})
    code, out, err = disagg("decisions", "127.0.0.1:5600", "--last", "2")
    assert (code, err) == (0, "")
    assert "cmpl-2" not in out
    assert {"p-0", "remote_faster", "4000"} <= set(row_of(out, "cmpl-4"))


@pytest.mark.parametrize(
    ("view", "code", "says"),
    [
        pytest.param({"decode": {"decision_log": []}}, 0, "no decisions yet", id="before the first prompt"),
        pytest.param({"prefill": {}}, 1, "makes no decisions", id="a prefill engine"),
        pytest.param(TimeoutError(), 1, "no answer from 127.0.0.1:5600 within", id="nobody there"),
        pytest.param(PeerLost("keys differ"), 2, "disagg: keys differ", id="refused"),
    ],
)
def test_decisions_says_why_there_is_no_table(
    engine: Callable[[Mapping[str, object] | Exception], None],
    view: Mapping[str, object] | Exception,
    code: int,
    says: str,
) -> None:
    engine(view)
    got, out, err = disagg("decisions", "127.0.0.1:5600")
    assert got == code
    assert says in out + err


def test_an_address_without_a_port_is_a_mistake() -> None:
    assert disagg("decisions", "somewhere")[0] == 2


@pytest.mark.parametrize("source", ["file", "stdin", "dash"])
def test_replay_decision_says_that_a_logged_one_comes_out_the_same(tmp_path: Path, source: str) -> None:
    text = f"noise {{\nINFO disagg: decision {to_json(decider().decide(PROMPT, BUSY, WORKERS))}\n"
    (tmp_path / "log").write_text(text)
    match source:
        case "file":
            code, out, _ = disagg("replay-decision", tmp_path / "log")
        case "stdin":
            code, out, _ = disagg("replay-decision", text=text)
        case _:
            code, out, _ = disagg("replay-decision", "-", text=text)
    assert code == 0
    assert out.splitlines()[-1] == "equal"
    assert out.count("Offload(workers=('p-0', 'p-1'), reason='remote_faster'") == 2


def test_replay_decision_ends_with_1_when_it_comes_out_otherwise() -> None:
    line = to_json(decider().decide(PROMPT, BUSY, WORKERS)).replace('"remote_faster"', '"local_faster"')
    code, out, _ = disagg("replay-decision", text=line)
    assert (code, out.splitlines()[-1]) == (1, "not equal")


def test_a_file_without_a_decision_is_a_mistake_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("nothing\n")
    code, _, err = disagg("replay-decision", tmp_path / "log")
    assert code == 2
    assert "holds no logged decision" in err
