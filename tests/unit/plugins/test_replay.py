"""A logged decision can be made again, exactly; what it was made from is all in the line."""

import importlib.metadata
import json
import sys
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.plugins.situations import BUSY, PROMPT, WORKERS, decider

from disagg_plugin import builtin_policies
from disagg_plugin.errors import ConfigError
from disagg_plugin.hookspecs import PolicyParameters, hookimpl
from disagg_plugin.plugins import PolicySettings, choose, load_plugins
from disagg_plugin.serving.decision_record import from_json, replay, to_json
from disagg_plugin.serving.decisions import Decider
from disagg_policies.snapshots import (
    DecodeModel,
    DecodeState,
    Link,
    Local,
    PolicyState,
    PrefillModel,
    Prompt,
    Snapshot,
    WorkerState,
)

MANAGER = load_plugins()
seconds = st.floats(min_value=0, max_value=1e6, allow_subnormal=False)
tiny = st.floats(min_value=1e-9, max_value=1.0)
count = st.integers(min_value=0, max_value=1_000_000)
share = st.floats(min_value=0, max_value=1)
prefills = st.builds(PrefillModel, base_s=tiny, per_token_s=tiny, per_pair_s=tiny, samples=count, error=share)
links = st.builds(
    Link,
    bytes_per_s=st.floats(min_value=1.0, max_value=1e12),
    setup_s=tiny,
    wire_bytes_per_token=seconds,
    samples=count,
)
prompts = st.builds(
    Prompt,
    request_id=st.text(max_size=40),
    prompt_tokens=count,
    cached_tokens=count,
    lmcache_tokens=count,
    priority=st.integers(-10, 10),
    deadline_s=st.none() | seconds,
)
decodes = st.builds(
    DecodeState,
    engine=st.text(max_size=10),
    running_decodes=count,
    decode_context_tokens=count,
    queued_prefill_tokens=count,
    kv_usage=share,
    held_kv_tokens=count,
    held_kv_budget_tokens=st.none() | count,
    prefill=prefills,
    decode=st.builds(DecodeModel, base_s=tiny, per_request_s=tiny, samples=count),
)
workers = st.lists(
    st.builds(
        WorkerState,
        worker=st.sampled_from([f"p-{number}" for number in range(8)]),
        healthy=st.booleans(),
        queued_requests=st.integers(0, 64),
        max_prompt_tokens=count,
        queued_prefill_tokens=count,
        running_requests=count,
        kv_usage=share,
        prefill_tokens_per_s=st.floats(min_value=0.1, max_value=1e6),
        reported_s=st.floats(min_value=9.0, max_value=10.0),
        in_flight_tokens=count,
        prefill=prefills,
        link=links,
    ),
    max_size=8,
    unique_by=lambda worker: worker.worker,
).map(tuple)
parameters = st.builds(
    PolicyParameters,
    prompt_length_threshold=st.integers(0, 10_000),
    min_cache_hit_ratio=st.none() | share,
    prefix_cache_weight=seconds,
    enable_hotspot_prevention=st.booleans(),
    decode_harm_weight=share,
)
states = st.builds(PolicyState, remote_sizes=count, local_sizes=count, turn=count)


@given(
    prompts,
    decodes,
    workers,
    states,
    parameters,
    st.sampled_from(builtin_policies.names("offload")),
    st.sampled_from(builtin_policies.names("placement")),
    st.data(),
)
@settings(max_examples=200, deadline=None)
def test_any_decision_of_any_built_in_comes_out_the_same_from_its_line(
    prompt: Prompt,
    decode: DecodeState,
    fleet: tuple[WorkerState, ...],
    previous: PolicyState,
    given_parameters: PolicyParameters,
    offload: str,
    placement: str,
    data: st.DataObject,
) -> None:
    overlap = data.draw(st.just(()) | st.tuples(*[st.integers(0, prompt.prompt_tokens)] * len(fleet)))
    chosen = choose(MANAGER, PolicySettings(offload=(offload,), placement=(placement,)))
    deciding = Decider(chosen, given_parameters, clock=lambda: 10.5, log_interval_s=None, state=previous)
    record = deciding.decide(prompt, decode, fleet, overlap)
    line = to_json(record)
    assert "\n" not in line
    assert from_json(line) == record
    replayed = replay(line, MANAGER)
    assert replayed.decision == record.decision
    assert replayed.placement == record.snapshot.placement
    assert replayed.equal


def test_what_a_logger_puts_in_front_of_the_line_does_no_harm() -> None:
    record = decider().decide(PROMPT, BUSY, WORKERS)
    assert from_json(f"INFO 11-21 05:00:00 [decisions.py:1] disagg: decision {to_json(record)}\n") == record


def test_a_changed_answer_is_not_equal() -> None:
    values = json.loads(to_json(decider().decide(PROMPT, BUSY, WORKERS)))
    values["answer"]["offload"]["workers"] = ["p-1"]
    assert not replay(json.dumps(values)).equal


@pytest.mark.parametrize(
    "line",
    [
        pytest.param("", id="nothing"),
        pytest.param("{", id="half a line"),
        pytest.param('{"decision":2}', id="another version"),
        pytest.param('{"decision":1}', id="no answer"),
        pytest.param('{"decision":1,"answer":{"offload":{}}}', id="an answer without fields"),
        pytest.param('{"decision":1,"answer":[]}', id="an answer of another type"),
    ],
)
def test_what_is_no_record_is_a_mistake_in_one_line(line: str) -> None:
    with pytest.raises(ConfigError, match="not a decision") as caught:
        from_json(line)
    assert "\n" not in str(caught.value)


def test_a_module_of_the_users_own_is_found_by_its_name_in_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    @hookimpl
    def disagg_decide_offload(snapshot: Snapshot) -> Local:
        return Local("mine", local_ttft_s=float(snapshot.prompt.prompt_tokens))

    acme = types.ModuleType("acme.policies")
    acme.disagg_decide_offload = disagg_decide_offload  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "acme.policies", acme)
    mine = PolicySettings(module="acme.policies")
    record = Decider(choose(load_plugins(mine), mine), bound_s=5.0, log_interval_s=None).decide(PROMPT, BUSY, WORKERS)
    assert record.decided_by == "acme.policies"
    assert replay(to_json(record)).equal


def test_a_policy_that_is_not_installed_here_is_a_mistake_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [])
    values = json.loads(to_json(decider().decide(PROMPT, BUSY, WORKERS))) | {"decided_by": "gone"}
    with pytest.raises(ConfigError, match=r"policy\.offload = 'gone': is not installed; there are latency, threshold"):
        replay(json.dumps(values))
