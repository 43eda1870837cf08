"""A chunk that was changed anywhere is refused, nothing else is ever raised, and a slot never overflows."""

import struct
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_plugin.errors import CodecError, ConfigError, WireError
from disagg_plugin.kv.codec import SectionCodec
from disagg_plugin.kv.geometry import HeadRange
from disagg_plugin.kv.wire import (
    HEADER_BYTES,
    ChunkHeader,
    Kind,
    Notification,
    parse_chunk,
    parse_notification,
    require_one_token,
    seal,
    tokens_per_slot,
    write_header,
)

RAW, INT8, INT8C = SectionCodec.RAW, SectionCodec.INT8, SectionCodec.INT8C
HEADER = ChunkHeader(
    transfer_id=bytes(range(16)),
    nonce=2**64 - 3,
    sequence=7,
    token_start=32,
    token_end=35,
    layers=3,
    sides=2,
    heads=HeadRange(2, 2),
    head_dim=6,
    dtype="bfloat16",
    codecs=(RAW, INT8, INT8C, INT8, INT8, RAW),
)


def chunk_of(header: ChunkHeader) -> np.ndarray:
    chunk = np.random.default_rng(0).integers(0, 256, header.chunk_bytes(), dtype=np.uint8)
    assert write_header(header, chunk) == len(chunk)
    seal(chunk)
    return chunk


CHUNK = chunk_of(HEADER)


def test_a_chunk_says_what_was_written():
    assert parse_chunk(CHUNK.copy()) == HEADER


def test_sections_follow_each_other_aligned():
    sections = HEADER.sections()
    assert [section.codec for section in sections] == list(HEADER.codecs)
    assert all(section.offset % 16 == 0 for section in sections)
    assert all(one.offset + one.nbytes <= other.offset for one, other in pairwise(sections))
    assert sections[-1].offset + sections[-1].nbytes <= HEADER.chunk_bytes() == len(CHUNK)


@given(at=st.integers(0, len(CHUNK) - 1), change=st.integers(1, 255))
def test_any_changed_byte_is_detected(at, change):
    damaged = CHUNK.copy()
    damaged[at] ^= change
    with pytest.raises(CodecError):
        parse_chunk(damaged)


@given(length=st.integers(0, len(CHUNK) * 2).filter(lambda length: length != len(CHUNK)))
def test_any_other_length_is_detected(length):
    with pytest.raises(CodecError):
        parse_chunk(np.resize(CHUNK, length))


@given(st.binary(max_size=400))
def test_arbitrary_bytes_are_not_a_chunk(noise):
    with pytest.raises(CodecError):
        parse_chunk(np.frombuffer(b"DKV1" + noise, dtype=np.uint8).copy())


@given(at=st.integers(4, HEADER_BYTES + 15), value=st.binary(min_size=1, max_size=8))
def test_a_hostile_header_with_a_right_checksum_raises_nothing_else(at, value):
    hostile = CHUNK.copy()
    hostile[at : at + len(value)] = np.frombuffer(value, dtype=np.uint8)
    seal(hostile)
    try:
        header = parse_chunk(hostile)
    except CodecError:
        return
    assert header.chunk_bytes() == len(hostile)


@pytest.mark.parametrize(
    ("offset", "layout", "value", "message"),
    [
        pytest.param(4, "<H", 9, "version 9", id="version"),
        pytest.param(60, "<H", 7, "unknown checksum kind 7", id="checksum kind"),
        pytest.param(80, "<B", 77, "77 is not a valid SectionCodec", id="codec"),
        pytest.param(6, "<H", 99, "dtype 99", id="dtype"),
    ],
)
def test_what_is_unknown_is_refused_by_name(offset, layout, value, message):
    chunk = CHUNK.copy()
    chunk[offset : offset + struct.calcsize(layout)] = np.frombuffer(struct.pack(layout, value), dtype=np.uint8)
    seal(chunk)
    with pytest.raises(CodecError, match=message):
        parse_chunk(chunk)


NOTIFICATIONS = st.builds(
    Notification,
    kind=st.sampled_from(Kind),
    slot=st.integers(0, 2**16 - 1),
    sequence=st.integers(0, 2**32 - 1),
    attempt=st.integers(0, 2**32 - 1),
    nonce=st.integers(0, 2**64 - 1),
    nbytes=st.integers(0, 2**64 - 1),
)


@given(NOTIFICATIONS)
def test_a_notification_says_what_was_sent(notification):
    assert parse_notification(notification.pack()) == notification
    assert notification.answer(Kind.NACK) == replace(notification, kind=Kind.NACK)


@given(st.binary(max_size=64) | st.binary(min_size=28, max_size=28).map(lambda tail: b"DKN1" + tail))
def test_arbitrary_messages_raise_nothing_but_wire_errors(message):
    try:
        parsed = parse_notification(message)
    except WireError:
        return
    assert parsed.pack() == message


@given(
    slot_bytes=st.integers(256, 1 << 20),
    codecs=st.lists(st.sampled_from(SectionCodec), min_size=1, max_size=12).map(tuple),
    heads=st.integers(1, 8),
    head_dim=st.sampled_from([16, 64, 128]),
    dtype=st.sampled_from(["bfloat16", "float32"]),
)
def test_a_slot_is_filled_and_never_overflows(slot_bytes, codecs, heads, head_dim, dtype):
    tokens = tokens_per_slot(slot_bytes, codecs, heads=heads, head_dim=head_dim, dtype=dtype)

    def nbytes(count: int) -> int:
        shape = {"layers": len(codecs), "sides": 1, "heads": HeadRange(0, heads), "head_dim": head_dim, "dtype": dtype}
        return replace(HEADER, token_start=0, token_end=count, codecs=codecs, **shape).chunk_bytes()

    assert tokens == 0 or nbytes(tokens) <= slot_bytes
    assert nbytes(tokens + 1) > slot_bytes


def test_a_token_larger_than_a_slot_is_an_error_with_both_numbers():
    with pytest.raises(ConfigError, match=r"one token takes 2192 bytes in a slot of 2000"):
        require_one_token(2000, sections=64, heads=1, head_dim=16, dtype="bfloat16")
