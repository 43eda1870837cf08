"""Workers are told apart by what was observed of them; nothing is observed twice or forgotten silently."""

import json

import pytest

from disagg_plugin.serving.latency import HERE, LatencyModel
from disagg_policies.snapshots import DecodeModel, Link, PrefillModel


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def prefill_s(new: int, cached: int, slowness: float = 1.0) -> float:
    return slowness * (0.012 + 1e-4 * new + 4e-9 * new * (cached + new / 2))


def test_before_any_sample_the_priors_count() -> None:
    model = LatencyModel(Clock())
    assert model.prefill("p0") == PrefillModel()
    assert model.decode() == DecodeModel()
    link = model.link("p0", wire_bytes_per_token=7.0)
    assert (link.setup_s, link.samples) == (Link().setup_s, 0)
    assert link.s_per_token == pytest.approx(Link(wire_bytes_per_token=7.0).s_per_token)


def test_a_worker_three_times_slower_is_told_apart_within_few_samples() -> None:
    model = LatencyModel(Clock())
    samples = [(900, 0), (2_500, 512), (300, 0), (4_000, 2_048), (1_200, 128), (600, 0)]
    for count, (new, cached) in enumerate(samples, start=1):
        model.saw_prefill("fast", new_tokens=new, cached_tokens=cached, seconds=prefill_s(new, cached))
        model.saw_prefill("slow", new_tokens=new, cached_tokens=cached, seconds=prefill_s(new, cached, 3.0))
        ratio = model.prefill("slow").seconds(2_000, 0) / model.prefill("fast").seconds(2_000, 0)
        assert ratio == pytest.approx(3.0, rel=0.05), count
    for worker, slowness in (("fast", 1.0), ("slow", 3.0)):
        for new, cached in ((500, 0), (1_000, 3_000), (6_000, 0)):
            predicted = model.prefill(worker).seconds(new, cached)
            assert predicted == pytest.approx(prefill_s(new, cached, slowness), rel=0.15)
    assert model.prefill("slow").samples == len(samples)


def test_tokens_behind_a_long_prefix_cost_more() -> None:
    model = LatencyModel(Clock())
    for new, cached in [(512, 0), (512, 8_000), (2_048, 0), (2_048, 30_000), (512, 16_000), (1_024, 60_000)] * 3:
        model.saw_prefill(HERE, new_tokens=new, cached_tokens=cached, seconds=prefill_s(new, cached))
    for new, cached in ((512, 0), (512, 30_000), (2_048, 60_000)):
        assert model.prefill(HERE).seconds(new, cached) == pytest.approx(prefill_s(new, cached), rel=0.05)


def test_a_decode_step_depends_on_batch_and_context() -> None:
    model = LatencyModel(Clock())

    def step_s(batch: int, context: int) -> float:
        return 0.02 + 3e-4 * batch + 5e-8 * context

    for number in range(60):
        batch = 1 + number * 7 % 32
        context = batch * (200 + number * 331 % 4_000)
        model.saw_decode_step(batch=batch, context_tokens=context, seconds=step_s(batch, context))
    for batch, context in ((1, 500), (16, 60_000), (64, 300_000)):
        assert model.decode().seconds(batch, context) == pytest.approx(step_s(batch, context), rel=0.05)


def test_a_transfer_depends_on_bytes() -> None:
    model = LatencyModel(Clock())
    for size in (100_000, 5_000_000, 40_000_000, 1_000_000, 16_000_000, 300_000, 9_000_000):
        model.saw_transfer("p0", wire_bytes=size, seconds=0.004 + size / 125e6)
    link = model.link("p0", wire_bytes_per_token=1_000.0)
    assert link.bytes_per_s == pytest.approx(125e6, rel=0.05)
    assert link.setup_s == pytest.approx(0.004, rel=0.2)
    assert (link.s_per_token, link.samples) == (pytest.approx(8e-6, rel=0.05), 7)


def test_transfers_that_are_all_setup_still_make_a_usable_link() -> None:
    model = LatencyModel(Clock())
    for size in (1, 10_000_000, 1, 20_000_000, 5, 40_000_000, 7):
        model.saw_transfer("p0", wire_bytes=size, seconds=0.004)
    link = model.link("p0", wire_bytes_per_token=1_000.0)
    assert 0 < link.bytes_per_s < float("inf")


def test_the_overhead_of_an_offload_is_learned_per_worker() -> None:
    model = LatencyModel(Clock())
    for _ in range(6):
        model.saw_overhead("near", seconds=0.003)
        model.saw_overhead("far", seconds=0.040)
    model.saw_overhead("near", seconds=-0.001)  # earlier than predicted: as good as nothing
    assert model.overhead_s("near") == pytest.approx(0.003, rel=0.1)
    assert model.overhead_s("far") == pytest.approx(0.040, rel=0.01)


def test_an_announced_speed_is_the_prior_until_the_first_sample() -> None:
    model = LatencyModel(Clock())
    model.announced("p0", tokens_per_s=20_000.0)
    assert model.prefill("p0").per_token_s == pytest.approx(1 / 20_000)
    model.saw_prefill("p0", new_tokens=1_000, cached_tokens=0, seconds=1.0)
    model.announced("p0", tokens_per_s=20_000.0)
    assert model.prefill("p0").seconds(1_000, 0) == pytest.approx(1.0)


def test_a_worker_that_restarted_is_forgotten() -> None:
    model = LatencyModel(Clock())
    for worker in ("p0", "p1"):
        model.saw_prefill(worker, new_tokens=1_000, cached_tokens=0, seconds=9.0)
        model.saw_transfer(worker, wire_bytes=1_000, seconds=9.0)
    model.forget("p0")
    assert model.prefill("p0") == PrefillModel()
    assert model.link("p0", wire_bytes_per_token=0.0).samples == 0
    assert model.prefill("p1").samples == 1


def test_the_snapshot_shows_errors_samples_and_ages() -> None:
    clock = Clock()
    model = LatencyModel(clock)
    for seconds in (1.0, 1.0, 1.0, 2.0):
        model.saw_prefill("p0", new_tokens=1_000, cached_tokens=0, seconds=seconds)
    model.saw_prefill("p0", new_tokens=1_000, cached_tokens=0, seconds=float("nan"))
    clock.now_s += 5.0
    snapshot = json.loads(json.dumps(model.snapshot(), allow_nan=False))
    shown = snapshot["prefill"]["p0"]
    assert (shown["samples"], shown["rejected"], shown["age_s"]) == (4, 1, 5.0)
    assert shown["error"] == pytest.approx(0.05)  # 0, 0, then 0.5 weighed by a tenth
    assert shown["error_p90"] == pytest.approx(0.5)
    assert snapshot["decode"]["here"]["age_s"] is None
    assert snapshot["decode"]["here"]["samples"] == 0
