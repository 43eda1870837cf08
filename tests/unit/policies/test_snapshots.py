"""What policies are given survives JSON, and what they decide leaves the right trace."""

import copy
import pickle
from dataclasses import asdict, replace

import msgspec
import pytest

from disagg_policies.snapshots import (
    Decision,
    DecodeState,
    Link,
    Local,
    Offload,
    Placement,
    PolicyState,
    PrefillModel,
    Prompt,
    Snapshot,
    WorkerState,
    remember,
)

PROMPT = Prompt("r", prompt_tokens=1_000, cached_tokens=0)  # size 10: 512 to 1,023 tokens
SIZE = 1 << 10


def test_a_snapshot_survives_json_bit_by_bit() -> None:
    worker = WorkerState("p0", healthy=True, queued_requests=1, max_prompt_tokens=4_000, prefill_tokens_per_s=1 / 3)
    placement = Placement(("p0",), "score", (0.1 + 0.2,))
    here = DecodeState("d0", prefill=PrefillModel(1e-17, 1 / 7))
    snapshot = Snapshot(PROMPT, here, (worker,), (64,), 1e9 / 3, PolicyState(3), placement)
    assert msgspec.json.decode(msgspec.json.encode(snapshot), type=Snapshot) == snapshot


@pytest.mark.parametrize("speed", [0.0, -1.0, float("nan")])
def test_a_worker_without_speed_is_refused(speed: float) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        WorkerState("p0", healthy=True, queued_requests=0, max_prompt_tokens=1, prefill_tokens_per_s=speed)


@pytest.mark.parametrize(
    ("decision", "expected"),
    [
        pytest.param(
            Offload(("p0",), "remote_faster", 1.0, 0.5), PolicyState(SIZE | 1, 2, 8), id="went: known as remote"
        ),
        pytest.param(Local("local_faster", 0.5, 1.0), PolicyState(1, SIZE | 2, 8), id="stayed: known as local"),
        pytest.param(Local("queue_full"), PolicyState(1, 2, 8), id="a full queue says nothing about speed"),
        pytest.param(Local("kv_budget", 1.0, 0.5), PolicyState(1, 2, 8), id="nor does a full cache"),
        pytest.param(Offload(("p0",), "over_threshold"), PolicyState(1, 2, 8), id="nor does a threshold"),
    ],
)
def test_what_is_remembered(decision: Decision, expected: PolicyState) -> None:
    assert remember(PolicyState(1, 2, 7), PROMPT, decision, placed=True) == expected


def test_a_decision_without_placement_takes_no_turn() -> None:
    assert remember(PolicyState(turn=7), PROMPT, Local("short_prompt"), placed=False).turn == 7


def test_the_last_decision_of_a_size_counts() -> None:
    went = remember(PolicyState(), PROMPT, Offload(("p0",), "remote_faster", 1.0, 0.5), placed=True)
    stayed = remember(went, PROMPT, Local("local_faster", 0.5, 1.0), placed=True)
    assert (stayed.remote_sizes, stayed.local_sizes) == (0, SIZE)


def test_prefill_seconds_follow_the_formula() -> None:
    model = PrefillModel(base_s=1.0, per_token_s=0.1, per_pair_s=0.01)
    assert model.seconds(10, 100) == pytest.approx(1 + 1 + 0.01 * 10 * 105)
    assert model.seconds(0, 100) == 0.0


def test_what_follows_from_a_row_is_neither_compared_nor_written_nor_lost_in_copies() -> None:
    row = WorkerState("p", True, 2, 8_000, 3_000, 16, 0.5, 1_500.0, in_flight_requests=1, link=Link(1e6, 0.01, 100.0))
    assert (row.queue_s, row.requests, row.busy, row.wire_s_per_token) == (2.0, 3, 1.0, 1e-4)
    assert "queue_s" not in repr(row)
    assert "queue_s" not in asdict(row)
    for again in (pickle.loads(pickle.dumps(row)), copy.deepcopy(row), replace(row)):
        assert again == row
        assert again.queue_s == row.queue_s
    assert replace(row, in_flight_tokens=1_500).queue_s == 3.0
