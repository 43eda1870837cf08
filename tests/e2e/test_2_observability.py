"""What a real pair puts on /metrics is what happened, and a real Prometheus understands all of it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from e2e.client import Engine
from e2e.conftest import Fleet
from e2e.offloads import prompt_of
from prometheus_server import Prometheus, dashboard_queries, prometheus
from typer.testing import CliRunner

from disagg_plugin.cli.main import app
from disagg_plugin.observability.status import Scrape

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples/observability"
ALERTS = EXAMPLES / "alerts.yml"
# panels about what does not happen to a healthy pair without admission
QUIET = (
    *("Why not", "Admission", "Degraded responses", "Degradation level", "Policy errors", "Fallbacks by cause"),
    *("Fallback share", "Offload calls that failed", "Bad chunks", "Side channel rejects", "Notifications rejected"),
    *("Links to peers", "Errors", "Waits for slots, buffers, blocks"),
    "Measured over predicted TTFT",  # the fleet's policy is `threshold`, which predicts nothing
    *("Prompt tokens not computed, by tier", "LMCache"),  # the fleet has none; test_6_lmcache.py asks for their series
)


def scrape(engine: Engine) -> Scrape:
    return Scrape(httpx.get(f"{engine.url}/metrics", timeout=30).text)


def serve_some(pair: Fleet, salt: str) -> None:
    """Three offloaded requests and two short ones."""
    for i in range(3):
        pair.decode.complete(prompt_of(700, seed=100 + i), cache_salt=salt)
    for i in range(2):
        pair.decode.complete(prompt_of(12, seed=200 + i), cache_salt=salt)


def test_metrics_count_what_the_engine_counted(pair: Fleet) -> None:
    before = scrape(pair.decode)
    serve_some(pair, "metrics")
    after, view = scrape(pair.decode), pair.decode.snapshot()
    assert after.total("disagg_active") == 1
    decode = view["decode"]
    assert after.by("disagg_decisions_total", "reason") == decode["decisions"]
    assert after.total("disagg_transfers_total", role="decode", event="landed") == decode["totals"]["landed"]
    assert after.total("disagg_open_transfers", role="decode") == 0
    (rank,) = decode["ranks"].values()
    for direction, raw, wire in (("received", "raw_bytes_received", "wire_bytes_received"),):
        assert after.total("disagg_transfer_logical_bytes_total", direction=direction) == rank[raw]
        assert after.total("disagg_transfer_wire_bytes_total", direction=direction) == rank[wire]
    assert after.by("disagg_peers", "state", role="prefill")["healthy"] == 1
    chunks = after.total("disagg_chunk_seconds_count", stage="scatter")
    assert chunks == rank["chunks_received"]
    landed = after.total("disagg_transfer_seconds_count", phase="total")
    assert landed - before.total("disagg_transfer_seconds_count", phase="total") == 3
    sent = scrape(pair.prefill)
    assert sent.total("disagg_chunk_seconds_count", stage="write") > 0
    assert sent.total("disagg_transfers_total", role="prefill", event="sent") >= 3


def test_every_request_counts_once_under_the_path_it_took(pair: Fleet) -> None:
    before = scrape(pair.decode)
    serve_some(pair, "paths")
    pair.decode.choices(prompt_of(700, seed=300), n=2, temperature=0.5, cache_salt="paths")
    after = scrape(pair.decode)

    def served(path: str) -> float:
        name = "disagg_slo_requests_total"
        return after.total(name, path=path, outcome="met") - before.total(name, path=path, outcome="met")

    # of two completions of one prompt the second finds the first one's KV: offloaded or not, as it happens
    assert served("offloaded") >= 4
    assert served("offloaded") + served("local") == 7
    assert served("local") >= 2
    assert after.total("disagg_ttft_seconds_count") == after.total("disagg_e2e_seconds_count")
    assert 0 < after.total("disagg_ttft_seconds_sum") < after.total("disagg_e2e_seconds_sum")


def test_a_prefill_for_another_engine_is_not_among_the_prefill_engines_own_requests(pair: Fleet) -> None:
    before = scrape(pair.prefill)
    serve_some(pair, "for-decode")
    after = scrape(pair.prefill)
    assert after.total("disagg_slo_requests_total") == before.total("disagg_slo_requests_total")
    assert after.total("disagg_transfers_total", role="prefill", event="offered") > 0


def test_status_shows_the_running_pair(pair: Fleet) -> None:
    channel = f"127.0.0.1:{pair.decode.side_port}"
    done = CliRunner().invoke(app, ["status", pair.decode.url, "--json", "--side-channel", channel])
    assert done.exit_code == 0, done.output
    view: dict[str, Any] = json.loads(done.stdout)
    assert view["active"] is True
    assert view["role"] == "decode"
    assert view["transfers"]["events"]["decode landed"] >= 1
    assert [peer["up"] for peer in view["peers"]].count(True) == 1
    assert view["queues"].keys() == {"running", "waiting", "kv_cache_usage"}
    assert "own prefix cache" in view["cache_hits"]
    shown = CliRunner().invoke(app, ["status", pair.decode.url, "--once"])
    assert shown.exit_code == 0
    assert "active" in shown.stdout


@pytest.fixture(scope="module")
def watching(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus with the example's rules over both engines, after some requests."""
    folder = tmp_path_factory.mktemp("prometheus")
    serve_some(fleet, "watched first")
    with prometheus(folder, [fleet.decode.url, fleet.prefill.url], rules=[ALERTS]) as server:
        server.when(lambda: server.scraped(2))
        serve_some(fleet, "watched")
        scrapes = max(int(series["value"][1]) for series in server.query("count_over_time(up[1h])"))
        server.when(lambda: server.scraped(scrapes + 3))
        yield server


def test_every_panel_works_on_a_real_engine(watching: Prometheus) -> None:
    empty = [
        panel
        for panel, expression in dashboard_queries(EXAMPLES / "grafana-dashboard.json").items()
        if not watching.query(expression) and not panel.startswith(QUIET)
    ]
    assert not empty


def test_every_rule_works_on_a_real_engine_and_none_fires_on_a_healthy_pair(watching: Prometheus) -> None:
    rules = [rule for group in watching.get("rules")["groups"] for rule in group["rules"]]
    assert len(rules) == sum(len(group["rules"]) for group in yaml.safe_load(ALERTS.read_text())["groups"])
    assert {rule["health"] for rule in rules} == {"ok"}
    # the fleet's second worker is not running yet, which PeerGone says after five minutes
    firing = {rule["name"] for rule in rules if rule.get("state") in ("firing", "pending")} - {"DisaggPeerGone"}
    assert not firing
