"""The fit finds what is there, is not fooled by outliers, and notices changes."""

import math
import random
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_plugin.serving.robust_fit import RobustFit

PRIOR = (0.005, 1e-3, 2e-8)
TRUE = (0.02, 2e-4, 5e-9)


def row(tokens: int) -> tuple[float, ...]:
    return (1.0, float(tokens), tokens * tokens / 2)


def truth(tokens: int, coefficients: tuple[float, ...] = TRUE) -> float:
    return sum(c * x for c, x in zip(coefficients, row(tokens), strict=True))


def lengths(seed: int = 0) -> Iterator[int]:
    rng = random.Random(seed)
    while True:
        yield int(16 * 1_000 ** rng.random())  # from 16 to 16,000, as many short as long


def fitted(samples: int, *, noise: float = 0.0, outlier_every: int | None = None) -> RobustFit:
    fit, rng = RobustFit(PRIOR), random.Random(1)
    for number, tokens in zip(range(samples), lengths(), strict=False):
        y = truth(tokens) * (1 + noise * rng.uniform(-1, 1))
        if outlier_every and number % outlier_every == outlier_every - 1:
            y *= 20
        fit.observe(row(tokens), y)
    return fit


def worst(fit: RobustFit, coefficients: tuple[float, ...] = TRUE) -> float:
    return max(abs(fit.predict(row(n)) / truth(n, coefficients) - 1) for n in (100, 1_000, 4_000, 16_000))


def test_before_the_first_sample_it_says_its_priors() -> None:
    fit = RobustFit(PRIOR)
    assert fit.coefficients == PRIOR
    assert (fit.samples, fit.error, fit.error_quantile(0.9)) == (0, 0.0, 0.0)


def test_it_finds_exact_numbers() -> None:
    fit = fitted(50)
    assert fit.coefficients == pytest.approx(TRUE, rel=0.1)
    assert worst(fit) < 0.01
    assert fit.error < 0.01


def test_it_averages_noise() -> None:
    fit = fitted(200, noise=0.1)
    assert worst(fit) < 0.08
    assert 0.02 < fit.error < 0.1
    assert fit.error < fit.error_quantile(0.9) < 0.2


@pytest.mark.parametrize("outlier_every", [10, 20])
def test_outliers_of_twenty_times_hardly_move_it(outlier_every: int) -> None:
    assert worst(fitted(200, noise=0.05, outlier_every=outlier_every)) < 0.2


def test_a_cold_first_step_does_no_harm() -> None:
    fit = RobustFit(PRIOR)
    for number, tokens in zip(range(8), lengths(), strict=False):
        fit.observe(row(tokens), truth(tokens) * (50 if number == 0 else 1))
    assert abs(fit.predict(row(2_000)) / truth(2_000) - 1) < 0.25


def test_one_sample_is_enough_to_know_the_speed_at_that_length() -> None:
    fit = RobustFit(PRIOR)
    fit.observe(row(1_000), 30.0)
    assert fit.predict(row(1_000)) == pytest.approx(30.0)


def test_a_long_prompt_after_many_short_ones_is_news_and_no_outlier() -> None:
    fit = RobustFit(PRIOR)
    for _ in range(40):
        fit.observe(row(20), truth(20))
    assert fit.predict(row(8_000)) > 2 * truth(8_000)  # the prior's proportions
    fit.observe(row(8_000), truth(8_000))
    assert fit.predict(row(8_000)) == pytest.approx(truth(8_000), rel=0.05)
    assert fit.predict(row(20)) == pytest.approx(truth(20), rel=0.05)


@pytest.mark.parametrize("factor", [3.0, 1 / 3])
def test_a_changed_speed_is_learned_within_ten_samples(factor: float) -> None:
    fit = fitted(200, noise=0.05)
    changed = tuple(c * factor for c in TRUE)
    for tokens in (500, 3_000, 9_000, 700, 2_000, 12_000, 4_000, 100, 6_000, 1_500):
        fit.observe(row(tokens), truth(tokens, changed))
    assert worst(fit, changed) < 0.1
    assert fit.restarts == 1


@pytest.mark.parametrize(
    ("x", "y"),
    [
        pytest.param((1.0, 1.0, 1.0), 0.0, id="took no time"),
        pytest.param((1.0, 1.0, 1.0), -1.0, id="took negative time"),
        pytest.param((1.0, 1.0, 1.0), math.nan, id="took no number"),
        pytest.param((1.0, 1.0, 1.0), math.inf, id="never ended"),
        pytest.param((1.0, -5.0, 1.0), 1.0, id="negative work"),
        pytest.param((0.0, 0.0, 0.0), 1.0, id="no work"),
    ],
)
def test_nonsense_is_counted_and_ignored(x: tuple[float, ...], y: float) -> None:
    fit = RobustFit(PRIOR)
    fit.observe(x, y)
    assert (fit.samples, fit.rejected, fit.coefficients) == (0, 1, PRIOR)


@pytest.mark.parametrize("prior", [(), (0.0,), (1.0, -1.0), (1.0, math.inf), (1.0, 1.0, 1.0, 1.0)])
def test_a_prior_is_one_to_three_positive_numbers(prior: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="must be one to three positive numbers"):
        RobustFit(prior)


@given(st.lists(st.tuples(st.integers(1, 200_000), st.floats(1e-6, 1e4)), max_size=60))
def test_whatever_comes_coefficients_are_finite_and_not_negative(samples: list[tuple[int, float]]) -> None:
    fit = RobustFit(PRIOR)
    for tokens, seconds in samples:
        fit.observe(row(tokens), seconds)
        assert all(0 <= c < math.inf for c in fit.coefficients)
    assert fit.samples == len(samples)
    assert 0 <= fit.error <= 10
