"""Admission gets into vLLM's API server by itself, and to the point where requests are queued."""

import asyncio
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from disagg_plugin.admission.engine_state import EngineState, to_plain
from disagg_plugin.config import DisaggSettings, load_settings
from disagg_plugin.errors import ConfigError
from disagg_policies.admission_snapshots import QueuedWork
from disagg_policies.snapshots import DecodeState, PrefillModel

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, when vLLM imports its compiler
    from vllm.v1.engine.async_llm import AsyncLLM

    from disagg_vllm import admission, stats, support

SLOW = DecodeState(prefill=PrefillModel(base_s=0.0, per_token_s=1e-3, per_pair_s=0.0))
CROWDED = EngineState(1, SLOW, queued=(QueuedWork(-9, 9, 90_000),), kv_capacity_tokens=1_000_000)
QOS = {"enable_early_rejection": True, "classes": {"normal": {"ttft_slo_s": 2.0}, "low": {"ttft_slo_s": 4.0}}}


def settings(**qos: Any) -> DisaggSettings:
    return load_settings({"qos": {**QOS, **qos}})


def namespace(**fields: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"middleware": [], "scheduling_policy": "fcfs", **fields})


@pytest.fixture(autouse=True)
def _board(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(admission.BOARD_ENV, "/nowhere")


# -- parsing -----------------------------------------------------------------------------------------------------------


def test_nothing_is_arranged_unless_it_is_asked_for() -> None:
    untouched = namespace()
    admission.prepare(untouched, settings(enable_early_rejection=False), [])
    assert untouched == namespace()


def test_the_middleware_is_added_once_beside_the_users_own_and_requests_are_scheduled_by_priority() -> None:
    arranged = namespace(middleware=["theirs.Middleware"])
    for _ in range(2):
        admission.prepare(arranged, settings(), ["serve", "model"])
    assert arranged.middleware == ["theirs.Middleware", admission.MIDDLEWARE]
    assert arranged.scheduling_policy == "priority"


@pytest.mark.parametrize(
    "flag", [["--scheduling-policy", "fcfs"], ["--scheduling-policy=fcfs"], ["--scheduling_policy=fcfs"]]
)
def test_the_users_scheduling_policy_stands(flag: list[str]) -> None:
    arranged = namespace()
    admission.prepare(arranged, settings(), ["serve", "model", *flag])
    assert arranged.scheduling_policy == "fcfs"


def test_the_rust_front_end_is_said_to_bypass_admission(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("vllm.envs.VLLM_USE_RUST_FRONTEND", True, raising=False)
    arranged = namespace()
    with caplog.at_level("WARNING", "vllm.disagg"):
        admission.prepare(arranged, settings(), [])
    assert arranged.middleware == []
    assert "VLLM_USE_RUST_FRONTEND bypasses middlewares" in caplog.text


def test_a_key_that_is_not_there_stops_the_start() -> None:
    keyed = settings(api_keys=[{"service_class": "low", "env": "NO_SUCH_KEY"}])
    with pytest.raises(ConfigError, match="NO_SUCH_KEY holds no key"):
        admission.prepare(namespace(), keyed, [])


def test_a_board_is_made_for_several_api_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(admission.BOARD_ENV)
    admission.prepare(namespace(), settings(), [])
    made = Path(os.environ[admission.BOARD_ENV])
    assert made.stat().st_size == 64 * (32 << 10)
    made.unlink()


# -- one API server ----------------------------------------------------------------------------------------------------


class Client:
    """As much of ``AsyncLLM`` as admission touches."""

    def __init__(self, **config: Any) -> None:
        extra = {"qos": {**QOS, **config.pop("qos", {})}}
        self.vllm_config = SimpleNamespace(
            kv_transfer_config=SimpleNamespace(kv_connector_extra_config=extra),
            parallel_config=SimpleNamespace(_api_process_count=1),
            cache_config=SimpleNamespace(enable_prefix_caching=True),
            scheduler_config=SimpleNamespace(policy=config.get("policy", "priority")),
        )
        self.queued: list[Any] = []

    async def _add_request(self, request: Any, prompt: Any, parent_req: Any, index: Any, queue: Any) -> None:
        self.queued.append(request)


def fresh_client(**config: Any) -> Client:
    """Of a class of its own: the class is patched."""
    return type("AsyncLLM", (Client,), {"_add_request": Client._add_request})(**config)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(admission, "_site", None)
    before = list(stats._listeners)
    yield
    stats._listeners[:] = before


def serve(client: Client, body: dict[str, Any], token_ids: list[int], middleware: Any = None) -> tuple[int, Any]:
    """One request through vLLM's middleware into the engine's client; status and answer."""
    sent: list[Any] = []

    async def engine(_scope: Any, receive: Any, send: Any) -> None:
        seen = json.loads((await receive())["body"])
        request = SimpleNamespace(
            request_id=f"cmpl-{len(client.queued)}-0123abcd",
            external_req_id=None,
            prompt_token_ids=token_ids,
            lora_request=None,
            cache_salt=None,
            priority=seen.get("priority", 0),
            sampling_params=SimpleNamespace(extra_args=seen.get("vllm_xargs")),
        )
        status = 200
        try:
            await client._add_request(request, None, None, 0, None)
        except Exception as error:  # noqa: BLE001 - as vLLM's handlers do
            status = int(getattr(error, "http_status", 500))
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def receive() -> Any:
        return {"type": "http.request", "body": json.dumps(body).encode()}

    async def send(message: Any) -> None:
        sent.append(message)

    app = SimpleNamespace(state=SimpleNamespace(engine_client=client))
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "app": app}
    asyncio.run((middleware or admission.EarlyRejection)(engine)(scope, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"])


def tell(state: EngineState) -> None:
    """As the connector's statistics do."""
    for listener in list(stats._listeners):
        listener(0, to_plain(state))


@pytest.mark.usefixtures("site")
def test_the_engines_reports_reach_the_gate_and_requests_are_refused_by_them() -> None:
    client = fresh_client()
    assert serve(client, {"prompt": "x", "priority": 1}, [1] * 10)[0] == 200
    assert client.queued[0].priority == 1
    tell(CROWDED)
    status, answer = serve(client, {"prompt": "x"}, [1] * 10)
    assert (status, answer["error"]["type"]) == (429, "overloaded_error")
    assert len(client.queued) == 1


@pytest.mark.usefixtures("site")
def test_the_exact_check_knows_the_length_and_what_is_cached() -> None:
    """4,000 tokens behind a queue of 1.9 s: too late, unless they were all sent before."""
    client, body = fresh_client(), {"prompt": "word" * 4_000}
    for _ in range(3):  # nothing is known of the engine yet; the route turns out to repeat itself
        assert serve(client, body, [7] * 4_000)[0] == 200
    tell(EngineState(2, SLOW, queued=(QueuedWork(0, 3, 1_900),), kv_capacity_tokens=1_000_000, reorders=True))
    status, answer = serve(client, body, [8] * 4_000)
    assert (status, answer["error"]["code"]) == (429, "ttft")
    assert serve(client, body, [7] * 4_000)[0] == 200
    gate = admission.gate()
    assert gate is not None
    assert gate.outcomes["normal", "exact", "refused", "ttft"] == 1


@pytest.mark.usefixtures("site")
def test_a_degraded_request_carries_its_routing_to_the_scheduler() -> None:
    classes = {"low": {"ttft_slo_s": 4.0, "degrade": ["never_offload"]}}
    client = fresh_client(qos={"classes": classes, "default_class": "low"})
    tell_after = EngineState(1, SLOW, queued=(QueuedWork(0, 1, 3_300),), reorders=True)
    serve(client, {"prompt": "x"}, [1])
    tell(tell_after)
    assert serve(client, {"prompt": "x", "vllm_xargs": {"mine": 1}}, [1])[0] == 200
    first, second = client.queued
    assert support.routing_of(first) is None
    assert support.routing_of(second) == "never_offload"
    assert second.sampling_params.extra_args["mine"] == 1


@pytest.mark.usefixtures("site")
def test_a_vllm_without_that_point_is_checked_early_only_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    class Changed(Client):
        async def _add_request(self, request: Any, *others: Any, **more: Any) -> None:  # type: ignore[override]
            self.queued.append(request)

    with caplog.at_level("WARNING", "vllm.disagg"):
        client = Changed()
        assert serve(client, {"prompt": "x"}, [1])[0] == 200
    assert "requests are checked once, early" in caplog.text
    gate = admission.gate()
    assert gate is not None
    assert not gate.has_exact
    tell(CROWDED)
    assert serve(client, {"prompt": "x"}, [1])[0] == 429


@pytest.mark.usefixtures("site")
def test_where_no_gate_can_be_made_everybody_is_served(caplog: pytest.LogCaptureFixture) -> None:
    client = fresh_client(qos={"default_class": "gold"})
    with caplog.at_level("ERROR", "vllm.disagg"):
        assert serve(client, {"prompt": "x"}, [1])[0] == 200
    assert "early rejection is not active" in caplog.text


def test_the_point_in_vllm_is_there() -> None:
    class Ours(AsyncLLM):  # type: ignore[misc]  # vLLM is untyped here
        pass

    assert admission.patch_add_request(Ours)
    assert admission.patch_add_request(Ours)  # again: as it is
    assert not hasattr(AsyncLLM._add_request, admission._MARK)
