"""The guard lets INT8 through where attention survives it, and only there."""

import pytest
import torch
from torch import Tensor

from disagg_plugin.kv.codec import KVCodec, SectionCodec, section_bytes
from disagg_plugin.kv.guard import NOISE_LIMIT, Demotion, QuantizationGuard, Verdict, measure_noise

RAW, INT8, INT8C = SectionCodec.RAW, SectionCodec.INT8, SectionCodec.INT8C
KEYS, VALUES = 0, 1
HEAD_DIM = 128


def gaussian(tokens: int = 512, *, seed: int = 0, heads: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(heads, tokens, HEAD_DIM, generator=torch.Generator().manual_seed(seed)).to(dtype)


def biased(tokens: int = 512, *, seed: int = 0, sigmas: float = 300, dtype: torch.dtype = torch.float32) -> Tensor:
    """Keys with two channels far from zero, of one head, as a biased key projection makes them."""
    kv = gaussian(tokens, seed=seed)
    kv[1, :, 3] += sigmas
    kv[1, :, 77] -= sigmas
    return kv.to(dtype)


def heavy(tokens: int = 512, *, seed: int = 0) -> Tensor:
    """Keys whose channel *varies* 300 times as much as the others: no mean to remove."""
    kv = gaussian(tokens, seed=seed)
    kv[0, :, 9] *= 300
    return kv


def guard(wanted: SectionCodec = INT8, *, tokens: int = 512, sample_every: int = 100) -> QuantizationGuard:
    return QuantizationGuard(
        layers=2, sides=2, wanted=wanted, tokens_to_measure=tokens, limit=NOISE_LIMIT, sample_every=sample_every
    )


def attention_kl(keys: Tensor, codec: SectionCodec) -> float:
    """KL divergence of attention over ``keys`` to attention over what the codec makes of them; worst head."""
    heads, tokens, head_dim = keys.shape
    kv_codec = KVCodec(head_dim=head_dim, dtype=keys.dtype, compile=False)
    out = torch.empty(keys.numel() * keys.itemsize, dtype=torch.uint8)
    assert kv_codec.encode(keys, codec, out) is codec
    dtype = str(keys.dtype).removeprefix("torch.")
    size = section_bytes(codec, heads=heads, tokens=tokens, head_dim=head_dim, dtype=dtype)
    back = kv_codec.decode(out[:size], codec, heads=heads, tokens=tokens, wire_dtype=keys.dtype)
    queries = gaussian(256, seed=99, heads=heads).double()
    exact, ours = (
        torch.log_softmax(queries @ k.double().transpose(1, 2) / head_dim**0.5, dim=-1) for k in (keys, back)
    )
    return float((exact.exp() * (exact - ours)).sum(-1).mean(-1).amax())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_biased_keys_come_through_with_the_codec_that_the_guard_chooses_and_not_with_int8(dtype: torch.dtype) -> None:
    keys = biased(dtype=dtype)
    chosen = guard().choose(0, KEYS, keys)
    assert chosen is INT8C
    assert attention_kl(keys, chosen) <= 1e-3
    assert attention_kl(keys, INT8) > 1e-2  # so this test can fail


def test_ordinary_keys_keep_int8() -> None:
    keys = gaussian()
    assert guard().choose(0, KEYS, keys) is INT8
    assert attention_kl(keys, INT8) <= 1e-4


def test_keys_that_neither_codec_can_carry_go_raw() -> None:
    it = guard()
    assert it.choose(0, KEYS, heavy()) is RAW
    assert [d.codec for d in it.take_demotions()] == [INT8, INT8C]
    assert it.choose(0, KEYS, gaussian()) is RAW  # for good


@pytest.mark.parametrize("sigmas", [10, 100, 300])
def test_the_metric_is_twice_the_divergence_that_it_stands_for(sigmas: float) -> None:
    keys = biased(1024, sigmas=sigmas)
    noise, tokens = measure_noise(keys, INT8, most_tokens=1024)
    assert tokens == 1024
    assert attention_kl(keys, INT8) == pytest.approx(noise / 2, rel=0.3)


def test_every_section_is_raw_until_enough_tokens_of_its_own_layer_and_side_were_measured() -> None:
    it = guard(tokens=100)
    assert [it.choose(0, KEYS, gaussian(40)) for _ in range(3)] == [RAW, RAW, INT8]
    assert it.choose(0, VALUES, gaussian(40)) is RAW
    assert it.choose(1, KEYS, gaussian(40)) is RAW
    assert it.choose(0, KEYS, gaussian(40)) is INT8


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_sections_too_short_for_a_variance_teach_nothing_but_may_use_what_is_known(tokens: int) -> None:
    it = guard(tokens=8)
    assert {it.choose(0, KEYS, gaussian(tokens)) for _ in range(20)} == {RAW}
    assert it.choose(0, KEYS, gaussian(8)) is INT8
    assert it.choose(0, KEYS, gaussian(tokens)) is INT8


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_sections_teach_nothing(bad: float) -> None:
    it = guard()
    kv = gaussian()
    kv[0, 5, 7] = bad
    assert it.choose(0, KEYS, kv) is RAW
    assert it.snapshot()[0].measured_tokens == 0
    assert it.take_demotions() == []


def test_wanting_raw_measures_nothing() -> None:
    it = guard(RAW)
    assert {it.choose(0, KEYS, heavy()) for _ in range(3)} == {RAW}
    assert it.snapshot()[0] == Verdict(0, KEYS, RAW, trusted=True, noise=0.0, measured_tokens=0)
    assert it.take_demotions() == []


def test_wanting_int8c_begins_there() -> None:
    assert guard(INT8C).choose(0, KEYS, gaussian()) is INT8C
    assert guard(INT8C).choose(0, KEYS, biased()) is INT8C
    assert guard(INT8C).choose(0, KEYS, heavy()) is RAW


def test_a_later_sample_steps_down_once_and_never_up() -> None:
    it = guard(sample_every=10)
    it.choose(0, KEYS, gaussian())
    answers = [it.choose(0, KEYS, biased()) for _ in range(10)]
    assert answers == [INT8] * 9 + [INT8C]
    assert {it.choose(0, KEYS, gaussian()) for _ in range(30)} == {INT8C}
    (demotion,) = it.take_demotions()
    assert demotion == Demotion(0, KEYS, INT8, demotion.noise)
    assert demotion.noise > NOISE_LIMIT
    assert it.take_demotions() == []


def test_after_a_step_down_it_is_raw_until_the_next_codec_was_measured_too() -> None:
    it = guard(tokens=512, sample_every=1)
    it.choose(0, KEYS, gaussian())
    assert [it.choose(0, KEYS, biased(256)) for _ in range(2)] == [RAW, INT8C]


def test_samples_of_the_layers_are_due_at_different_calls() -> None:
    it = guard(sample_every=4)
    for layer, side in ((0, 0), (0, 1), (1, 0), (1, 1)):
        it.choose(layer, side, gaussian())
    demoted = []
    for _ in range(4):
        for layer, side in ((0, 0), (0, 1), (1, 0), (1, 1)):
            it.choose(layer, side, biased())
        demoted.append([(d.layer, d.side) for d in it.take_demotions()])
    assert demoted == [[(1, 1)], [(1, 0)], [(0, 1)], [(0, 0)]]


def test_the_snapshot_names_every_layer_and_side_in_order() -> None:
    it = guard()
    it.choose(1, VALUES, gaussian())
    snapshot = it.snapshot()
    assert [(v.layer, v.side) for v in snapshot] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [v.trusted for v in snapshot] == [False, False, False, True]
    assert snapshot[3].candidate is INT8
    assert snapshot[3].measured_tokens == 512
    assert 2e-5 < snapshot[3].noise < 1e-4


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_the_metric_does_not_depend_on_magnitude(scale: float) -> None:
    expected, _ = measure_noise(biased(), INT8, most_tokens=512)
    assert measure_noise(biased() * scale, INT8, most_tokens=512) == (pytest.approx(expected, rel=0.05), 512)


@pytest.mark.parametrize("tokens", [8, 16, 64, 512])
def test_short_sections_measure_what_long_ones_do(tokens: int) -> None:
    noises = [measure_noise(gaussian(tokens, seed=seed), INT8, most_tokens=512)[0] for seed in range(8)]
    assert sum(noises) / len(noises) == pytest.approx(4.3e-5, rel=0.4)


def test_a_constant_channel_carries_nothing_that_could_be_lost() -> None:
    keys = gaussian()
    keys[..., 5] = 1.0
    keys[..., 64:] = 0.0
    assert guard().choose(0, KEYS, keys) is INT8
    assert guard().choose(0, KEYS, torch.zeros(2, 512, HEAD_DIM)) is INT8


def test_the_cost_of_a_call_is_bounded_whatever_the_section() -> None:
    assert measure_noise(gaussian(1000), INT8, most_tokens=256)[1] == 250
    assert measure_noise(gaussian(1000), INT8, most_tokens=1024)[1] == 1000
