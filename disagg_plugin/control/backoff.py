"""Whom to leave alone, and for how long: a worker that failed offloads. Pure; the clock is passed in.

    trusted ──failed──▶ waiting until t ──time──▶ may be probed ──asked──▶ probing ──succeeded──▶ trusted
                          ▲                                                  │ failed
                          └──────────────── twice as long ◀──────────────────┘

The first pause is short, each further one twice as long, up to a limit. The probe is the next real offload; while it is
under way nobody else is offered. Failures that come in while waiting are of offloads begun before, and say nothing new:
fifty prompts that a dying worker takes with it are one failure.
"""

from dataclasses import dataclass, replace

from disagg_policies.ties import seed

FIRST_S = 0.5
LONGEST_S = 30.0
JITTER = 0.25  # share; many decode engines must not probe at once
PROBE_LEASE_S = 60.0  # a probe that nobody reported back on counts as over


@dataclass(frozen=True, slots=True)
class Backoff:
    """One worker's state.

    Attributes:
        failures: In a row; 0: trusted.
        until_s: No offer before.
        probe_s: When the probe under way began, or None.
    """

    failures: int = 0
    until_s: float = 0.0
    probe_s: float | None = None

    def may_ask(self, now_s: float) -> bool:
        """Whether the next prompt may be offered to it."""
        if not self.failures:
            return True
        if now_s < self.until_s:
            return False
        return self.probe_s is None or now_s >= self.probe_s + PROBE_LEASE_S

    def asked(self, now_s: float) -> "Backoff":
        """A prompt is offered to it; if it is not trusted, that is the probe."""
        return replace(self, probe_s=now_s) if self.failures else self

    def failed(self, now_s: float, key: str) -> "Backoff":
        """An offload to it failed.

        Args:
            key: Of (decode engine, worker); spreads the pauses.
        """
        if self.failures and now_s < self.until_s:
            return self
        failures = self.failures + 1
        pause_s = min(FIRST_S * 2.0 ** min(failures - 1, 32), LONGEST_S)
        share = seed(key, str(failures)) / 2**64  # 0 to 1
        return Backoff(failures, now_s + pause_s * (1 - JITTER + 2 * JITTER * share))

    def undecided(self) -> "Backoff":
        """The probe ended without a verdict (its client left, or the queue was full): the next prompt may be one."""
        return replace(self, probe_s=None) if self.probe_s is not None else self

    def succeeded(self) -> "Backoff":
        """An offload to it went all the way; counts if a probe is under way."""
        return Backoff() if self.probe_s is not None else self
