"""Counts, inside the scheduler process, what admission wants to know: the queue by priority, decodes, speeds.

Fed by the connector's calls; a request goes through

    arrived ──▶ cached ──▶ computed ... computed ──▶ (decodes) ──▶ finished
                   └─────▶ landing ──▶ landed ──▶ computed ...

and any of these calls may be missing. No I/O; the clock is passed in; all calls from the scheduler's thread.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from disagg_plugin.admission.engine_state import MAX_WORKERS, RECENT, EngineState, request_mark
from disagg_policies.admission_snapshots import QueuedWork
from disagg_policies.snapshots import DecodeState, WorkerState

SMOOTHING = 0.1  # weight of the newest finished decode
DRAIN_WINDOW_S = 5.0
_TYPICAL_TOKENS = 1_000


@dataclass(slots=True)
class _Request:
    priority: int
    prompt_tokens: int
    computed_tokens: int = 0
    landing: bool = False
    first_token_s: float | None = None


class _Works:
    """Sums of prompts by priority."""

    def __init__(self) -> None:
        self._sums: dict[int, tuple[int, int]] = {}

    def add(self, priority: int, tokens: int) -> None:
        requests, so_far = self._sums.get(priority, (0, 0))
        self._sums[priority] = (requests + 1, so_far + tokens)

    def sorted(self) -> tuple[QueuedWork, ...]:
        return tuple(QueuedWork(priority, *self._sums[priority]) for priority in sorted(self._sums))


class EngineQueue:
    """The requests of one scheduler process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._requests: dict[str, _Request] = {}
        self._recent: deque[int] = deque(maxlen=RECENT)
        self._sequence = 0
        self._decode_lasts_s: float | None = None
        self._drained: deque[tuple[float, int]] = deque()
        self._waiting = 0  # requests without a first token
        self._waiting_since_s: float | None = None

    def arrived(self, request_id: str, prompt_tokens: int, priority: int = 0) -> None:
        """A request entered the engine's queue."""
        if request_id in self._requests:
            self.finished(request_id)
        self._requests[request_id] = _Request(priority, prompt_tokens)
        self._recent.append(request_mark(request_id))
        self._count(1)

    def cached(self, request_id: str, tokens: int) -> None:
        """So many leading tokens need not be computed."""
        if (request := self._requests.get(request_id)) is not None:
            request.computed_tokens = max(request.computed_tokens, min(tokens, request.prompt_tokens))

    def landing(self, request_id: str, landing: bool = True) -> None:
        """Its prompt is being prefilled elsewhere; or no more, and the rest is computed here."""
        if (request := self._requests.get(request_id)) is not None:
            request.landing = landing

    def computed(self, request_id: str, computed_tokens: int) -> None:
        """The step being built computes the request up to ``computed_tokens``."""
        request = self._requests.get(request_id)
        if request is None or request.first_token_s is not None:
            return
        request.landing = False
        upto = min(computed_tokens, request.prompt_tokens)
        now_s = self._clock()
        if upto > request.computed_tokens:
            self._drained.append((now_s, upto - request.computed_tokens))
            request.computed_tokens = upto
        if upto >= request.prompt_tokens:
            request.first_token_s = now_s
            self._count(-1)

    def preempted(self, request_id: str) -> None:
        """Its KV is lost: all of it is computed again."""
        if (request := self._requests.get(request_id)) is not None:
            if request.first_token_s is not None:
                self._count(1)
            request.computed_tokens, request.first_token_s = 0, None

    def finished(self, request_id: str) -> None:
        """The request left the engine, in whichever way."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return
        if request.first_token_s is None:
            self._count(-1)
            return
        lasted_s = self._clock() - request.first_token_s
        before = self._decode_lasts_s
        self._decode_lasts_s = lasted_s if before is None else before + SMOOTHING * (lasted_s - before)

    def state(
        self,
        decode: DecodeState = DecodeState(),  # noqa: B008 - frozen
        workers: Sequence[WorkerState] = (),
        *,
        reorders: bool = False,
        kv_capacity_tokens: int | None = None,
        max_running: int | None = None,
        draining: bool = False,
        decode_stall_s: float = 0.0,
    ) -> EngineState:
        """What is known now.

        Args:
            decode: Engine id, KV usage and models are taken from it; counts are replaced by those of here.
        """
        waiting, landing = _Works(), _Works()
        running = context = 0
        for request in self._requests.values():
            if request.first_token_s is not None:
                running += 1
                context += request.prompt_tokens
            elif request.landing:
                landing.add(request.priority, request.prompt_tokens)
            else:
                waiting.add(request.priority, request.prompt_tokens - request.computed_tokens)
        queued = waiting.sorted()
        self._sequence += 1
        best = sorted(
            (worker for worker in workers if worker.healthy),
            key=lambda w: w.queue_s + w.overhead_s + w.prefill.seconds(_TYPICAL_TOKENS, 0),
        )
        return EngineState(
            sequence=self._sequence,
            decode=replace(
                decode,
                running_decodes=running,
                decode_context_tokens=context,
                queued_requests=sum(work.requests for work in queued),
                queued_prefill_tokens=sum(work.tokens for work in queued),
            ),
            workers=tuple(best[:MAX_WORKERS]),
            queued=queued,
            landing=landing.sorted(),
            reorders=reorders,
            decode_lasts_s=self._decode_lasts_s,
            drain_tokens_per_s=self._drain_tokens_per_s(),
            kv_capacity_tokens=kv_capacity_tokens,
            max_running=max_running,
            recent=tuple(self._recent),
            draining=draining,
            decode_stall_s=decode_stall_s if running else 0.0,
        )

    def _count(self, change: int) -> None:
        self._waiting += change
        if self._waiting == 0:
            self._waiting_since_s = None
            self._drained.clear()
        elif self._waiting_since_s is None:
            self._waiting_since_s = self._clock()

    def _drain_tokens_per_s(self) -> float | None:
        """Over the last seconds, while something waited all the time; None before half a second of that."""
        if self._waiting_since_s is None:
            return None
        now_s = self._clock()
        while self._drained and self._drained[0][0] < now_s - DRAIN_WINDOW_S:
            self._drained.popleft()
        busy_s = min(now_s - self._waiting_since_s, DRAIN_WINDOW_S)
        return sum(tokens for _, tokens in self._drained) / busy_s if busy_s >= 0.5 else None
