"""How long things take, learned from what was observed; engine-neutral, no I/O, the clock is passed in.

    prefill       base_s + per_token_s * new + per_pair_s * new * (cached + new / 2)     one model a worker
    decode step   base_s + per_request_s * batch + per_context_token_s * context         this engine's
    transfer      setup_s + bytes / bytes_per_s                                          one model a worker
    overhead      what an offload costs beyond all that                                  one number a worker

The frozen models in ``disagg_policies.snapshots`` are what comes out; their defaults are the priors, which count until
the first sample. The engine itself is the worker ``HERE``. How the fit resists outliers and notices changes stands in
``robust_fit``.
"""

from collections.abc import Callable

from disagg_plugin.serving.robust_fit import RobustFit
from disagg_policies.snapshots import DecodeModel, Link, PrefillModel

HERE = ""
OVERHEAD_PRIOR_S = 0.005


class LatencyModel:
    """Everything that one engine learned about speeds; all calls from one thread, ``snapshot`` from any.

    The ``seconds`` of a sample are time on the machine, not in a queue: a prefill from the start of its first step to
    the end of its last, a transfer as long as bytes were waiting for the wire.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        prefill_prior: PrefillModel = PrefillModel(),  # noqa: B008 - frozen
        decode_prior: DecodeModel = DecodeModel(),  # noqa: B008
        link_prior: Link = Link(),  # noqa: B008
    ) -> None:
        self._clock = clock
        self._prefill_prior = prefill_prior
        self._link_prior = link_prior
        self._prefills: dict[str, RobustFit] = {}
        self._links: dict[str, RobustFit] = {}
        self._overheads: dict[str, RobustFit] = {}
        self._decode = RobustFit((decode_prior.base_s, decode_prior.per_request_s, decode_prior.per_context_token_s))
        self._sampled_s: dict[tuple[str, str], float] = {}

    # -- what was observed --------------------------------------------------------------------------------------

    def saw_prefill(self, worker: str, *, new_tokens: int, cached_tokens: int, seconds: float) -> None:
        """``worker`` computed ``new_tokens`` behind ``cached_tokens``."""
        pairs = new_tokens * (cached_tokens + new_tokens / 2)
        self.saw_prefill_step(worker, new_tokens=new_tokens, pairs=pairs, seconds=seconds)

    def saw_prefill_step(self, worker: str, *, new_tokens: int, pairs: float, seconds: float) -> None:
        """The same for several prompts at once: the model is linear, so their tokens and pairs add up."""
        self._prefill_fit(worker).observe((1.0, float(new_tokens), pairs), seconds)
        self._sampled_s["prefill", worker] = self._clock()

    def saw_decode_step(self, *, batch: int, context_tokens: int, seconds: float) -> None:
        """A step of this engine that computed no prompt."""
        self._decode.observe((1.0, float(batch), float(context_tokens)), seconds)
        self._sampled_s["decode", HERE] = self._clock()

    def saw_transfer(self, worker: str, *, wire_bytes: int, seconds: float) -> None:
        """``wire_bytes`` came from ``worker``."""
        self._link_fit(worker).observe((1.0, float(wire_bytes)), seconds)
        self._sampled_s["transfer", worker] = self._clock()

    def saw_overhead(self, worker: str, *, seconds: float) -> None:
        """An offload to ``worker`` took so much longer than its queue, prefill and transfer; at least a microsecond."""
        self._overhead_fit(worker).observe((1.0,), max(seconds, 1e-6))
        self._sampled_s["overhead", worker] = self._clock()

    def announced(self, worker: str, *, tokens_per_s: float) -> None:
        """The worker says how fast it prefills: a better prior than none, until the first sample."""
        if self._prefill_fit(worker).samples == 0 and tokens_per_s > 0:
            prior = self._prefill_prior
            scale = 1 / (tokens_per_s * prior.per_token_s)
            self._prefills[worker] = RobustFit(
                (prior.base_s * scale, prior.per_token_s * scale, prior.per_pair_s * scale)
            )

    def forget(self, worker: str) -> None:
        """The worker is gone, or another process now."""
        for fits in (self._prefills, self._links, self._overheads):
            fits.pop(worker, None)
        for key in [key for key in self._sampled_s if key[1] == worker and key[0] != "decode"]:
            del self._sampled_s[key]

    # -- what the policies are given ----------------------------------------------------------------------------

    def prefill(self, worker: str) -> PrefillModel:
        """Prefill seconds on ``worker``."""
        fit = self._prefill_fit(worker)
        base_s, per_token_s, per_pair_s = fit.coefficients
        return PrefillModel(base_s, per_token_s, per_pair_s, fit.samples, fit.error)

    def decode(self) -> DecodeModel:
        """Decode step seconds of this engine."""
        base_s, per_request_s, per_context_token_s = self._decode.coefficients
        fit = self._decode
        return DecodeModel(base_s, per_request_s, per_context_token_s, fit.samples, fit.error)

    def link(self, worker: str, *, wire_bytes_per_token: float) -> Link:
        """Transfer seconds from ``worker``; a link that seems to cost nothing a byte is as fast as 1 PB/s."""
        fit = self._link_fit(worker)
        setup_s, s_per_byte = fit.coefficients
        return Link(1 / max(s_per_byte, 1e-15), setup_s, wire_bytes_per_token, fit.samples, fit.error)

    def overhead_s(self, worker: str) -> float:
        """What an offload to ``worker`` costs beside queue, prefill and bytes."""
        return self._overhead_fit(worker).coefficients[0]

    def errors(self) -> dict[str, dict[str, float]]:
        """Mean relative error of each model that has samples, by kind and worker (``here``: this engine)."""
        kinds = {"prefill": self._prefills, "transfer": self._links, "overhead": self._overheads}
        found = {
            kind: {worker or "here": fit.error for worker, fit in dict(fits).items() if fit.samples}
            for kind, fits in kinds.items()
        }
        return found | {"decode": {"here": self._decode.error} if self._decode.samples else {}}

    def snapshot(self) -> dict[str, object]:
        """The debug view: coefficients, samples, errors and the age of the newest sample, by kind and worker."""
        kinds = {
            "prefill": (dict(self._prefills), ("base_s", "per_token_s", "per_pair_s")),
            "transfer": (dict(self._links), ("setup_s", "s_per_byte")),
            "overhead": (dict(self._overheads), ("seconds",)),
            "decode": ({HERE: self._decode}, ("base_s", "per_request_s", "per_context_token_s")),
        }
        return {
            kind: {worker or "here": self._describe(kind, worker, fit, names) for worker, fit in fits.items()}
            for kind, (fits, names) in kinds.items()
        }

    def _describe(self, kind: str, worker: str, fit: RobustFit, names: tuple[str, ...]) -> dict[str, object]:
        sampled_s = self._sampled_s.get((kind, worker))
        return {
            **dict(zip(names, fit.coefficients, strict=True)),
            "samples": fit.samples,
            "rejected": fit.rejected,
            "restarts": fit.restarts,
            "error": fit.error,
            "error_p90": fit.error_quantile(0.9),
            "age_s": None if sampled_s is None else self._clock() - sampled_s,
        }

    def _prefill_fit(self, worker: str) -> RobustFit:
        if (fit := self._prefills.get(worker)) is None:
            prior = self._prefill_prior
            fit = self._prefills[worker] = RobustFit((prior.base_s, prior.per_token_s, prior.per_pair_s))
        return fit

    def _link_fit(self, worker: str) -> RobustFit:
        if (fit := self._links.get(worker)) is None:
            fit = self._links[worker] = RobustFit((self._link_prior.setup_s, 1 / self._link_prior.bytes_per_s))
        return fit

    def _overhead_fit(self, worker: str) -> RobustFit:
        if (fit := self._overheads.get(worker)) is None:
            fit = self._overheads[worker] = RobustFit((OVERHEAD_PRIOR_S,))
        return fit
