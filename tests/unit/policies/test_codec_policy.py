"""Raw where the wire is faster than the codec; 1,000 raw bytes a token, 500 as int8, encoded at 1 MB/s."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_policies.codec import by_link
from disagg_policies.snapshots import CodecChoices, Link

CHOICES = CodecChoices(
    Link(bytes_per_s=1e5, samples=9), raw_bytes_per_token=1_000, int8_bytes_per_token=500, encode_bytes_per_s=1e6
)


def at(bytes_per_s: float, samples: int = 9, **changes: object) -> CodecChoices:
    return replace(CHOICES, link=Link(bytes_per_s=bytes_per_s, samples=samples), **changes)


@pytest.mark.parametrize(
    ("choices", "name", "reason"),
    [
        pytest.param(at(1e5), "int8", "wire_slower", id="10 ms raw against 6 ms"),
        pytest.param(at(2e6), "raw", "wire_faster", id="0.5 ms raw against 1.25 ms"),
        pytest.param(at(5e5), "raw", "wire_faster", id="2 ms both: a tie goes raw"),
        pytest.param(at(4e5), "int8", "wire_slower", id="2.5 ms raw against 2.25 ms"),
        pytest.param(at(4e5, decode_bytes_per_s=2e6), "raw", "wire_faster", id="the same with 0.5 ms of decoding"),
        pytest.param(at(1e5, samples=0), "raw", "link_not_measured", id="a prior is no measurement"),
        pytest.param(at(4.9e5, previous="raw"), "raw", "wire_faster", id="barely slower: raw goes on"),
        pytest.param(at(5.1e5, previous="int8"), "int8", "wire_slower", id="barely faster: int8 goes on"),
        pytest.param(at(4e5, previous="raw"), "int8", "wire_slower", id="slower by more than the hysteresis"),
        pytest.param(at(7e5, previous="int8"), "raw", "wire_faster", id="faster by more than the hysteresis"),
    ],
)
def test_by_link(choices: CodecChoices, name: str, reason: str) -> None:
    codec = by_link(choices)
    assert (codec.name, codec.reason) == (name, reason)


@given(st.floats(1e3, 1e9), st.floats(1.0, 100.0))
def test_a_faster_wire_never_turns_raw_into_int8(bytes_per_s: float, factor: float) -> None:
    assert by_link(at(bytes_per_s)).name == "int8" or by_link(at(bytes_per_s * factor)).name == "raw"
