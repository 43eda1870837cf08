"""A linear model of at most three non-negative coefficients, fitted sample by sample; plain Python, no I/O.

``y = c1*x1 + c2*x2 + c3*x3``, recursive least squares with forgetting. What makes it robust:

- *Relative errors count*: a row is divided by its size, so that long prompts do not drown short ones.
- *Prior*: coefficients are multipliers of stated priors, with a weak pull to them. The first samples set one common
  multiplier (their median), so three times slower is seen at once, and a cold first step harms little.
- *Outliers*: a residual beyond ``CLIP`` deviations counts only as much as one at the limit (Huber). The deviation
  includes how little is known in that direction: the first long prompt after many short ones is news, not an outlier.
- *Change*: ``PATIENCE`` such residuals in a row on the same side are no outliers: the fit begins anew with them.
"""

import math
import statistics
from collections import deque
from collections.abc import Sequence

FORGETTING = 0.98  # per sample: a memory of about fifty
PULL = 1e-4  # weight of the prior, in samples
CLIP = 3.0
PATIENCE = 5
WARM_UP = 5  # samples that only set the common multiplier
LEAST_DEVIATION = 0.02  # relative; nothing on a real machine repeats better
SMOOTHING = 0.1  # weight of the newest sample in errors and deviations
WORST_ERROR = 10.0  # a single error counts at most as this
RECENT_ERRORS = 64

Row = tuple[float, ...]


class RobustFit:
    """One model; all calls from one thread.

    Attributes:
        samples: Accepted observations.
        rejected: Observations that were no positive finite numbers.
        restarts: How often the fit began anew.
        error: Mean relative error of predictions made before each sample was learned, recent ones first; 0 before
            there are any.
    """

    def __init__(self, prior: Row) -> None:
        if not 1 <= len(prior) <= 3 or not all(0 < p < math.inf for p in prior):
            raise ValueError(f"prior {prior}: must be one to three positive numbers")
        self._prior = prior
        self.samples = 0
        self.rejected = 0
        self.restarts = 0
        self.error = 0.0
        self._errors: deque[float] = deque(maxlen=RECENT_ERRORS)
        self._deviation = 0.1
        self._solution: Row | None = prior
        self._begin(prior)

    @property
    def coefficients(self) -> Row:
        """The fitted numbers, in the order of the prior."""
        if self._solution is None:
            multipliers = _solve_non_negative(self._matrix, self._target)
            self._solution = tuple([b * m for b, m in zip(self._base, multipliers, strict=True)])
        return self._solution

    def predict(self, x: Row) -> float:
        """The model at ``x``."""
        return sum([c * v for c, v in zip(self.coefficients, x, strict=True)])

    def error_quantile(self, share: float) -> float:
        """Relative error that ``share`` of the recent predictions stayed below."""
        ordered = sorted(self._errors)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0

    def observe(self, x: Row, y: float) -> None:
        """Learn that ``x`` took ``y``."""
        if not (0 < y < math.inf and all(0 <= v < math.inf for v in x) and any(x)):
            self.rejected += 1
            return
        predicted = self.predict(x)
        if self.samples:
            self._track(abs(predicted - y) / y)
        self.samples += 1
        if len(self._early) < WARM_UP:
            self._warm_up(x, y)
        else:
            self._learn(x, y, predicted)

    def _begin(self, base: Row) -> None:
        self._base = base
        size = len(base)
        self._matrix = [[PULL if i == j else 0.0 for j in range(size)] for i in range(size)]
        self._target = [PULL] * size
        self._solution = base
        self._early: list[tuple[Row, float]] = []
        self._suspects: list[tuple[Row, float]] = []

    def _warm_up(self, x: Row, y: float) -> None:
        self._early.append((x, y))
        ratios = [seen / sum([b * v for b, v in zip(self._base, row, strict=True)]) for row, seen in self._early]
        multiplier = statistics.median_low(ratios)  # low: what disturbs a measurement makes it longer
        scaled = self._solution = tuple([b * multiplier for b in self._base])
        if len(self._early) == WARM_UP:
            early = self._early
            self._begin(scaled)
            self._early = early
            for row, seen in early:
                self._learn(row, seen, self.predict(row), judge=False)

    def _learn(self, x: Row, y: float, predicted: float, *, judge: bool = True) -> None:
        size = max(y, predicted)
        row = [b * v / size for b, v in zip(self._base, x, strict=True)]
        residual = (y - predicted) / size
        known = _solve(self._matrix, row)
        leverage = sum([a * b for a, b in zip(row, known, strict=True)])
        limit = CLIP * max(self._deviation, LEAST_DEVIATION) * math.sqrt(1.0 + leverage)
        magnitude = abs(residual)
        weight = 1.0 if magnitude <= limit else limit / magnitude
        if judge and self._is_change(x, y, residual, clipped=weight < 1.0):
            return
        self._deviation += SMOOTHING * (min(magnitude, limit) - self._deviation)
        for i, a in enumerate(row):
            line = self._matrix[i]
            for j, b in enumerate(row):
                line[j] = FORGETTING * line[j] + weight * a * b
            line[i] += (1.0 - FORGETTING) * PULL  # the pull to the prior is not forgotten
            self._target[i] = FORGETTING * self._target[i] + (1.0 - FORGETTING) * PULL + weight * a * y / size
        self._solution = None

    def _is_change(self, x: Row, y: float, residual: float, *, clipped: bool) -> bool:
        """Whether the world changed: then the fit began anew with the suspects."""
        if not clipped:
            self._suspects.clear()
            return False
        if self._suspects and (self._suspects[-1][1] > self.predict(self._suspects[-1][0])) != (residual > 0):
            self._suspects.clear()
        self._suspects.append((x, y))
        if len(self._suspects) < PATIENCE:
            return False
        suspects = self._suspects
        self.restarts += 1
        self._begin(tuple([max(c, p * 1e-6) for c, p in zip(self.coefficients, self._prior, strict=True)]))
        for row, seen in suspects:
            self._warm_up(row, seen)
        return True

    def _track(self, error: float) -> None:
        error = min(error, WORST_ERROR)
        self.error = error if not self._errors else self.error + SMOOTHING * (error - self.error)
        self._errors.append(error)


def _solve(matrix: Sequence[Sequence[float]], target: Sequence[float]) -> list[float]:
    """Gaussian elimination without pivoting: the matrices are positive definite."""
    size = len(target)
    rows = [[*line, t] for line, t in zip(matrix, target, strict=True)]
    for i in range(size):
        pivot = rows[i]
        for j in range(i + 1, size):
            line = rows[j]
            factor = line[i] / pivot[i]
            for k in range(i, size + 1):
                line[k] -= factor * pivot[k]
    for i in range(size - 1, -1, -1):
        line = rows[i]
        value = line[size]
        for j in range(i + 1, size):
            value -= line[j] * rows[j][size]
        line[size] = value / line[i]
    return [line[size] for line in rows]


def _solve_non_negative(matrix: Sequence[Sequence[float]], target: Sequence[float]) -> list[float]:
    """The same, where coefficients that would be negative are 0 and the others make up for them."""
    active = list(range(len(target)))
    while active:
        found = _solve([[matrix[i][j] for j in active] for i in active], [target[i] for i in active])
        if min(found) >= 0.0:
            solution = [0.0] * len(target)
            for i, value in zip(active, found, strict=True):
                solution[i] = value
            return solution
        active = [i for i, value in zip(active, found, strict=True) if value >= 0.0]
    return [0.0] * len(target)
