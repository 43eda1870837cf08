"""Prompts that somebody else routed: both engines find each other by a number, and only for one and the same prompt."""

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given

from disagg_plugin.control.offload_call import (
    DIALECTS,
    ROOM_BITS,
    prompt_digest,
    room_of,
    transfer_id_in,
    transfer_id_of,
)
from disagg_plugin.control.prefill_workers import same_host
from disagg_plugin.errors import PeerRefused

PROMPT = [5, 6, 7]
TID = bytes(range(200, 216))


@given(st.integers(0, (1 << ROOM_BITS) - 1))
def test_a_room_is_found_again_in_its_transfer_id(room: int) -> None:
    assert room_of(transfer_id_in(room)) == room


def test_two_transfers_in_one_room_are_two() -> None:
    assert transfer_id_in(7) != transfer_id_in(7)


@given(st.lists(st.integers(0, 1 << 20)), st.lists(st.integers(0, 1 << 20)))
def test_only_equal_prompts_have_one_digest(one: list[int], other: list[int]) -> None:
    assert (prompt_digest(one) == prompt_digest(other)) is (one == other)
    assert prompt_digest(one) != 0


def test_vllm_is_asked_with_the_whole_transfer_id() -> None:
    body = msgspec.json.decode(DIALECTS["vllm"].body(model="m", token_ids=PROMPT, transfer_id=TID, fields=()))
    assert (body["prompt"], body["max_tokens"]) == (PROMPT, 1)
    assert transfer_id_of(body["kv_transfer_params"]) == TID


def test_sglang_is_asked_with_the_room() -> None:
    fields = (("cache_salt", "s"),)
    body = msgspec.json.decode(DIALECTS["sglang"].body(model="m", token_ids=PROMPT, transfer_id=TID, fields=fields))
    assert (body["input_ids"], body["sampling_params"]["max_new_tokens"]) == (PROMPT, 1)
    assert (body["bootstrap_room"], body["cache_salt"]) == (room_of(TID), "s")


def test_what_sglang_has_no_word_for_is_not_asked() -> None:
    with pytest.raises(PeerRefused, match="cannot_carry_model"):
        DIALECTS["sglang"].body(model="m", token_ids=PROMPT, transfer_id=TID, fields=(("model", "a-lora"),))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("127.0.0.1", "localhost", True),
        ("prefill-0.svc", "Prefill-0.svc", True),
        ("10.0.0.1", "10.0.0.2", False),
        ("127.0.0.1", "10.0.0.2", False),
    ],
)
def test_hosts_are_compared_as_texts_but_for_loopback(one: str, other: str, same: bool) -> None:
    assert same_host(one, other) is same
