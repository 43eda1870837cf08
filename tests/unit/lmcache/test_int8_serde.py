"""Our codec inside LMCache: sizes, bounds, and that nothing wrong is ever read back. Against the installed LMCache."""

import struct
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lmcache.v1.distributed.serde import SerdeConfig, create_serde_processor, get_registered_serde_types

from disagg_lmcache import server
from disagg_lmcache.int8_serde import NAME, PART_NUMBERS, Int8Codec, Int8Error, serialized_bytes

HEADER_BYTES = 24


def stored(numbers: torch.Tensor, group: int = 64) -> torch.Tensor:
    out = torch.zeros(serialized_bytes(numbers.numel(), group), dtype=torch.uint8)
    assert Int8Codec(group).encode(numbers, out) == out.numel()
    return out


@given(
    rows=st.integers(1, 40),
    group=st.sampled_from([16, 64, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.floats(1e-3, 1e2),
    seed=st.integers(0, 1000),
)
def test_what_is_read_back_is_within_half_a_step_of_each_row(
    rows: int, group: int, dtype: torch.dtype, scale: float, seed: int
) -> None:
    kv = (torch.randn(rows, group, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
    back = torch.empty_like(kv)
    Int8Codec(group).decode(stored(kv, group), back)
    step = kv.float().abs().amax(-1, keepdim=True) / 127 * (1 + 2**-8)
    rounding = kv.float().abs() * torch.finfo(dtype).eps
    assert bool(((kv.float() - back.float()).abs() <= step / 2 * 1.001 + rounding).all())


def test_objects_of_more_than_one_part_are_read_back_whole() -> None:
    kv = torch.randn(2, PART_NUMBERS // 64 + 3, 64)
    back = torch.empty_like(kv)
    Int8Codec().decode(stored(kv), back)
    assert torch.allclose(kv, back, atol=0.05)


def test_an_fp32_object_takes_less_than_0_27_of_its_size() -> None:
    numbers = 2 * 4 * 64 * 128  # sides × layers × tokens × kv width of the tiny model
    assert serialized_bytes(numbers, 64) <= 0.27 * 4 * numbers


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_int8_does_not_fit_is_not_stored(bad: float) -> None:
    kv = torch.zeros(4, 64)
    kv[2, 3] = bad
    with pytest.raises(Int8Error, match="INT8 does not fit"):
        stored(kv)


@pytest.mark.parametrize(
    ("at", "what"),
    [(0, "written as"), (4, "written as"), (8, "written as"), (17, "checksum"), (HEADER_BYTES + 5, "checksum")],
)
def test_a_changed_byte_anywhere_is_noticed(at: int, what: str) -> None:
    kv = torch.randn(8, 64)
    payload = stored(kv)
    payload[at] ^= 1
    with pytest.raises(Int8Error, match=what):
        Int8Codec().decode(payload, torch.empty_like(kv))


def test_objects_of_another_group_or_too_short_are_refused() -> None:
    kv = torch.randn(8, 64)
    with pytest.raises(Int8Error, match="written as 512 numbers in groups of 64"):
        Int8Codec(128).decode(stored(kv), torch.empty_like(kv))
    with pytest.raises(Int8Error, match="bytes where"):
        Int8Codec().decode(stored(kv)[:-1], torch.empty_like(kv))
    with pytest.raises(Int8Error, match="not whole groups of 64"):
        serialized_bytes(100, 64)


def test_lmcache_makes_it_by_name_and_runs_it_in_its_own_thread() -> None:
    server.register()
    server.register()
    assert NAME in get_registered_serde_types()
    processor = create_serde_processor(SerdeConfig(NAME, {"group": 64}))
    kv = torch.randn(4, 64, 128)
    size = processor.estimate_serialized_size(SimpleNamespace(shapes=[kv.shape], dtypes=[kv.dtype]))
    source, payload, back = (
        SimpleNamespace(tensor=t) for t in (kv, torch.zeros(size, dtype=torch.uint8), torch.empty_like(kv))
    )
    try:
        assert processed(processor.submit_serialize, processor.query_serialize_result, source, payload)
        assert processed(processor.submit_deserialize, processor.query_deserialize_result, payload, back)
        assert torch.allclose(kv, back.tensor, atol=0.05)
        struct.pack_into("<Q", memoryview(payload.tensor.numpy()), 16, 0)
        assert not processed(processor.submit_deserialize, processor.query_deserialize_result, payload, back)
    finally:
        processor.close()


def processed(submit: object, query: object, src: object, dst: object) -> bool:
    """One task of LMCache's processor, waited for by its event."""
    import select

    assert callable(submit)
    assert callable(query)
    processor = submit.__self__  # type: ignore[attr-defined]
    task = submit([src], [dst], [None])
    serializes = "deserialize" not in submit.__name__  # type: ignore[attr-defined]
    fd = processor.get_serialize_event_fd() if serializes else processor.get_deserialize_event_fd()
    select.select([fd], [], [], 10.0)
    for _ in range(1000):
        if (done := query(task)) is not None:
            return bool(done)
        select.select([], [], [], 0.01)
    raise AssertionError("no answer within 10 s")


@pytest.mark.parametrize("options", [{"gruop": 64}, {"group": "64"}, {"group": 4}])
def test_a_mistake_in_its_options_stops_the_servers_start(options: dict[str, object]) -> None:
    server.register()
    with pytest.raises(ValueError, match="serde disagg_int8"):
        create_serde_processor(SerdeConfig(NAME, options))
