"""A token-weighted fair share per tenant within one class, by virtual counters as in VTC (arXiv 2401.00588).

Each tenant's counter grows by the tokens that were admitted for it. Under pressure, whoever is more than
``burst_tokens`` ahead of the furthest behind who also wants to be served now, is refused until they are even. Nobody is
refused without pressure, nor who is alone. Idle time earns nothing: whoever comes back starts level with the others.
"""

ACTIVE_S = 5.0  # a tenant that asked this recently wants to be served
PRESSURE = 0.7  # share of the SLO that is used up, from which there is something to share
_FORGET_S = 600.0


class FairShare:
    """Of one class; all calls from one thread, the time is an argument."""

    def __init__(self, burst_tokens: int) -> None:
        self._burst_tokens = burst_tokens
        self._counters: dict[str, float] = {}
        self._asked_s: dict[str, float] = {}

    def overused(self, tenant: str, now_s: float, pressure: float) -> bool:
        """``tenant`` asks: whether others of the class come first."""
        rivals = [
            self._counters[name]
            for name, asked_s in self._asked_s.items()
            if name != tenant and now_s - asked_s <= ACTIVE_S
        ]
        asked_s = self._asked_s.get(tenant)
        if asked_s is None or now_s - asked_s > ACTIVE_S:
            self._counters[tenant] = max(self._counters.get(tenant, 0.0), min(rivals, default=0.0))
        self._asked_s[tenant] = now_s
        if len(self._asked_s) > 1024:
            self._forget(now_s)
        if pressure < PRESSURE or not rivals:
            return False
        return self._counters[tenant] - min(rivals) > self._burst_tokens

    def charge(self, tenant: str, tokens: float) -> None:
        """``tokens`` were admitted for it (or, negative, were not used after all).

        A lead is not kept beyond twice the burst: what was served while there was room for all is not held against
        anybody for long.
        """
        mine = self._counters[tenant] = max(0.0, self._counters.get(tenant, 0.0) + tokens)
        floor = mine - 2 * self._burst_tokens
        for name, counter in self._counters.items():
            if counter < floor:
                self._counters[name] = floor

    def counters(self) -> dict[str, float]:
        """For the debug view."""
        return dict(self._counters)

    def _forget(self, now_s: float) -> None:
        for name in [name for name, asked_s in self._asked_s.items() if now_s - asked_s > _FORGET_S]:
            del self._asked_s[name]
            del self._counters[name]
