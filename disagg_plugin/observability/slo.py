"""Whether requests met their service-level objectives, lately, per class and path: sliding windows in O(1) a request.

    tracker = SloTracker({"high": SloTarget(ttft_s=0.5, tpot_s=0.05)}, default_class="high")
    tracker.served(Served("high", "offloaded", ttft_s=0.31, tpot_s=0.04, e2e_s=2.9))
    tracker.refused("high")
    tracker.report()        # attainment, burn rates, quantiles

Memory is bounded by classes × paths, never by requests or time. Thread-safe: requests end on one thread, and the
report may be asked for on another.
"""

import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from datasketches import tdigest_double

PATHS = ("local", "offloaded", "fallback", "unknown")
Path = Literal["local", "offloaded", "fallback", "unknown"]
WHATS = ("ttft", "tpot", "e2e")
QUANTILES = (0.5, 0.9, 0.99)
WINDOWS_S: Mapping[str, float] = {"5m": 300.0, "1h": 3600.0}

_WINDOW_SLOTS = 30  # the resolution: a window's age differs from its name by at most one part in 30
_QUANTILE_SLOTS = 5
_DIGEST_K = 100  # t-digest compression: p99 within about 0.1 % of rank, 2 kB each

# positions in a window's counts
_MET, _MISSED, _REFUSED = range(3)


