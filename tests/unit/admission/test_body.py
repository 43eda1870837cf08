"""A request's body is read in bounded time, set by splicing, and never made right or wrong by us."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_plugin.admission.body import EDGE_BYTES, EXACT_BYTES, BodyFacts, facts_of, with_fields


def facts(body: Any) -> BodyFacts:
    found = facts_of(body if isinstance(body, bytes) else json.dumps(body).encode())
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("body", "field", "expected"),
    [
        pytest.param({"prompt": [1, 22, 333]}, "prompt_tokens", 3, id="token ids are counted"),
        pytest.param({"prompt": [[1, 2], [3]]}, "prompt_tokens", 3, id="of several prompts, too"),
        pytest.param({"prompt": "one, two"}, "prompt_tokens", None, id="text is not"),
        pytest.param({"prompt": ["one", "two"]}, "prompt_tokens", None, id="nor are texts"),
        pytest.param({"prompt": []}, "prompt_tokens", None, id="nothing is left to the engine"),
        pytest.param({"priority": -2}, "priority", -2, id="priority"),
        pytest.param({"priority": "high"}, "priority", "high", id="priority by name"),
        pytest.param({"priority": 1.5}, "priority", None, id="no priority: the engine says so"),
        pytest.param(
            {"max_tokens": 7, "max_completion_tokens": 9},
            "limits",
            (("max_tokens", 7), ("max_completion_tokens", 9)),
            id="limits",
        ),
        pytest.param({"max_tokens": None}, "limits", (), id="a limit that is none"),
        pytest.param({"min_tokens": 5}, "min_tokens", 5, id="least"),
        pytest.param(
            {"kv_transfer_params": {"do_remote_prefill": True}}, "remote_prefill_done", True, id="done elsewhere"
        ),
        pytest.param({"kv_transfer_params": {"do_remote_prefill": False}}, "remote_prefill_done", False, id="not"),
        pytest.param({"kv_transfer_params": None}, "remote_prefill_done", False, id="no parameters"),
        pytest.param({"kv_transfer_params": {"disagg": {"transfer_id": "00"}}}, "is_transfer", True, id="our own"),
        pytest.param({"kv_transfer_params": {"disagg": 1}}, "is_transfer", False, id="somebody else's"),
    ],
)
@pytest.mark.parametrize("padding", [0, EXACT_BYTES], ids=["exactly", "from head and tail"])
def test_facts(body: dict[str, Any], field: str, expected: object, padding: int) -> None:
    assert getattr(facts({"messages": "x" * padding, **body}), field) == expected
    assert getattr(facts({**body, "messages": "x" * padding}), field) == expected


def test_a_nested_key_is_not_taken_for_the_bodys() -> None:
    assert facts({"metadata": {"priority": 1}}).priority is None


def test_text_that_looks_like_fields_is_text() -> None:
    text = ', "priority": 5, "max_tokens": 1, "do_remote_prefill": true} ' * 4_000
    for body in ({"prompt": text}, {"prompt": text[:600]}):
        found = facts(body)
        assert (found.priority, found.limits, found.remote_prefill_done) == (None, (), False)


@given(st.integers(EXACT_BYTES // 4, 60_000), st.integers(1, 6))
def test_many_token_ids_are_counted_from_a_sample(count: int, digits: int) -> None:
    ids = [10**digits - 1 - at % 7 for at in range(count)]
    for separators in (None, (",", ":")):
        body = json.dumps({"model": "m", "prompt": ids, "max_tokens": 1}, separators=separators).encode()
        tokens = facts(body).prompt_tokens
        assert tokens is not None
        assert tokens == pytest.approx(count, rel=0.1)


@pytest.mark.parametrize(
    "body", [b"", b"nonsense", b"[1]", b'"text"', b'{"a": 1', b'{"a": }', b'{"a": 1,}', b"{\xff}", b"{" * 9_000 + b"}"]
)
def test_what_is_no_json_object_is_left_to_the_engine(body: bytes) -> None:
    assert facts_of(body) is None


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=5), below, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(st.sampled_from(["a", "priority", "max_tokens", "prompt"]), values, max_size=4)


@given(
    objects, st.dictionaries(st.sampled_from(["priority", "max_tokens"]), st.integers()), st.sampled_from(["", " \n"])
)
def test_setting_fields_is_what_a_parser_would_have_done(
    body: dict[str, Any], fields: dict[str, object], space: str
) -> None:
    spliced = with_fields((space + json.dumps(body) + space).encode(), fields)
    assert json.loads(spliced) == {**body, **fields}


@given(st.text('{}[]",:a1\\ ', max_size=30))
def test_malformed_stays_malformed(text: str) -> None:
    body = text.encode()
    spliced = with_fields(body, {"max_tokens": 1})
    try:
        parsed = json.loads(body)
    except ValueError:
        with pytest.raises(json.JSONDecodeError):
            json.loads(spliced)
    else:
        assert json.loads(spliced) == ({**parsed, "max_tokens": 1} if isinstance(parsed, dict) else parsed)


def test_the_edges_are_bounded() -> None:
    hidden = {"messages": "x" * (2 * EDGE_BYTES), "priority": 3, "more": "x" * (2 * EDGE_BYTES)}
    assert facts(hidden).priority is None


@pytest.mark.parametrize("tokens", [3, 20_000], ids=["read whole", "sampled"])
def test_token_ids_of_sglangs_api_are_counted_too(tokens: int) -> None:
    facts = facts_of(json.dumps({"input_ids": [17] * tokens, "sampling_params": {}}).encode())
    assert facts is not None
    assert facts.prompt_tokens == pytest.approx(tokens, rel=0.01)


@pytest.mark.parametrize("tokens", [3, 20_000], ids=["read whole", "sampled"])
def test_an_offload_call_to_sglang_is_a_transfer(tokens: int) -> None:
    facts = facts_of(json.dumps({"input_ids": [17] * tokens, "bootstrap_host": "disagg"}).encode())
    assert facts is not None
    assert facts.is_transfer
