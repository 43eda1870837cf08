"""``disagg status``: what a person is shown, from a scrape of the real definitions."""

import io
import json
from typing import Any

import pytest
from rich.console import Console
from synthetic import SyntheticEngine
from typer.testing import CliRunner

from disagg_plugin.cli.main import app
from disagg_plugin.cli.status import render
from disagg_plugin.observability.status import Scrape, status_of, with_snapshot


@pytest.fixture(scope="module")
def engine() -> SyntheticEngine:
    engine = SyntheticEngine()
    engine.requests(6)
    engine.requests(3, path="offloaded", slo_class="high")
    engine.requests(1, path="fallback", slo_class="high", ttft_s=3.0)
    engine.frontend.refused("high", "ttft")
    engine.frontend._refresh_due_s = 0.0
    engine.frontend.refresh()
    return engine


def disagg(*args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["status", *args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def view_of(engine: SyntheticEngine) -> dict[str, Any]:
    with engine.serving() as url:
        code, out, err = disagg(url, "--json")
    assert code == 0, err
    view: dict[str, Any] = json.loads(out)
    return view


def shown(view: dict[str, Any], before: dict[str, Any] | None = None) -> str:
    paper = io.StringIO()
    Console(width=250, file=paper).print(render(view, before))
    return paper.getvalue()


def test_json_holds_every_part(engine: SyntheticEngine):
    view = view_of(engine)
    assert view["active"] is True
    assert view["decisions"] == {"short_prompt": 6, "over_threshold": 4}
    assert view["fallbacks"] == {"peer_lost": 1}
    assert view["peers"] == [{"peer": "p:1", "up": True, "queued": 2}]
    assert view["peer_states"] == {"decode": {"healthy": 1}, "prefill": {"healthy": 1}}
    assert view["transfers"]["events"] == {"decode offered": 4, "decode landed": 3}
    assert view["transfers"]["compression"] == {"received": 2.0}
    assert view["transfers"]["troubles"]["side-channel rejects"] == 1
    assert view["cache_hits"] == {"own prefix cache": 1.0}
    assert view["prefix_tokens"] == {"lmcache": 64}
    assert view["queues"] == {"running": 0, "waiting": 0, "kv_cache_usage": 0.25}
    assert {"slo_class": "high", "outcome": "refused", "reason": "ttft", "requests": 1} in view["admission"]


def test_classes_show_attainment_with_and_without_the_refused(engine: SyntheticEngine):
    high = view_of(engine)["classes"]["high"]
    assert high["attainment"]["5m"] == 0.75
    assert high["attainment_with_refused"]["5m"] == 0.6
    assert high["burn_rate"]["5m"] == pytest.approx(8.0)
    assert high["outcomes"] == {"met": 3, "missed": 1, "refused": 1}
    assert high["targets_s"] == {"ttft": 0.5, "tpot": 0.05}
    assert high["quantiles_s"]["fallback"]["ttft"]["0.5"] == pytest.approx(3.0)


def test_once_prints_tables_for_people(engine: SyntheticEngine):
    with engine.serving() as url:
        code, out, _ = disagg(url, "--once")
    assert code == 0
    assert "active" in out
    assert "short_prompt" in out
    assert "prefix tokens lmcache 64" in " ".join(out.split())


def test_live_shows_what_moved_since_the_last_look(engine: SyntheticEngine):
    before = view_of(engine)
    after = json.loads(json.dumps(before))
    after["decisions"]["short_prompt"] += 7
    assert "13 +7" in shown(after, before)
    assert "+" not in shown(before, before)


def test_names_are_shown_as_they_are_not_as_markup(engine: SyntheticEngine):
    view = view_of(engine)
    view["decisions"]["[red]odd[/red]"] = 1
    assert "[red]odd[/red]" in shown(view)


def test_an_inactive_plugin_says_why_first():
    engine = SyntheticEngine()
    engine.view["inactive_reason"] = "attention is limited to a window of 512 tokens"
    engine.step()
    assert shown(view_of(engine)).startswith("NOT ACTIVE: attention is limited to a window of 512 tokens")


def test_an_engine_that_takes_no_more_prompts_for_others_says_so_first():
    engine = SyntheticEngine()
    engine.view["draining"] = True
    engine.requests(1)
    view = view_of(engine)
    assert view["draining"] is True
    assert shown(view).startswith("draining: takes no more prompts for others")


def test_before_the_first_step_there_are_no_figures_rather_than_zeros():
    view = view_of(SyntheticEngine())
    assert view["active"] is None
    assert "no figures yet" in shown(view)


def test_the_side_channel_adds_why_a_peer_is_not_healthy(engine: SyntheticEngine):
    workers = {
        "p:1": {"healthy": False, "problem": "authentication_failed", "url": "http://p"},
        "p:2": {"healthy": False, "problem": "unreachable", "url": "http://q", "queued_requests": 0},
    }
    view = with_snapshot(view_of(engine), {"role": "decode", "prefill_workers": {"workers": workers}})
    assert [(peer["peer"], peer["problem"]) for peer in view["peers"]] == [
        ("p:1", "authentication_failed"),
        ("p:2", "unreachable"),
    ]
    assert "authentication_failed" in shown(view)


def test_engines_of_one_server_are_added_up():
    text = "\n".join(f'disagg_decisions_total{{engine="{i}",model_name="m",reason="short_prompt"}} 2' for i in (0, 1))
    view = status_of(Scrape("# TYPE disagg_decisions_total counter\n" + text + "\n"), now_s=0.0)
    assert view["decisions"] == {"short_prompt": 4}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(["127.0.0.1:8000"], "is no HTTP address", id="no scheme"),
        pytest.param(["http://127.0.0.1:1"], "http://127.0.0.1:1/metrics: ", id="nobody there"),
        pytest.param(["http://127.0.0.1:1", "--side-channel", "x"], "'x' is not host:port", id="side channel"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], said: str):
    code, _, err = disagg(*arguments, "--once")
    assert code == 2
    assert said in err
    assert len(err.splitlines()) == 1


def test_an_engine_without_the_plugin_is_named():
    engine = SyntheticEngine()
    for collector in list(engine.registry._collector_to_names):
        if not next(iter(engine.registry._collector_to_names[collector])).startswith("vllm"):
            engine.registry.unregister(collector)
    with engine.serving() as url:
        code, _, err = disagg(url, "--json")
    assert code == 2
    assert "has no disagg_ metrics: does this engine run with the plugin?" in err
