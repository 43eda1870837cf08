"""SGLang's API process: what is asked about each prompt, and what comes of reports; without SGLang."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY

from disagg_plugin import api_process
from disagg_plugin.admission.body import BodyFacts
from disagg_plugin.admission.engine_state import EngineState, to_plain
from disagg_plugin.admission.gate import Ticket
from disagg_plugin.admission.middleware import current_ticket
from disagg_plugin.config import load_settings
from disagg_plugin.control.leaving import LeavingWord
from disagg_plugin.meeting_folder import VARIABLE
from disagg_plugin.observability.deltas import Deltas
from disagg_policies.admission_snapshots import QueuedWork
from disagg_policies.snapshots import DecodeState, PrefillModel
from disagg_sglang.api_server import ApiServer
from disagg_sglang.support import ROUTING_KEY

SLOW = DecodeState(prefill=PrefillModel(base_s=0.0, per_token_s=1e-3, per_pair_s=0.0))
CLASSES = {"normal": {"ttft_slo_s": 2.0}, "low": {"ttft_slo_s": 4.0, "degrade": ["never_offload"]}}


@pytest.fixture
def server() -> Iterator[ApiServer]:
    before = set(REGISTRY._collector_to_names)
    token = current_ticket.set(None)
    settings = load_settings({"qos": {"enable_early_rejection": True, "classes": CLASSES}})
    yield ApiServer(settings, model_name="m", by_priority=True, caches_prefixes=True)
    current_ticket.reset(token)
    for collector in set(REGISTRY._collector_to_names) - before:
        REGISTRY.unregister(collector)


def prompt(tokens: int) -> Any:
    return SimpleNamespace(
        rid="r",
        input_ids=list(range(tokens)),
        cache_salt=None,
        lora_id=None,
        priority=None,
        sampling_params=SimpleNamespace(custom_params=None),
    )


def entered(server: ApiServer, **facts: Any) -> Ticket:
    """A request that the first stage let in; it is the current one."""
    assert server.site is not None
    ticket = server.site.gate.enter("/generate", {}, BodyFacts(**facts))
    assert isinstance(ticket, Ticket)
    current_ticket.set(ticket)
    return ticket


def report(server: ApiServer, queued_tokens: int) -> None:
    queued = (QueuedWork(-9, 9, queued_tokens),) if queued_tokens else ()
    deltas = Deltas()
    deltas.set_engine_state(to_plain(EngineState(1, SLOW, queued=queued, kv_capacity_tokens=1_000_000)))
    server._heard(deltas)


def test_a_prompt_gets_the_priority_of_its_class(server: ApiServer) -> None:
    report(server, 0)
    ticket, sent = entered(server, text_bytes=100, priority="low"), prompt(100)
    server.sends(sent)
    assert sent.priority == ticket.service_class.priority


def test_a_prompt_that_turns_out_too_long_is_refused_before_it_is_sent(server: ApiServer) -> None:
    report(server, 3_000)
    ticket = entered(server, text_bytes=10, priority="low")
    with pytest.raises(ValueError, match="overloaded"):
        server.sends(prompt(2_000))
    assert ticket.refusal is not None


def test_a_request_that_passed_no_gate_is_sent_as_it_is(server: ApiServer) -> None:
    sent = prompt(50_000)
    server.sends(sent)
    assert sent.priority is None


def test_a_degraded_request_tells_the_scheduler_where_it_may_be_prefilled(server: ApiServer) -> None:
    report(server, 0)
    ticket, sent = entered(server, text_bytes=100, priority="low"), prompt(100)
    ticket.steps = ("never_offload",)
    server.sends(sent)
    assert sent.sampling_params.custom_params == {ROUTING_KEY: "never_offload"}


def test_a_request_is_counted_under_its_class_and_the_path_that_the_scheduler_reported(server: ApiServer) -> None:
    report(server, 0)
    entered(server, text_bytes=100, priority="low")
    server.sends(prompt(100))
    noted = Deltas()
    noted.note("r", "offloaded", 0.1)
    server._heard(noted)
    times = SimpleNamespace(
        get_first_token_latency=lambda: 0.2,
        get_time_per_output_token=lambda tokens: 0.1 / tokens,
        get_e2e_latency=lambda: 0.3,
    )
    server.measured("r", {"type": "length"}, times, 8)
    labels = {"model_name": "m", "slo_class": "low", "path": "offloaded"}
    assert REGISTRY.get_sample_value("disagg_ttft_seconds_count", labels) == 1


@pytest.mark.parametrize(
    ("reason", "outcome"),
    [({"type": "abort", "status_code": 503}, "error"), ({"type": "abort"}, "aborted")],
)
def test_a_request_that_was_not_served_is_counted_as_what_it_is(
    server: ApiServer, reason: dict[str, Any], outcome: str
) -> None:
    server.measured("r", reason, None, 0)
    labels = {"model_name": "m", "slo_class": "normal", "path": "local", "outcome": outcome}
    assert REGISTRY.get_sample_value("disagg_slo_requests_total", labels) == 1


def test_a_server_that_ends_takes_no_more_prompts_for_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    monkeypatch.setattr(api_process, "LOOK_S", 0.0)
    before, word, looks = set(REGISTRY._collector_to_names), LeavingWord(tmp_path), iter([False, False, True])
    server = ApiServer(load_settings({"role": "prefill"}), model_name="m", by_priority=False, caches_prefixes=True)
    assert not word.stands
    asyncio.run(server.leave_when(lambda: next(looks)))
    assert word.stands
    for collector in set(REGISTRY._collector_to_names) - before:
        REGISTRY.unregister(collector)
