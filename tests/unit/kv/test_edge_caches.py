"""Caches of P and D that differ: block size and float dtype may, quantized ones must be of one kind."""

from dataclasses import replace

import pytest
import torch
from unit.kv.test_dataplane import D_BLOCKS, GEOMETRY, P_BLOCKS, SETTINGS, TOKENS, Rig

from disagg_plugin.control.compatibility import Party, find_mismatch
from disagg_plugin.control.messages import PROTOCOL_VERSION, ModelIdentity
from disagg_plugin.kv.geometry import HeadRange, KVGeometry
from disagg_plugin.testing import DenseView, MemoryNetwork, canonical_noise

FLOATS = ("float32", "bfloat16", "float16")


class TwoCaches(Rig):
    """P and D with caches of their own."""

    def __init__(self, prefill: KVGeometry, decode: KVGeometry, *, prefill_block: int, decode_block: int) -> None:
        self.now = 100.0
        self.settings = replace_slots()
        self.network = MemoryNetwork()
        self.views = {
            "p": DenseView(prefill, blocks=40, block_size=prefill_block),
            "d": DenseView(decode, blocks=40, block_size=decode_block),
        }
        self.planes = {engine: self.new_plane(engine, 1) for engine in "pd"}
        self.epochs = {"p": 1, "d": 1}
        self.introduce("p", "d")
        self.completed, self.released, self.invalid = [], [], set()
        self.reports = {"p": [], "d": []}


def replace_slots():
    return SETTINGS.model_copy(update={"slot_bytes": 8192, "ring_max_bytes": 32 * 8192})


@pytest.mark.parametrize("blocks", [(16, 16), (16, 8), (8, 32), (64, 16)], ids=lambda b: f"{b[0]} to {b[1]} tokens")
@pytest.mark.parametrize("decode_dtype", FLOATS)
@pytest.mark.parametrize("prefill_dtype", FLOATS)
def test_block_size_and_float_dtype_may_differ(prefill_dtype: str, decode_dtype: str, blocks: tuple[int, int]) -> None:
    prefill, decode = replace(GEOMETRY, dtype=prefill_dtype), replace(GEOMETRY, dtype=decode_dtype)
    rig = TwoCaches(prefill, decode, prefill_block=blocks[0], decode_block=blocks[1])
    rig.begin()
    rig.run()
    assert rig.completed == ["r"]
    assert rig.invalid == set()
    sent = canonical_noise(prefill, HeadRange(0, 2), 1, TOKENS).to(getattr(torch, decode_dtype))
    assert torch.equal(rig.views["d"].read(D_BLOCKS, 0, TOKENS), sent)
    rig.assert_idle()


@pytest.mark.parametrize("codec", ["raw", "int8"])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_an_fp8_cache_travels_byte_by_byte(dtype: str, codec: str) -> None:
    geometry = replace(GEOMETRY, dtype=dtype)
    rig = TwoCaches(geometry, geometry, prefill_block=16, decode_block=8)
    rig.begin(codec=codec)
    rig.run()
    assert rig.completed == ["r"]
    sent = rig.views["p"].read(P_BLOCKS, 0, TOKENS)
    assert torch.equal(rig.views["d"].read(D_BLOCKS, 0, TOKENS).view(torch.uint8), sent.view(torch.uint8))
    rig.assert_idle()


def party(dtype: str) -> Party:
    return Party(PROTOCOL_VERSION, ModelIdentity("c", "w"), replace(GEOMETRY, dtype=dtype), 1)


@pytest.mark.parametrize(
    ("ours", "theirs"), [("float8_e4m3fn", "bfloat16"), ("float16", "float8_e5m2"), ("float8_e4m3fn", "float8_e5m2")]
)
def test_quantized_caches_of_two_kinds_are_refused(ours: str, theirs: str) -> None:
    mismatch = find_mismatch(party(ours), party(theirs))
    assert mismatch is not None
    assert (mismatch.reason, mismatch.ours, mismatch.theirs) == ("kv_dtype", ours, theirs)


@pytest.mark.parametrize("ours", FLOATS)
@pytest.mark.parametrize("theirs", FLOATS)
def test_float_caches_of_any_two_kinds_fit(ours: str, theirs: str) -> None:
    assert find_mismatch(party(ours), party(theirs)) is None
