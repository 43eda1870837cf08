"""A prefill worker's load report as a decode engine believes it: numbers that make no sense never get further. Pure."""

import math
from dataclasses import dataclass, replace

from disagg_plugin.control.messages import LoadReport, PrefillSpeed
from disagg_policies.snapshots import DEFAULT_TOKENS_PER_S, PrefillModel

MOST_REQUESTS = 1 << 24
MOST_TOKENS = 1 << 40
MOST_PRIORITIES = 64
SLOWEST_TOKENS_PER_S, FASTEST_TOKENS_PER_S = 1e-3, 1e9
LONGEST_S = 1e4  # of a prefill model's fixed part; more is a broken clock

ENOUGH_SAMPLES = 5  # until then a fit is one number, and its first samples are a cold process's
UNKNOWN_SPEED = PrefillModel()


@dataclass(frozen=True, slots=True)
class ReceivedLoad:
    """The fields of ``disagg_policies.snapshots.WorkerState`` that the worker itself tells.

    Attributes:
        prefill: Its own model; with 0 samples it has measured nothing yet.
    """

    queued_requests: int = 0
    queued_prefill_tokens: int = 0
    running_requests: int = 0
    kv_usage: float = 0.0
    prefill_tokens_per_s: float = DEFAULT_TOKENS_PER_S
    prefill: PrefillModel = UNKNOWN_SPEED
    by_priority: tuple[tuple[int, int], ...] = ()
    draining: bool = False

    def updated(self, report: LoadReport) -> "ReceivedLoad":
        """The newest values, each the last good one where the report's makes no sense."""
        speed = report.prefill_tokens_per_s
        return ReceivedLoad(
            queued_requests=min(max(report.queued_requests, 0), MOST_REQUESTS),
            queued_prefill_tokens=min(max(report.queued_prefill_tokens, 0), MOST_TOKENS),
            running_requests=min(max(report.running_requests, 0), MOST_REQUESTS),
            kv_usage=min(max(report.kv_usage, 0.0), 1.0) if math.isfinite(report.kv_usage) else self.kv_usage,
            prefill_tokens_per_s=(
                speed if SLOWEST_TOKENS_PER_S <= speed <= FASTEST_TOKENS_PER_S else self.prefill_tokens_per_s
            ),
            prefill=_model(report.prefill) or self.prefill,
            by_priority=tuple([(p, min(max(t, 0), MOST_TOKENS)) for p, t in report.by_priority[:MOST_PRIORITIES]]),
            draining=report.draining,
        )

    def assuming(self, prefill: PrefillModel | None) -> "ReceivedLoad":
        """With somebody's model in place of one that rests on next to nothing; queues then drain at that speed too.

        A process's first prefills are slow, and a worker that is judged by them is never asked again.
        """
        if prefill is None or self.prefill.samples >= ENOUGH_SAMPLES or prefill.per_token_s <= 0:
            return self
        return replace(self, prefill=replace(prefill, samples=0), prefill_tokens_per_s=1 / prefill.per_token_s)


def sane_eta_s(eta_s: float) -> float:
    """What a worker promises, in seconds; nonsense counts as "not soon"."""
    return min(max(eta_s, 0.0), LONGEST_S) if math.isfinite(eta_s) else LONGEST_S


def _model(speed: PrefillSpeed | None) -> PrefillModel | None:
    if speed is None:
        return None
    values = (speed.base_s, speed.per_token_s, speed.per_pair_s)
    if not all(0 <= value <= LONGEST_S for value in values) or not any(values):  # NaN too
        return None
    error = speed.error if 0 <= speed.error < math.inf else 0.0
    return PrefillModel(*values, samples=max(speed.samples, 0), error=error)
