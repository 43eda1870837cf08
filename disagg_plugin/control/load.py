"""What an engine knows about its own load, counted from the scheduler's calls; engine-neutral."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from disagg_plugin.control.step_times import PRIOR_TOKENS_PER_S, PromptWork, StepTimes, StepWork
from disagg_plugin.serving.latency import HERE, LatencyModel
from disagg_policies.snapshots import PrefillModel

UNKNOWN_SPEED = PrefillModel()


@dataclass(frozen=True, slots=True)
class Load:
    """A snapshot; see ``control.messages.LoadReport`` for what of it travels.

    Attributes:
        running_decodes, decode_context_tokens: Requests past their prompt, and their contexts in all.
        by_priority: Of an engine that schedules by priority, the queued prefill tokens of each.
    """

    queued_requests: int = 0
    queued_prefill_tokens: int = 0
    running_requests: int = 0
    prefill_tokens_per_s: float = PRIOR_TOKENS_PER_S
    prefill: PrefillModel = UNKNOWN_SPEED
    running_decodes: int = 0
    decode_context_tokens: int = 0
    by_priority: tuple[tuple[int, int], ...] = ()

    @property
    def eta_s(self) -> float:
        """Seconds until a prompt that arrives now would start."""
        return self.queued_prefill_tokens / self.prefill_tokens_per_s


class LoadTracker:
    """Counts requests and prefill tokens, and learns the engine's own speed; all calls from the scheduler's thread.

    Attributes:
        model: What was learned; the engine is its worker ``HERE``.
        last_step: What the newest step computes.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, by_priority: bool = False) -> None:
        """
        Args:
            by_priority: The engine schedules by priority.
        """
        self.model = LatencyModel(clock)
        self.last_step = StepWork()
        self._times = StepTimes(self.model, clock)
        self._prompt_tokens: dict[str, int] = {}
        self._remaining: dict[str, int] = {}  # prefill tokens left; absent once the prompt is computed
        self._remaining_tokens = 0
        self._priorities: dict[str, int] | None = {} if by_priority else None
        self._by_priority: dict[int, int] = {}
        self._queued: set[str] = set()
        self._ended_since_step = 0

    @property
    def decode_stall_s(self) -> float:
        """Mean seconds by which prompts made recent decode steps longer."""
        return self._times.stall_s

    def arrived(self, request_id: str, prompt_tokens: int, cached_tokens: int = 0, priority: int = 0) -> None:
        """A request is to be computed here; ``cached_tokens`` of its prompt are already."""
        self._prompt_tokens[request_id] = prompt_tokens
        if self._priorities is not None and request_id not in self._remaining:
            self._priorities[request_id] = priority
        self._queued.add(request_id)
        self._set_remaining(request_id, max(0, prompt_tokens - cached_tokens))

    def computes(self, request_id: str, before: int, after: int) -> PromptWork | None:
        """The step being built computes tokens ``[before, after)`` of a request: its part of the prompt, or None.

        What comes after the prompt is a decode; so is all of a request that never arrived here.
        """
        self._queued.discard(request_id)
        prompt_tokens = self._prompt_tokens.get(request_id, 0)
        end = min(after, prompt_tokens)
        if end <= before:
            return None
        self._set_remaining(request_id, prompt_tokens - end)
        return PromptWork(request_id, end - before, before, done=end == prompt_tokens)

    def step_of(self, number: int, computed: Iterable[tuple[str, int, int]]) -> list[PromptWork]:
        """A step is handed to the workers; numbers grow.

        Args:
            computed: Each request in it, and the tokens ``[before, after)`` that the step computes of it.

        Returns:
            The parts of prompts in it.
        """
        works, prompts = [], []
        decodes = context_tokens = 0
        for request_id, before, after in computed:
            work = self.computes(request_id, before, after)
            if work is not None:
                works.append(work)
            if work is not None and work.new_tokens > 1:
                prompts.append(work)
            else:  # one token costs what a decode costs, also a prompt's last one behind KV that came from elsewhere
                decodes += 1
                context_tokens += after
        self.step_built(number, StepWork(tuple(prompts), decodes, context_tokens))
        return works

    def step_built(self, number: int, work: StepWork) -> None:
        """A step was handed to the workers; numbers grow."""
        self.last_step = work
        self._ended_since_step = 0
        self._times.built(number, work)

    def step_ended(self, number: int) -> None:
        """Its output came back."""
        self._times.ended(number)

    def preempted(self, request_id: str) -> None:
        """The engine took its blocks away; it waits again, with its whole prompt to compute."""
        if (prompt_tokens := self._prompt_tokens.get(request_id)) is not None:
            known = self._priorities.get(request_id, 0) if self._priorities is not None else 0
            self.arrived(request_id, prompt_tokens, priority=known)

    def finished(self, request_id: str) -> None:
        """A request left the engine, whether it had arrived here or its KV came from elsewhere."""
        self._ended_since_step += request_id not in self._queued
        self._prompt_tokens.pop(request_id, None)
        self._set_remaining(request_id, 0)
        self._queued.discard(request_id)
        if self._priorities is not None:
            self._priorities.pop(request_id, None)

    def load(self) -> Load:
        """The snapshot to publish."""
        step = self.last_step
        decodes = step.decodes + sum([p.done for p in step.prompts])
        context_tokens = step.decode_context_tokens + sum([p.cached_tokens + p.new_tokens for p in step.prompts])
        running = max(0, decodes - self._ended_since_step)
        return Load(
            queued_requests=len(self._queued),
            queued_prefill_tokens=self._remaining_tokens,
            running_requests=len(self._prompt_tokens) - len(self._queued),
            prefill_tokens_per_s=self._times.tokens_per_s,
            prefill=self.model.prefill(HERE),
            running_decodes=running,
            decode_context_tokens=context_tokens * running // decodes if decodes else 0,
            by_priority=tuple(sorted(self._by_priority.items())),
        )

    def _set_remaining(self, request_id: str, tokens: int) -> None:
        change = tokens - self._remaining.pop(request_id, 0)
        self._remaining_tokens += change
        if self._priorities is not None and change:
            priority = self._priorities.get(request_id, 0)
            left = self._by_priority.pop(priority, 0) + change
            if left > 0:
                self._by_priority[priority] = left
        if tokens:
            self._remaining[request_id] = tokens
