"""Admission in front of a real engine with two API servers: one start, by the short flags alone.

Whoever refuses only predicts: while the scheduler stands still nothing is served, however fast the machine is.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import Any

import httpx
import openai
import pytest
import yaml
from e2e.client import Engine
from e2e.running import end_running_fleet
from engine_processes import stopped_schedulers
from engines import free_port, serving, vllm_command, vllm_env
from models import tiny

pytestmark = pytest.mark.e2e

CLASSES = {
    "high": {"ttft_slo_s": 60.0},
    "normal": {"ttft_slo_s": 10.0},
    "low": {"ttft_slo_s": 0.6, "degrade": ["max_tokens:4"]},
}
LONG = 3_000  # tokens


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine that refuses early; nobody told vLLM about middlewares or priorities."""
    end_running_fleet()
    folder = tmp_path_factory.mktemp("admission")
    port = free_port()
    settings = {
        "side_channel": {"port": free_port()},
        "transfer": {"compile": False, "slot_bytes": 1 << 20, "region_slots": 2, "ring_max_bytes": 4 << 20},
        "qos": {"enable_early_rejection": True, "classes": CLASSES},
        "observability": {"admin_route": True},
    }
    (folder / "d.yaml").write_text(yaml.safe_dump(settings))
    flags = ["--kv-connector", "disagg", "--disagg-role", "decode", "--disagg-config", str(folder / "d.yaml")]
    flags += ["--api-server-count", "2", "--max-num-batched-tokens", "512"]
    command = vllm_command(str(tiny()), port, core=1, extra=flags)
    url = f"http://127.0.0.1:{port}"
    with serving(command, f"{url}/health", folder / "d.log", start_s=600, env=vllm_env(core=1)) as process:
        started = Engine(url, str(tiny()), pid=process.pid)
        assert ask(started, range(100, 200)).status_code == 200
        yield started


def ask(engine: Engine, prompt: Any, **more: Any) -> httpx.Response:
    """One completion on a connection of its own, so that both API servers are asked."""
    body = {"model": engine.model, "prompt": list(prompt), "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    return httpx.post(f"{engine.url}/v1/completions", json={**body, **more}, timeout=300)


def status(engine: Engine) -> Any:
    """Of one of the two API servers."""
    return httpx.get(f"{engine.url}/disagg/status", timeout=60).json()


def wait_until_decided(engine: Engine, asked: list[Future[httpx.Response]]) -> None:
    """Each of these, and no other request, was refused, or is on its way to the scheduler, which stands still."""
    for _ in range(400):
        gate, refused = status(engine)["gate"], sum(one.done() for one in asked)
        on_their_way = sum(work["requests"] for work in gate["reserved"] + gate["reserved_elsewhere"])
        if on_their_way + refused == len(asked):
            return
        Event().wait(0.05)
    raise AssertionError(f"of {len(asked)} requests {refused} were refused, {on_their_way} let in")


def fresh(number: int) -> range:
    """No two share a cached block."""
    return range(1_000 + number * 17, 1_000 + number * 17 + LONG)


def test_a_burst_is_refused_in_part_and_the_urgent_are_served(engine: Engine) -> None:
    urgent = [range(20_000 + at * 300, 20_200 + at * 300) for at in range(4)]
    with ThreadPoolExecutor(40) as pool:
        with stopped_schedulers(engine):
            low = [pool.submit(ask, engine, fresh(at), priority="low") for at in range(30)]
            wait_until_decided(engine, low)
            high = [pool.submit(ask, engine, prompt, priority="high") for prompt in urgent]
            wait_until_decided(engine, low + high)
        low_answers, high_answers = [one.result() for one in low], [one.result() for one in high]
    assert [answer.status_code for answer in high_answers] == [200] * 4
    refused = [answer for answer in low_answers if answer.status_code == 429]
    served = [answer for answer in low_answers if answer.status_code == 200]
    assert len(refused) + len(served) == 30
    assert refused, status(engine)
    assert served
    for answer in refused:
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert answer.json()["error"]["type"] == "overloaded_error"
        assert "class low" in answer.json()["error"]["message"]
    for answer in served:
        if "x-disagg-degraded" in answer.headers:
            assert answer.json()["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("stream", [False, True])
def test_a_refused_client_that_retries_is_served_when_load_has_fallen(engine: Engine, stream: bool) -> None:
    asked = {"model": engine.model, "prompt": list(fresh(200 + stream)), "max_tokens": 4, "stream": stream}
    with (
        ThreadPoolExecutor(20) as pool,
        openai.OpenAI(base_url=f"{engine.url}/v1", api_key="k", max_retries=0) as client,
    ):
        with stopped_schedulers(engine):
            busy = [pool.submit(ask, engine, fresh(100 + at + 20 * stream), priority="high") for at in range(16)]
            wait_until_decided(engine, busy)
            with pytest.raises(openai.RateLimitError) as refused:
                client.completions.create(**asked, extra_body={"priority": "low"})
        assert refused.value.code in ("ttft", "tpot")
        with client.with_options(max_retries=8) as patient:
            answer: Any = patient.completions.create(**asked, extra_body={"priority": "low"})
            text = "".join(part.choices[0].text for part in answer) if stream else answer.choices[0].text
        assert text
        assert [one.result().status_code for one in busy] == [200] * 16


def test_what_is_no_request_is_answered_by_the_engine(engine: Engine) -> None:
    malformed = httpx.post(f"{engine.url}/v1/completions", content=b'{"prompt": [1', timeout=60)
    assert malformed.status_code == 400
    unknown = ask(engine, [1, 2], priority="gold")
    assert unknown.status_code == 400
    assert unknown.json()["error"]["message"] == "unknown class 'gold': there are high, normal, low"


def test_nothing_stays_reserved(engine: Engine) -> None:
    """Each API server has heard from the engine, or from the other one, that it is idle again."""
    for _ in range(6):
        assert ask(engine, range(100, 200), priority="low").status_code == 200
    wait_until_decided(engine, [])


def test_what_was_decided_is_counted(engine: Engine) -> None:
    for priority in ("low", "high"):
        assert ask(engine, fresh(500), priority=priority).status_code == 200
    outcomes = {(one["slo_class"], one["outcome"]) for one in status(engine)["admission"]}
    assert {("low", "admitted"), ("high", "admitted")} & outcomes  # of one of the two API servers