@dataclass(frozen=True, slots=True)
class SloTarget:
    """What one class promises; None promises nothing."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None


@dataclass(frozen=True, slots=True)
class Served:
    """One completed request.

    Attributes:
        path: Where its prompt was prefilled; ``fallback``: here, after an offload had failed.
        tpot_s: Mean time per output token after the first; None where there was only one.
    """

    slo_class: str
    path: Path
    ttft_s: float
    tpot_s: float | None
    e2e_s: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """How one request did; None: nothing was promised, or there was nothing to measure."""

    slo_class: str
    path: Path
    ttft: bool | None
    tpot: bool | None
    e2e: bool | None

    @property
    def met(self) -> bool:
        """Whether no promise was broken."""
        return False not in (self.ttft, self.tpot, self.e2e)


@dataclass(frozen=True, slots=True)
class WindowReport:
    """One class over one window.

    Attributes:
        attainment: Share of served requests that met all their SLOs; None: none was served.
        attainment_with_refused: The same with refused requests as misses.
        burn_rate: Share of misses over the share that the objective allows; 1 uses the budget up exactly.
        burn_rate_with_refused: The same with refused requests as misses.
    """

    served: int
    met: int
    refused: int
    attainment: float | None
    attainment_with_refused: float | None
    burn_rate: float | None
    burn_rate_with_refused: float | None


@dataclass(frozen=True, slots=True)
class ClassReport:
    """One class.

    Attributes:
        windows: By name: ``5m``, ``1h``.
        quantiles_s: Over the last 5 minutes: path → ttft, tpot, e2e → quantile → seconds.
    """

    target: SloTarget
    windows: Mapping[str, WindowReport]
    quantiles_s: Mapping[str, Mapping[str, Mapping[float, float]]]


class SlidingCounts:
    """A few counts over the last ``length_s`` seconds, in slots that are dropped whole."""

    def __init__(self, length_s: float, counts: int, *, slots: int = _WINDOW_SLOTS) -> None:
        self._slot_s = length_s / slots
        self._slots = [[0] * counts for _ in range(slots)]
        self._totals = [0] * counts
        self._newest: int | None = None

    def add(self, now_s: float, which: int) -> None:
        slot = self._advance(now_s)
        slot[which] += 1
        self._totals[which] += 1

    def totals(self, now_s: float) -> tuple[int, ...]:
        self._advance(now_s)
        return tuple(self._totals)

    def _advance(self, now_s: float) -> list[int]:
        """Empty the slots that are too old; the current one."""
        index, size = math.floor(now_s / self._slot_s), len(self._slots)
        newest = index if self._newest is None else self._newest
        for passed in range(max(newest + 1, index - size + 1), index + 1):
            slot = self._slots[passed % size]
            for which, count in enumerate(slot):
                self._totals[which] -= count
                slot[which] = 0
        self._newest = max(newest, index)  # a clock that steps back counts into the newest slot
        return self._slots[self._newest % size]


class SlidingQuantiles:
    """Quantiles over the last ``length_s`` seconds: one t-digest a slot, merged when somebody asks."""

    def __init__(self, length_s: float, *, slots: int = _QUANTILE_SLOTS) -> None:
        self._slot_s = length_s / slots
        self._digests: list[tdigest_double | None] = [None] * slots
        self._newest: int | None = None

    def add(self, now_s: float, value: float) -> None:
        position = self._advance(now_s)
        digest = self._digests[position]
        if digest is None:
            digest = self._digests[position] = tdigest_double(_DIGEST_K)
        digest.update(value)

    def quantiles(self, now_s: float) -> dict[float, float]:
        """Each of ``QUANTILES``; nothing while there is no value."""
        self._advance(now_s)
        held = [digest for digest in self._digests if digest is not None]
        if not held:
            return {}
        merged = tdigest_double(_DIGEST_K)
        for digest in held:
            merged.merge(digest)
        return {q: float(merged.get_quantile(q)) for q in QUANTILES}

    def _advance(self, now_s: float) -> int:
        index, size = math.floor(now_s / self._slot_s), len(self._digests)
        newest = index if self._newest is None else self._newest
        for passed in range(max(newest + 1, index - size + 1), index + 1):
            self._digests[passed % size] = None
        self._newest = max(newest, index)
        return self._newest % size


class SloTracker:
    """All classes of one engine front-end."""

    def __init__(
        self,
        targets: Mapping[str, SloTarget],
        *,
        default_class: str,
        objective: float = 0.95,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            default_class: Of requests whose class is not known or not in ``targets``; must be in ``targets``.
            objective: Share of requests that is meant to meet its SLOs; the rest is the error budget.
        """
        if default_class not in targets:
            raise ValueError(f"default class {default_class!r} is not among {', '.join(targets)}")
        self.targets = dict(targets)
        self.objective = objective
        self._default = default_class
        self._clock = clock
        self._lock = threading.Lock()
        self._windows = {
            name: {window: SlidingCounts(length_s, 3) for window, length_s in WINDOWS_S.items()} for name in targets
        }
        self._quantiles: dict[tuple[str, str, str], SlidingQuantiles] = {}  # classes × paths × three

    def class_of(self, name: str | None) -> str:
        """The class a request counts under."""
        return name if name is not None and name in self.targets else self._default

    def served(self, request: Served) -> Verdict:
        """Count one completed request."""
        name = self.class_of(request.slo_class)
        target = self.targets[name]
        verdict = Verdict(
            name,
            request.path,
            ttft=_within(request.ttft_s, target.ttft_s),
            tpot=_within(request.tpot_s, target.tpot_s),
            e2e=_within(request.e2e_s, target.e2e_s),
        )
        now_s = self._clock()
        with self._lock:
            for counts in self._windows[name].values():
                counts.add(now_s, _MET if verdict.met else _MISSED)
            for what, value in zip(WHATS, (request.ttft_s, request.tpot_s, request.e2e_s), strict=True):
                if value is not None:
                    self._digest(name, request.path, what).add(now_s, value)
        return verdict

    def failed(self, slo_class: str | None) -> str:
        """Count one request that ended in an error as a miss; the class it counted under."""
        return self._count(slo_class, _MISSED)

    def refused(self, slo_class: str | None) -> str:
        """Count one request that was turned away; the class it counted under."""
        return self._count(slo_class, _REFUSED)

    def report(self) -> dict[str, ClassReport]:
        """Every class, whether it had requests or not."""
        now_s = self._clock()
        with self._lock:
            return {name: self._class_report(name, now_s) for name in self.targets}

    def _count(self, slo_class: str | None, which: int) -> str:
        name, now_s = self.class_of(slo_class), self._clock()
        with self._lock:
            for counts in self._windows[name].values():
                counts.add(now_s, which)
        return name

    def _class_report(self, name: str, now_s: float) -> ClassReport:
        windows = {
            window: _window_report(counts.totals(now_s), 1 - self.objective)
            for window, counts in self._windows[name].items()
        }
        quantiles: dict[str, dict[str, dict[float, float]]] = {}
        for (slo_class, path, what), sliding in self._quantiles.items():
            if slo_class == name and (values := sliding.quantiles(now_s)):
                quantiles.setdefault(path, {})[what] = values
        return ClassReport(self.targets[name], windows, quantiles)

    def _digest(self, name: str, path: str, what: str) -> SlidingQuantiles:
        key = (name, path, what)
        digest = self._quantiles.get(key)
        if digest is None:
            digest = self._quantiles[key] = SlidingQuantiles(WINDOWS_S["5m"])
        return digest


def _within(value_s: float | None, limit_s: float | None) -> bool | None:
    return None if value_s is None or limit_s is None else value_s <= limit_s


def _window_report(totals: tuple[int, ...], budget: float) -> WindowReport:
    met, missed, refused = totals[_MET], totals[_MISSED], totals[_REFUSED]
    served, asked = met + missed, met + missed + refused
    return WindowReport(
        served=served,
        met=met,
        refused=refused,
        attainment=met / served if served else None,
        attainment_with_refused=met / asked if asked else None,
        burn_rate=missed / served / budget if served else None,
        burn_rate_with_refused=(missed + refused) / asked / budget if asked else None,
    )
