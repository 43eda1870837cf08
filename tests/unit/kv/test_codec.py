"""What goes through the codec comes back within its bound, in exactly the bytes that were promised, compiled once."""

import logging
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from disagg_plugin.errors import CodecError, ConfigError
from disagg_plugin.kv.codec import KVCodec, SectionCodec, section_bytes

RAW, INT8, INT8C = SectionCodec.RAW, SectionCodec.INT8, SectionCodec.INT8C
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
QUANTIZED = [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8]
LOST = 1.5e-36  # vectors below this decode to zeros


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def eager(dtype: torch.dtype, head_dim: int = 16) -> KVCodec:
    return KVCodec(head_dim=head_dim, dtype=dtype, compile=False)


def encoded(codec: KVCodec, kv: Tensor, wanted: SectionCodec) -> tuple[SectionCodec, Tensor]:
    """The codec really used and exactly the section's bytes, taken from a longer, dirty buffer."""
    heads, tokens, head_dim = kv.shape
    out = torch.full((kv.numel() * kv.itemsize + 8,), 0xA5, dtype=torch.uint8)
    used = codec.encode(kv, wanted, out)
    return used, out[: section_bytes(used, heads=heads, tokens=tokens, head_dim=head_dim, dtype=name(kv.dtype))]


def parts(payload: Tensor, heads: int, tokens: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """(q, scale, mean) as the module's docstring lays them out, in float64; mean of INT8 is 0."""
    vectors = heads * tokens
    q = payload[: vectors * head_dim].clone().view(torch.int8).view(heads, tokens, head_dim)
    rest = payload[vectors * head_dim :].clone().view(torch.bfloat16)
    mean = rest[vectors:].view(-1, 1, head_dim) if rest.numel() > vectors else torch.zeros(1)
    return q.double(), rest[:vectors].view(heads, tokens, 1).double(), mean.double()


def decoded(codec: KVCodec, payload: Tensor, used: SectionCodec, kv: Tensor) -> Tensor:
    return codec.decode(payload, used, heads=kv.shape[0], tokens=kv.shape[1], wire_dtype=kv.dtype)


@pytest.fixture(scope="module")
def compiled() -> Iterator[dict[torch.dtype, KVCodec]]:
    """One warm codec per dtype; their head dims differ, so that they cannot share code by mistake."""
    codecs = {
        dtype: KVCodec(head_dim=head_dim, dtype=dtype, compile=True)
        for dtype, head_dim in zip(FLOATS, (64, 128, 80), strict=True)
    }
    threads = torch.get_num_threads()
    for codec in codecs.values():
        assert codec.warm_up(encode=True, decode=True) > 0
        assert codec.compiled
    yield codecs
    torch.set_num_threads(threads)


# --- bound ------------------------------------------------------------------------------------------------------------


@st.composite
def sections(draw: st.DrawFn) -> Tensor:
    """Gaussian KV around an offset, at any magnitude that its dtype holds, with a different one per vector."""
    dtype = draw(st.sampled_from(FLOATS))
    heads, tokens = draw(st.tuples(st.integers(1, 3), st.integers(1, 9)))
    low, high = (-7, 3) if dtype is torch.float16 else (-40, 37)
    exponent = draw(st.floats(low, high))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    kv = torch.randn(heads, tokens, 16, generator=generator, dtype=torch.float64) + draw(st.sampled_from([0, 1, 8]))
    spread = torch.rand(heads, tokens, 1, generator=generator, dtype=torch.float64) * draw(st.sampled_from([0, 4]))
    return (kv * 10.0 ** (exponent - spread)).to(dtype)


@settings(max_examples=150, deadline=None)
@given(kv=sections(), wanted=st.sampled_from([INT8, INT8C]))
def test_every_number_is_off_by_half_a_scale_at_most(kv: Tensor, wanted: SectionCodec) -> None:
    codec = eager(kv.dtype)
    used, payload = encoded(codec, kv, wanted)
    back = decoded(codec, payload, used, kv)
    assert back.dtype == kv.dtype
    assert back.isfinite().all()
    if used is RAW:
        assert wanted is INT8C  # not smaller than RAW
        assert torch.equal(back, kv)
        return
    q, scale, mean = parts(payload, *kv.shape)
    exact, wide = kv.double(), torch.finfo(torch.float32).eps
    size = exact.abs() + mean.abs()
    assert ((exact - mean - q * scale).abs() <= scale * 0.5001 + size * 2 * wide + LOST).all()
    amax = (exact - mean).abs().amax(-1, keepdim=True)
    assert (scale <= amax / 127 * (1 + 2**-8 + 1e-6)).all()
    step = torch.finfo(kv.dtype)
    assert ((back.double() - (q * scale + mean)).abs() <= size * 1.01 * step.eps + step.smallest_normal).all()


def test_no_scale_rounds_so_far_down_that_127_overflows() -> None:
    mantissas = 1 + torch.arange(2**16) / 2**16
    kv = torch.stack([mantissas, -mantissas], -1).unsqueeze(0)
    used, payload = encoded(eager(torch.float32, 2), kv, INT8)
    assert used is INT8
    q, _, _ = parts(payload, *kv.shape)
    assert q.amax() == 127
    assert q.amin() == -127
    assert (q[..., 0] == -q[..., 1]).all()


@pytest.mark.parametrize("wanted", [INT8, INT8C], ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", FLOATS, ids=name)
def test_zeros_come_back_as_exact_zeros_beside_ordinary_vectors(dtype: torch.dtype, wanted: SectionCodec) -> None:
    kv = torch.zeros(2, 6, 16, dtype=dtype)
    if wanted is INT8:
        kv[1, 3] = 1.5
    used, payload = encoded(eager(dtype), kv, wanted)
    assert used is wanted
    back = decoded(eager(dtype), payload, used, kv)
    assert torch.equal(back == 0, kv == 0)


@pytest.mark.parametrize("magnitude", [1e-45, 1e-40, 1e-38, 1.4e-36])
def test_a_vector_too_small_for_a_scale_decodes_to_zeros(magnitude: float) -> None:
    kv = torch.full((1, 2, 16), magnitude)
    used, payload = encoded(eager(torch.float32), kv, INT8)
    assert used is INT8
    assert torch.equal(decoded(eager(torch.float32), payload, used, kv), torch.zeros_like(kv))


def test_int8c_sends_the_mean_once_and_restores_a_channel_far_from_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    kv = torch.randn(2, 64, 16, generator=generator)
    kv[..., 5] += 300
    codec = eager(torch.float32)
    errors = {}
    for wanted in (INT8, INT8C):
        used, payload = encoded(codec, kv, wanted)
        assert used is wanted
        errors[wanted] = (decoded(codec, payload, used, kv) - kv).abs().amax().item()
    _, _, mean = parts(payload, *kv.shape)
    assert torch.equal(mean.squeeze(1), kv.mean(1).bfloat16().double())
    assert errors[INT8] > 1  # one channel's offset drowns the others
    assert errors[INT8C] < 0.03


# --- what goes RAW ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("wanted", [INT8, INT8C], ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", FLOATS, ids=name)
@pytest.mark.parametrize("warm", [False, True], ids=["eager", "compiled"])
def test_one_non_finite_number_sends_the_section_raw(
    dtype: torch.dtype, wanted: SectionCodec, bad: float, warm: bool, compiled: dict[torch.dtype, KVCodec]
) -> None:
    codec = compiled[dtype] if warm else eager(dtype)
    kv = torch.randn(2, 5, codec.head_dim).to(dtype)
    kv[1, 4, 3] = bad
    used, payload = encoded(codec, kv, wanted)
    assert used is RAW
    assert torch.equal(payload, kv.view(-1).view(torch.uint8))


def test_a_nan_of_all_ones_is_seen() -> None:
    kv = torch.randn(1, 4, 16)
    kv.view(torch.int32)[0, 2, 7] = 0x7FFFFFFF
    assert encoded(eager(torch.float32), kv, INT8)[0] is RAW


@pytest.mark.parametrize("wanted", [INT8, INT8C], ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", FLOATS, ids=name)
def test_the_largest_finite_numbers_do_not_become_infinite(dtype: torch.dtype, wanted: SectionCodec) -> None:
    for fraction in (1.0, 0.995, 0.99, 0.98, 0.7, 0.4):
        kv = torch.zeros(1, 4, 16, dtype=dtype)
        kv[0, ::2, 2] = torch.finfo(dtype).max * fraction
        used, payload = encoded(eager(dtype), kv, wanted)
        assert decoded(eager(dtype), payload, used, kv).isfinite().all()
        assert used is (RAW if fraction > 127 / 128 else wanted) or wanted is INT8C


@pytest.mark.parametrize(("tokens", "used"), [(1, RAW), (2, RAW), (3, INT8C)])
def test_int8c_is_not_used_where_it_saves_nothing(tokens: int, used: SectionCodec) -> None:
    assert encoded(eager(torch.bfloat16), torch.randn(2, tokens, 16).bfloat16(), INT8C)[0] is used


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head_dim", "dtype", "most"),
    [(64, "bfloat16", 0.52), (64, "float16", 0.52), (128, "bfloat16", 0.51), (64, "float32", 0.27)],
)
def test_int8_is_two_bytes_a_vector_more_than_its_numbers(head_dim: int, dtype: str, most: float) -> None:
    shape = {"heads": 3, "tokens": 7, "head_dim": head_dim}
    size = section_bytes(INT8, **shape, dtype=dtype)
    assert size == 3 * 7 * (head_dim + 2)
    assert size <= most * section_bytes(RAW, **shape, dtype=dtype)
    assert section_bytes(INT8C, **shape, dtype=dtype) == size + 3 * head_dim * 2


@pytest.mark.parametrize("wanted", list(SectionCodec), ids=lambda c: c.name)
def test_a_section_is_written_to_its_last_byte_and_not_beyond_raw_size(wanted: SectionCodec) -> None:
    kv = torch.randn(2, 5, 16)
    raw = kv.numel() * 4
    written = []
    for filler in (0x00, 0xFF):
        out = torch.full((raw + 16,), filler, dtype=torch.uint8)
        assert eager(torch.float32).encode(kv, wanted, out) is wanted
        assert (out[raw:] == filler).all()
        written.append(out[: section_bytes(wanted, heads=2, tokens=5, head_dim=16, dtype="float32")])
    assert torch.equal(*written)


@pytest.mark.parametrize("codec", list(SectionCodec), ids=lambda c: c.name)
@pytest.mark.parametrize("difference", [-1, 1])
def test_a_payload_of_another_size_is_refused(codec: SectionCodec, difference: int) -> None:
    size = section_bytes(codec, heads=2, tokens=5, head_dim=16, dtype="bfloat16")
    payload = torch.zeros(size + difference, dtype=torch.uint8)
    with pytest.raises(CodecError, match=f"{codec.name} section of 2 heads x 5 tokens is {size} bytes, got"):
        eager(torch.bfloat16).decode(payload, codec, heads=2, tokens=5, wire_dtype=torch.bfloat16)


def test_a_buffer_that_is_too_short_is_a_bug_of_the_caller() -> None:
    with pytest.raises(ValueError, match="out must be at least 64"):
        eager(torch.bfloat16).encode(torch.zeros(1, 2, 16).bfloat16(), INT8, torch.zeros(63, dtype=torch.uint8))


# --- dtypes, strides, buffers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", list(SectionCodec), ids=lambda c: c.name)
@pytest.mark.parametrize("to", FLOATS, ids=lambda d: f"to-{name(d)}")
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: f"from-{name(d)}")
def test_sender_and_receiver_may_differ_in_float_dtype(
    dtype: torch.dtype, to: torch.dtype, wanted: SectionCodec
) -> None:
    kv = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    used, payload = encoded(eager(dtype), kv, wanted)
    assert used is wanted
    back = decoded(eager(to), payload, used, kv)
    assert back.dtype == to
    tolerance = 0 if wanted is RAW else 0.5 * 1.01 * kv.float().abs().amax().item() * 2 / 127
    assert torch.allclose(back.float(), kv.float(), rtol=torch.finfo(to).eps, atol=tolerance)


@pytest.mark.parametrize("dtype", QUANTIZED, ids=name)
def test_a_quantized_cache_travels_raw_to_an_equal_one_only(dtype: torch.dtype) -> None:
    kv = torch.arange(2 * 3 * 16, dtype=torch.uint8).view(2, 3, 16).view(dtype)
    codec = eager(dtype)
    used, payload = encoded(codec, kv, RAW)
    assert torch.equal(decoded(codec, payload, used, kv).view(torch.uint8), kv.view(torch.uint8))
    with pytest.raises(CodecError, match="quantized already"):
        encoded(codec, kv, INT8)
    with pytest.raises(CodecError, match="quantized already"):
        codec.decode(torch.zeros(108, dtype=torch.uint8), INT8, heads=2, tokens=3, wire_dtype=dtype)
    for other in {torch.bfloat16, *QUANTIZED} - {dtype}:
        with pytest.raises(CodecError, match=f"a {name(dtype)} cache cannot be read as {name(other)}"):
            eager(other).decode(payload, RAW, heads=2, tokens=3, wire_dtype=dtype)


def test_a_cache_that_cannot_be_sent_is_a_wrong_deployment() -> None:
    with pytest.raises(ConfigError, match="float64 cannot be sent"):
        eager(torch.float64)
    with pytest.raises(ConfigError, match="head_dim must be even, got 63"):
        eager(torch.bfloat16, 63)


@pytest.mark.parametrize("wanted", list(SectionCodec), ids=lambda c: c.name)
def test_a_strided_view_is_encoded_as_its_contiguous_copy(wanted: SectionCodec) -> None:
    codec = eager(torch.bfloat16)
    for tokens in (9, 4):  # the kept buffer is longer than the second one
        view = torch.randn(tokens, 3, 2, 16).bfloat16()[:, :, 1].transpose(0, 1)
        assert not view.is_contiguous()
        assert torch.equal(encoded(codec, view, wanted)[1], encoded(codec, view.contiguous(), wanted)[1])


@pytest.mark.parametrize("wanted", list(SectionCodec), ids=lambda c: c.name)
@pytest.mark.parametrize("offset", [2, 6, 64])
def test_a_section_may_begin_at_any_even_byte_of_a_chunk(wanted: SectionCodec, offset: int) -> None:
    codec = eager(torch.float32)
    kv = torch.randn(2, 5, 16)
    used, alone = encoded(codec, kv, wanted)
    chunk = torch.zeros(1024, dtype=torch.uint8)
    codec.encode(kv, wanted, chunk[offset:])
    there = chunk[offset : offset + alone.numel()]
    assert torch.equal(there, alone)
    out = torch.empty_like(kv)
    assert codec.decode(there, used, heads=2, tokens=5, wire_dtype=torch.float32, out=out).data_ptr() == out.data_ptr()
    assert torch.equal(out, decoded(codec, alone, used, kv))


# --- compilation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inference", [False, True], ids=["grad-mode", "inference-mode"])
def test_nothing_is_compiled_again_whatever_heads_tokens_mode_or_threads(
    compiled: dict[torch.dtype, KVCodec], inference: bool
) -> None:
    from torch._dynamo.utils import counters

    graphs = counters["stats"]["unique_graphs"]
    assert graphs >= 15  # 5 kernels for each of 3 caches: the counter counts
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with torch.inference_mode(inference), torch.compiler.set_stance("fail_on_recompile"):
            for codec in compiled.values():
                for heads in (1, 3, 8):
                    for tokens in (1, 2, 15, 16, 17, 4096 // heads):
                        kv = torch.ones(heads, tokens, codec.head_dim, dtype=codec.dtype)
                        for wanted in (INT8, INT8C):
                            used, payload = encoded(codec, kv, wanted)
                            assert torch.allclose(decoded(codec, payload, used, kv), kv, atol=0.01)
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("dtype", FLOATS, ids=name)
@pytest.mark.parametrize("tokens", [1, 2, 17, 256])
def test_compiled_and_eager_differ_by_one_in_q_at_most(
    compiled: dict[torch.dtype, KVCodec], dtype: torch.dtype, tokens: int
) -> None:
    fast = compiled[dtype]
    slow = eager(dtype, fast.head_dim)
    kv = torch.randn(3, tokens, fast.head_dim, generator=torch.Generator().manual_seed(2)).to(dtype)
    (used, ours), (expected, theirs) = encoded(fast, kv, INT8), encoded(slow, kv, INT8)
    assert used is expected is INT8
    (q, scale, _), (q_eager, scale_eager, _) = parts(ours, *kv.shape), parts(theirs, *kv.shape)
    assert (q - q_eager).abs().amax() <= 1
    assert ((q - q_eager) != 0).double().mean() < 1e-3
    assert torch.equal(scale, scale_eager)
    assert torch.allclose(
        decoded(fast, theirs, INT8, kv).float(), decoded(slow, theirs, INT8, kv).float(), rtol=2**-7, atol=0
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=name)
def test_compiled_int8c_uses_the_mean_that_it_sends(compiled: dict[torch.dtype, KVCodec], dtype: torch.dtype) -> None:
    codec = compiled[dtype]
    kv = (torch.randn(3, 33, codec.head_dim, generator=torch.Generator().manual_seed(3)) + 20).to(dtype)
    used, payload = encoded(codec, kv, INT8C)
    assert used is INT8C
    q, scale, mean = parts(payload, *kv.shape)
    assert ((kv.double() - mean - q * scale).abs() <= scale * 0.5001 + 1e-5).all()
    expected = (q * scale + mean).to(dtype).float()
    assert torch.allclose(decoded(codec, payload, used, kv).float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_without_a_cxx_compiler_it_warns_once_and_stays_eager(caplog: pytest.LogCaptureFixture) -> None:
    import torch._inductor.config as inductor_config

    codec = KVCodec(head_dim=6, dtype=torch.bfloat16, compile=True)
    no_compiler = {"cpp.cxx": ("/nonexistent/g++",), "force_disable_caches": True}
    with inductor_config.patch(no_compiler), caplog.at_level(logging.WARNING, "disagg_plugin.kv.codec"):
        codec.warm_up(encode=True, decode=True)
    assert [r.getMessage().split(":")[0] for r in caplog.records if r.name == "disagg_plugin.kv.codec"] == [
        "KV codec runs uncompiled, about 5 x slower"
    ]
    assert not codec.compiled
    kv = torch.randn(2, 5, 6).bfloat16()
    assert torch.equal(encoded(codec, kv, INT8)[1], encoded(eager(torch.bfloat16, 6), kv, INT8)[1])


@pytest.mark.parametrize(
    ("dtype", "compile_"), [(torch.bfloat16, False), (torch.uint8, True)], ids=["off", "quantized"]
)
def test_warming_up_does_nothing_where_nothing_is_to_be_compiled(dtype: torch.dtype, compile_: bool) -> None:
    codec = KVCodec(head_dim=16, dtype=dtype, compile=compile_)
    assert codec.warm_up(encode=True, decode=True) == 0.0
    assert not codec.compiled
