"""What travels from a scheduler process to its API server: merging loses and doubles nothing."""

import copy
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_plugin.observability.buckets import add_duration, pairs_of
from disagg_plugin.observability.deltas import MAX_NOTES, Deltas, series_key, split_key

BUCKETS = (0.1, 1.0)
NAMES = st.sampled_from(["a", "b", "c"])
DATA = st.fixed_dictionaries(
    {
        "counters": st.dictionaries(NAMES, st.integers(1, 100).map(float)),
        "gauges": st.dictionaries(NAMES, st.integers(-5, 5).map(float)),
        "histograms": st.dictionaries(NAMES, st.lists(st.integers(0, 9).map(float), min_size=6, max_size=6)),
        "notes": st.dictionaries(NAMES, st.sampled_from([["local", None], ["offloaded", 0.25]])),
        "engine_state": st.none() | st.just({"queued_tokens": 7}),
    }
)


def merged(*parts: dict[str, Any]) -> dict[str, Any]:
    total = Deltas()
    for part in copy.deepcopy(parts):
        total.merge(Deltas(part))
    return {name: section for name, section in total.data.items() if section}


@given(DATA, DATA, DATA)
def test_it_does_not_matter_which_steps_are_merged_first(a: dict[str, Any], b: dict[str, Any], c: dict[str, Any]):
    assert merged(merged(a, b), c) == merged(a, merged(b, c))


@given(DATA, DATA)
def test_counters_add_up_and_of_gauges_the_later_one_stays(a: dict[str, Any], b: dict[str, Any]):
    total = Deltas(merged(a, b))
    for name in "abc":
        assert total.counters.get(name, 0) == a["counters"].get(name, 0) + b["counters"].get(name, 0)
        assert total.gauges.get(name) == b["gauges"].get(name, a["gauges"].get(name))


@given(DATA)
def test_it_comes_through_a_serializer_as_it_was(data: dict[str, Any]):
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(data)) == data


def test_a_merge_leaves_what_was_merged_alone():
    part = {"histograms": {"h": [1.0, 0.1, 0.0, 0.0, 0.0, 0.0]}}
    total = Deltas()
    total.merge(Deltas(part))
    total.merge(Deltas(part))
    assert part["histograms"]["h"][0] == 1.0
    assert total.histograms["h"][0] == 2.0


def test_notes_are_bounded_and_known_requests_may_still_change():
    deltas = Deltas()
    assert all(deltas.note(f"r{i}", "local", None) for i in range(MAX_NOTES))
    assert not deltas.note("one too many", "local", None)
    assert deltas.note("r0", "fallback", None)
    assert dict(deltas.notes())["r0"] == ["fallback", None]


@pytest.mark.parametrize(
    ("value", "bucket"),
    [
        pytest.param(0.1, 0, id="a value on a bound belongs below it, as in Prometheus"),
        pytest.param(0.11, 1, id="between"),
        pytest.param(5.0, 2, id="beyond the last bound"),
    ],
)
def test_a_value_goes_into_its_bucket(value: float, bucket: int):
    deltas, counters = Deltas(), dict[str, float]()
    deltas.observe("h", value=value, buckets=BUCKETS)
    add_duration(counters, "x", value, BUCKETS)
    expected = [0.0] * 6
    expected[2 * bucket : 2 * bucket + 2] = [1.0, value]
    assert deltas.histograms["h"] == expected == pairs_of(counters, "x", BUCKETS)


@given(st.text(st.characters(exclude_characters="\x1f")), st.lists(st.text(st.characters(exclude_characters="\x1f"))))
def test_a_series_key_gives_name_and_labels_back(name: str, labels: list[str]):
    assert split_key(series_key(name, *labels)) == (name, tuple(labels))


def test_nothing_but_empty_sections_is_empty():
    deltas = Deltas()
    assert deltas.is_empty
    assert not deltas.counters
    assert deltas.is_empty
    deltas.count("x")
    assert not deltas.is_empty
