"""What a prefill engine knows about its own load, counted from the scheduler's calls; engine-neutral."""

import time
from collections.abc import Callable
from dataclasses import dataclass

SMOOTHING = 0.2  # weight of the newest step in the measured prefill speed
PRIOR_TOKENS_PER_S = 1_000.0  # until the first prefill was measured


@dataclass(frozen=True, slots=True)
class Load:
    """A snapshot; see ``control.messages.LoadReport`` for the same on the wire."""

    queued_requests: int = 0
    queued_prefill_tokens: int = 0
    running_requests: int = 0
    prefill_tokens_per_s: float = PRIOR_TOKENS_PER_S

    @property
    def eta_s(self) -> float:
        """Seconds until a prompt that arrives now would start."""
        return self.queued_prefill_tokens / self.prefill_tokens_per_s


class LoadTracker:
    """Counts requests and prefill tokens; all calls from the scheduler's thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._prompt_tokens: dict[str, int] = {}
        self._remaining: dict[str, int] = {}  # prefill tokens left; absent once the prompt is computed
        self._queued: set[str] = set()
        self._speed = PRIOR_TOKENS_PER_S
        self._measured = False
        self._last_step: tuple[float, int] | None = None

    def arrived(self, request_id: str, prompt_tokens: int) -> None:
        """A request entered the engine's queue."""
        self._prompt_tokens[request_id] = prompt_tokens
        self._remaining[request_id] = prompt_tokens
        self._queued.add(request_id)

    def computed(self, request_id: str, computed_tokens: int) -> int:
        """The step being built computes the request up to ``computed_tokens``; returns the prefill tokens in that."""
        self._queued.discard(request_id)
        remaining = self._remaining.get(request_id)
        if remaining is None:
            return 0
        left = max(0, self._prompt_tokens[request_id] - computed_tokens)
        if left:
            self._remaining[request_id] = left
        else:
            del self._remaining[request_id]
        return max(0, remaining - left)

    def step_built(self, prefill_tokens: int) -> None:
        """A step that computes ``prefill_tokens`` was handed to the workers."""
        self._last_step = (self._clock(), prefill_tokens) if prefill_tokens else None

    def step_ended(self) -> None:
        """Its output came back: that measures the speed of a step that prefills."""
        if self._last_step is None:
            return
        started_s, tokens = self._last_step
        self._last_step = None
        if (elapsed_s := self._clock() - started_s) > 0:
            speed = tokens / elapsed_s
            self._speed = (1 - SMOOTHING) * self._speed + SMOOTHING * speed if self._measured else speed
            self._measured = True

    def finished(self, request_id: str) -> None:
        """A request left the engine."""
        self._prompt_tokens.pop(request_id, None)
        self._remaining.pop(request_id, None)
        self._queued.discard(request_id)

    def load(self) -> Load:
        """The snapshot to publish."""
        return Load(
            queued_requests=len(self._queued),
            queued_prefill_tokens=sum(self._remaining.values()),
            running_requests=len(self._prompt_tokens) - len(self._queued),
            prefill_tokens_per_s=self._speed,
        )
