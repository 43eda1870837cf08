"""Whether a model's KV survives INT8, decided from its own KV.

INT8 has one scale a vector. Where a model's key channels carry a large constant (a bias of the key projection, say),
that constant sets the scale and the information, which is what *varies* from token to token, drowns in rounding.
Relative L2 error does not see it: the constant is in its denominator, too (it stays at 1.8 % while the KL divergence
of attention grows to 0.22). Hence the metric here, per (layer, side)::

    noise = max over heads( mean over channels( variance of the quantization error / variance over tokens ) )

For keys and queries of like distribution attention's KL divergence is about ``noise / 2``; plain Gaussian vectors of
128 channels have 4e-5. The constant is exactly what INT8C removes first.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from disagg_plugin.kv.codec import SectionCodec, round_to_bf16, row_scale

NOISE_LIMIT = 1e-3
"""Attention's KL divergence to the exact one stays at about half of it."""

# A call's cost is bounded: for 8 heads of 128 on one core 1,024 tokens take about 5 ms, 256 take 0.5 ms.
_TOKENS_PER_MEASUREMENT = 1024
_TOKENS_PER_SAMPLE = 256
_FEWEST_TOKENS = 8  # fewer do not tell a variance
_VARIANCE_FLOOR = 1e-2  # of the head's mean channel variance: a constant channel carries nothing to be lost
_TINY = 1e-30
_NEXT = {SectionCodec.INT8: SectionCodec.INT8C, SectionCodec.INT8C: SectionCodec.RAW}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is known about one (layer, side).

    Attributes:
        candidate: The codec that was not ruled out (yet); it is used if ``trusted``, RAW until then.
        trusted: Whether ``candidate`` was measured on enough tokens.
        noise: Of ``candidate``, over ``measured_tokens``; 0 if nothing was measured.
    """

    layer: int
    side: int
    candidate: SectionCodec
    trusted: bool
    noise: float
    measured_tokens: int


@dataclass(frozen=True, slots=True)
class Demotion:
    """``codec`` was ruled out for one (layer, side) by its ``noise``."""

    layer: int
    side: int
    codec: SectionCodec
    noise: float

    def __str__(self) -> str:
        what = "values" if self.side else "keys"
        return f"layer {self.layer} {what} without {self.codec.name.lower()} (noise {self.noise:.1e})"


@dataclass(slots=True)
class _Measured:
    """Of one candidate codec for one (layer, side)."""

    candidate: SectionCodec
    trusted: bool = False
    noise: float = 0.0  # mean over the tokens measured
    tokens: int = 0
    calls: int = 0  # since it is trusted


class QuantizationGuard:
    """Decides per (layer, side) which codec may be used, from real KV; no I/O.

    INT8, then INT8C, then RAW: a codec is used once it was measured on ``tokens_to_measure`` tokens, and ruled out for
    good when its noise is above ``limit``, then or in a later sample. Until a codec is trusted sections go RAW.

    Belongs to the thread that encodes. Sections of fewer than 8 tokens, and non-finite ones (which go RAW anyway), are
    not measured.
    """

    def __init__(
        self,
        *,
        layers: int,
        sides: int,
        wanted: SectionCodec,
        tokens_to_measure: int = 1024,
        limit: float = NOISE_LIMIT,
        sample_every: int = 100,
    ) -> None:
        """Knows nothing yet.

        Args:
            wanted: The best codec allowed; RAW measures nothing, ever.
            limit: Highest noise with which a codec may be used.
            sample_every: One in so many sections of a trusted (layer, side) is measured again.
        """
        self._sides = sides
        self._tokens_to_measure = tokens_to_measure
        self._limit = limit
        self._sample_every = sample_every
        # later samples of the (layer, side)s are due at different calls: no chunk pays for all of them
        self._measured = [
            _Measured(wanted, trusted=wanted is SectionCodec.RAW, calls=index) for index in range(layers * sides)
        ]
        self._demotions: list[Demotion] = []

    def choose(self, layer: int, side: int, kv: Tensor) -> SectionCodec:
        """The codec for this section; measures it first if that is due.

        Args:
            kv: ``[heads, tokens, head_dim]``, a float dtype, any strides. Read only.
        """
        state = self._measured[layer * self._sides + side]
        if state.candidate is SectionCodec.RAW:
            return SectionCodec.RAW
        if state.trusted:
            state.calls += 1
            if state.calls % self._sample_every == 0:
                self._sample(layer, side, state, kv)
        while not state.trusted and self._measure(layer, side, state, kv):
            pass  # this section ruled a candidate out; it may be enough to try the next one, too
        return state.candidate if state.trusted else SectionCodec.RAW

    def snapshot(self) -> tuple[Verdict, ...]:
        """Every (layer, side), in order."""
        return tuple(
            Verdict(*divmod(index, self._sides), state.candidate, state.trusted, state.noise, state.tokens)
            for index, state in enumerate(self._measured)
        )

    def take_demotions(self) -> list[Demotion]:
        """What was ruled out since the last call, each exactly once: to be logged and counted."""
        taken, self._demotions = self._demotions, []
        return taken

    def _measure(self, layer: int, side: int, state: _Measured, kv: Tensor) -> bool:
        """Add ``kv`` to what is known of the candidate; True if that ruled it out."""
        noise, tokens = measure_noise(kv, state.candidate, most_tokens=_TOKENS_PER_MEASUREMENT)
        if not tokens:
            return False
        state.noise = (state.noise * state.tokens + noise * tokens) / (state.tokens + tokens)
        state.tokens += tokens
        if state.tokens < self._tokens_to_measure:
            return False
        state.trusted = True
        if state.noise <= self._limit:
            return False
        self._demote(layer, side, state, state.noise)
        return True

    def _sample(self, layer: int, side: int, state: _Measured, kv: Tensor) -> None:
        noise, tokens = measure_noise(kv, state.candidate, most_tokens=_TOKENS_PER_SAMPLE)
        if tokens and noise > self._limit:
            self._demote(layer, side, state, noise)

    def _demote(self, layer: int, side: int, state: _Measured, noise: float) -> None:
        self._demotions.append(Demotion(layer, side, state.candidate, noise))
        state.candidate = _NEXT[state.candidate]
        state.trusted = state.candidate is SectionCodec.RAW
        state.noise, state.tokens = 0.0, 0


def measure_noise(kv: Tensor, codec: SectionCodec, *, most_tokens: int) -> tuple[float, int]:
    """``(noise, tokens)``: the module's metric for ``codec``, INT8 or INT8C, and how many tokens it was taken from.

    Looks at ``most_tokens`` at most, spread evenly. ``tokens`` is 0, and ``noise`` nothing, where there is no variance
    over tokens to be had: fewer than 8 of them, or non-finite values.

    Args:
        kv: ``[heads, tokens, head_dim]``.
    """
    if kv.shape[1] < _FEWEST_TOKENS:
        return 0.0, 0
    step = -(-kv.shape[1] // most_tokens)
    kv = kv[:, ::step].float()
    tokens = kv.shape[1]
    kv = kv / kv.abs().amax((1, 2), keepdim=True).clamp_(min=_TINY)  # squares neither overflow nor vanish
    mean = kv.mean(1, keepdim=True)
    variance = (kv - mean).square_().mean(1)  # [heads, head_dim]
    if codec is SectionCodec.INT8C:
        kv -= round_to_bf16(mean)
    scale, inverse = row_scale(kv.abs().amax(-1, keepdim=True))
    error_variance = (kv * inverse).round_().mul_(scale).sub_(kv).square_().mean(1)
    floor = variance.mean(-1, keepdim=True) * _VARIANCE_FLOOR + _TINY
    # 1 / variance of few samples is too large on average, for Gaussian ones by exactly this
    unbiased = (tokens - 3) / (tokens - 1)
    noise = float((error_variance / torch.maximum(variance, floor)).mean(-1).amax()) * unbiased
    return (noise, tokens) if math.isfinite(noise) else (0.0, 0)
