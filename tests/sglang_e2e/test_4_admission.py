"""Early rejection in front of a real SGLang, figures on SGLang's /metrics, and what ``disagg status`` makes of them.

Whoever refuses only predicts: with the scheduler stopped nothing is served meanwhile, however fast the machine is.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import psutil
import pytest
from sglang_e2e.client import Engine, prompt_of
from sglang_e2e.conftest import Fleet, connected, is_quiet, offload
from sglang_e2e.test_2_faults import stopped

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

WAITING = 12
LONG = 3_900  # tokens of each: together more than any CPU prefills within the strict class's SLO


@contextmanager
def busy_for_ever(engine: Engine) -> Iterator[None]:
    """Its scheduler process stands still for the body; its API process does not know."""
    children = psutil.Process(engine.pid).children(recursive=True)
    (scheduler,) = [child for child in children if "sglang::scheduler" in " ".join(child.cmdline())]
    os.kill(scheduler.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(scheduler.pid, signal.SIGCONT)


@pytest.fixture(scope="module")
def engine(fleet: Fleet, second_decode: Engine) -> Iterator[Engine]:
    """Its prefill server hangs: what it predicts is about itself."""
    offload(second_decode, prompt_of(300, seed=59))  # with its warm-up the second, whichever tests ran before
    with stopped(fleet.prefill):
        second_decode.when(lambda view: not connected(view))
        for number, tokens in enumerate((500, 1_000, 2_000, 500, 1_000, 2_000)):  # what the model learns its speed from
            assert ask(second_decode, prompt_of(tokens, seed=60 + number)).status_code == 200
        yield second_decode
    second_decode.when(connected)


def ask(engine: Engine, prompt: list[int], path: str = "/v1/completions", **more: Any) -> httpx.Response:
    """One request, of a client of its own."""
    body: dict[str, Any] = {"model": engine.model, "prompt": prompt, "max_tokens": 8, "temperature": 0}
    if path == "/generate":
        body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 8, "temperature": 0}}
    return httpx.post(f"{engine.url}{path}", json={**body, **more}, timeout=240)


class Going:
    """A long request whose client goes away."""

    def __init__(self, engine: Engine, seed: int) -> None:
        url = httpx.URL(engine.url)
        self._connection = HTTPConnection(url.host, url.port, timeout=240)
        body = {"model": engine.model, "prompt": prompt_of(LONG, seed=seed), "max_tokens": 8, "priority": "normal"}
        self._connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})

    def goes_away(self) -> None:
        """Nobody has read the answer; the server sees the connection end."""
        self._connection.close()


def reserved(engine: Engine) -> int:
    """Requests that were let in and are in no report of the scheduler yet."""
    status = engine.http.get(f"{engine.url}/disagg/status").json()
    return sum(one["requests"] for one in status["gate"]["reserved"])


def wait_until_reserved(engine: Engine, requests: int) -> None:
    for _ in range(1_200):
        if reserved(engine) == requests:
            return
        Event().wait(0.05)
    raise AssertionError(f"{reserved(engine)} requests are under way, not {requests}")


def test_what_cannot_be_served_in_time_is_refused_before_it_is_queued(engine: Engine) -> None:
    """Those in front of it are not served either, but one: their clients go away, and what was reserved is free."""
    with ThreadPoolExecutor(2) as pool:
        with busy_for_ever(engine):
            first = pool.submit(ask, engine, prompt_of(LONG, seed=100), priority="normal")
            going = [Going(engine, seed=100 + number) for number in range(1, WAITING)]
            wait_until_reserved(engine, WAITING)
            refused = ask(engine, prompt_of(20, seed=90), priority="low")
            streamed = ask(engine, prompt_of(20, seed=91), "/generate", stream=True, priority="low")
            urgent = pool.submit(ask, engine, prompt_of(30, seed=92), priority="high")
            wait_until_reserved(engine, WAITING + 1)
            for one in going:
                one.goes_away()
            wait_until_reserved(engine, 2)
        assert urgent.result().status_code == 200
        assert first.result().status_code == 200
    for answer in (refused, streamed):
        assert answer.status_code == 429
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert answer.json()["error"]["type"] == "overloaded_error"
        assert "class low" in answer.json()["error"]["message"]


def test_when_load_has_fallen_everybody_is_served(engine: Engine) -> None:
    engine.when(is_quiet)
    for path in ("/v1/completions", "/generate"):
        assert ask(engine, prompt_of(40, seed=93), path, priority="low").status_code == 200
    assert reserved(engine) == 0


def test_what_is_no_request_is_answered_by_the_engine(engine: Engine) -> None:
    malformed = httpx.post(f"{engine.url}/v1/completions", content=b'{"prompt": [1', timeout=60)
    assert malformed.status_code in (400, 422)
    unknown = ask(engine, [1, 2], priority="gold")
    assert unknown.status_code == 400
    assert unknown.json()["error"]["message"] == "unknown class 'gold': there are high, normal, low"


def test_figures_of_both_processes_stand_on_sglangs_metrics(engine: Engine) -> None:
    engine.when(is_quiet)
    admission = engine.metrics("disagg_admission_total")  # counted in the API process
    assert sum(n for labels, n in admission.items() if labels[0] == "refused" and labels[2] == "low") == 2
    decisions = engine.metrics("disagg_decisions_total")  # in the scheduler process
    assert decisions[("over_threshold",)] >= 2
    assert engine.metrics("disagg_chunks_total")[("received",)] > 0
    served = engine.metrics("disagg_ttft_seconds_count")  # joined: class from one, path from the other
    assert served[("local", "high")] == 1
    assert sum(n for (path, _), n in served.items() if path == "offloaded") >= 1
    assert engine.metrics("sglang:num_running_reqs"), "SGLang's own are there too"


def test_disagg_status_shows_an_sglang_server(engine: Engine) -> None:
    command = [str(Path(sys.executable).with_name("disagg")), "status", engine.url, "--json"]
    command += ["--side-channel", f"127.0.0.1:{engine.side_port}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    view = json.loads(done.stdout)
    assert view["active"] is True
    assert view["role"] == "decode"
    assert view["queues"]["running"] == 0
    assert "kv_cache_usage" in view["queues"]
    assert view["decisions"]["over_threshold"] >= 2
    assert view["classes"]["low"]["outcomes"]["refused"] == 2
    assert [peer["up"] for peer in view["peers"]] == [False], "it hangs"
