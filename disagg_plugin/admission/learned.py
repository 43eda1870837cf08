"""What is learned about requests: per route, bytes per token and the cached share; per priority, how much arrives."""

import math
from collections import deque

BYTES_PER_TOKEN_PRIOR = 4.0
RECENT = 128
RATE_OVER_S = 5.0
REFRESH = 8  # new samples until the quantile is taken anew


class RecentQuantile:
    """A quantile of the most recent samples; the prior counts until there are some."""

    def __init__(self, prior: float, share: float = 0.9) -> None:
        self._share = share
        self._samples: deque[float] = deque(maxlen=RECENT)
        self._new = 0
        self.value = prior

    def observe(self, sample: float) -> None:
        """One more."""
        self._samples.append(sample)
        self._new += 1
        if self._new >= REFRESH or len(self._samples) < REFRESH:
            self._new = 0
            ordered = sorted(self._samples)
            self.value = ordered[min(len(ordered) - 1, int(self._share * len(ordered)))]


class Route:
    """One path of the API, such as ``/v1/chat/completions``.

    Both quantiles are optimistic: nine of ten requests are no shorter, and no more of them is cached. So what is
    refused by them would have been refused by the exact numbers, nine times of ten.
    """

    def __init__(self) -> None:
        self._bytes_per_token = RecentQuantile(BYTES_PER_TOKEN_PRIOR)
        self._cached_share = RecentQuantile(0.0)

    def prompt_tokens(self, text_bytes: int) -> int:
        """Estimated from the length of the body."""
        return max(1, int(text_bytes / self._bytes_per_token.value))

    def cached_tokens(self, prompt_tokens: int) -> int:
        """What is probably cached of it, at best."""
        return min(prompt_tokens - 1, int(prompt_tokens * self._cached_share.value)) if prompt_tokens > 1 else 0

    def saw_length(self, text_bytes: int, prompt_tokens: int) -> None:
        """A body of this length turned out to be a prompt of so many tokens."""
        if text_bytes > 0 and prompt_tokens > 0:
            self._bytes_per_token.observe(text_bytes / prompt_tokens)

    def saw_cached(self, prompt_tokens: int, cached_tokens: int) -> None:
        """So much of a prompt was cached."""
        if prompt_tokens > 0:
            self._cached_share.observe(min(1.0, max(0.0, cached_tokens / prompt_tokens)))

    def describe(self) -> dict[str, float]:
        """For the debug view."""
        return {"bytes_per_token": self._bytes_per_token.value, "cached_share": self._cached_share.value}


class ArrivalRates:
    """Prompt tokens per second by priority; what is ``RATE_OVER_S`` old counts 1/e."""

    def __init__(self) -> None:
        self._sums: dict[int, tuple[float, float]] = {}  # tokens, as of when

    def saw(self, priority: int, tokens: int, now_s: float) -> None:
        """A request was admitted."""
        self._sums[priority] = (self._tokens(priority, now_s) + tokens, now_s)

    def rates(self, now_s: float) -> tuple[tuple[int, float], ...]:
        """``(priority, tokens per second)``."""
        return tuple([(priority, self._tokens(priority, now_s) / RATE_OVER_S) for priority in self._sums])

    def _tokens(self, priority: int, now_s: float) -> float:
        tokens, as_of_s = self._sums.get(priority, (0.0, now_s))
        return tokens * math.exp((as_of_s - now_s) / RATE_OVER_S)
