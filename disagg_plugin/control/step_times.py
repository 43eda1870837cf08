"""How long an engine's steps take, told to its latency model; engine-neutral, for whoever drives a scheduler.

    built(number, work)     a step was handed to the workers
    ended(number)           its output came back

Engines overlap steps: the next one is built while the last one runs. A step's time is therefore from when it was
built, or from when the step before it ended, whichever is later, until it ended.

What becomes of a step:

- *Decodes only*: a sample of the decode model.
- *One prompt*: steps that compute one and the same prompt, one after another, are one sample of the prefill model, so
  that a prompt in three chunks is a prefill, not three.
- *Several prompts*: one sample of their tokens and (token, token before) pairs together; the model is linear in both.
- *Prompts beside decodes*: what the decode model says its decodes add (not its fixed part: the step has one anyway) is
  taken off first. Where that is most of the step, it says nothing about prefills and is left out. What the step took
  longer than one of its decodes alone, is what its prompts stalled them.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from disagg_plugin.serving.latency import HERE, LatencyModel

STEPS_IN_FLIGHT = 64  # of which the output has not come; an engine that never tells must not fill memory
RECENT_STEPS = 32  # that prefill; the recent speed is their median
PRIOR_TOKENS_PER_S = 1_000.0  # until the first prefill was measured
STALL_WINDOW_S = 5.0


@dataclass(frozen=True, slots=True)
class PromptWork:
    """One prompt's part in a step: ``new_tokens`` behind ``cached_tokens``; ``done``: it is computed then."""

    request_id: str
    new_tokens: int
    cached_tokens: int
    done: bool


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a step computes.

    Attributes:
        prompts: Those with at least one prompt token in it.
        decodes: Requests that only get their next token.
        decode_context_tokens: Their contexts in all.
    """

    prompts: tuple[PromptWork, ...] = ()
    decodes: int = 0
    decode_context_tokens: int = 0


@dataclass(slots=True)
class _Lone:
    """Steps so far that computed one prompt and no other."""

    request_id: str
    cached_tokens: int
    new_tokens: int
    seconds: float


class StepTimes:
    """Feeds one engine's :class:`LatencyModel` (as ``HERE``); all calls from the scheduler's thread.

    Attributes:
        tokens_per_s: Prompt tokens a second of recent steps that prefill: the median over their tokens, so that
            neither a cold first step nor many small ones make the engine look slow.
    """

    def __init__(self, model: LatencyModel, clock: Callable[[], float]) -> None:
        self._model = model
        self._clock = clock
        self._open: deque[tuple[int, float, StepWork]] = deque(maxlen=STEPS_IN_FLIGHT)
        self._ended_s = float("-inf")
        self._lone: _Lone | None = None
        self._speeds: deque[tuple[float, int]] = deque(maxlen=RECENT_STEPS)  # tokens a second, tokens
        self.tokens_per_s = PRIOR_TOKENS_PER_S
        self._stalls: deque[tuple[float, float]] = deque()  # when, seconds; of every step with decodes
        self._stalled_s = 0.0

    @property
    def stall_s(self) -> float:
        """Mean seconds by which prompts made recent steps with decodes longer."""
        self._forget_stalls()
        return max(0.0, self._stalled_s) / len(self._stalls) if self._stalls else 0.0

    def built(self, number: int, work: StepWork) -> None:
        """Step ``number`` was handed to the workers; numbers grow."""
        self._open.append((number, self._clock(), work))

    def ended(self, number: int) -> None:
        """Its output came back; steps before it that nobody told of are forgotten."""
        now_s = self._clock()
        while self._open and self._open[0][0] <= number:
            found, built_s, work = self._open.popleft()
            if found == number:
                self._learn(work, now_s - max(built_s, self._ended_s))
        self._ended_s = now_s

    def _learn(self, work: StepWork, seconds: float) -> None:
        if seconds <= 0:
            return
        if work.decodes:
            self._count_stall(work, seconds)
        if not work.prompts:
            self._end_lone()
            if work.decodes:
                self._model.saw_decode_step(
                    batch=work.decodes, context_tokens=work.decode_context_tokens, seconds=seconds
                )
            return
        prefill_s = seconds - self._decodes_s(work)
        new_tokens = sum([p.new_tokens for p in work.prompts])
        self._speeds.append((max(new_tokens / seconds, 1e-3), new_tokens))
        self.tokens_per_s = _median(self._speeds)
        if prefill_s < seconds / 2:
            self._end_lone()
        elif len(work.prompts) == 1:
            self._learn_lone(work.prompts[0], prefill_s)
        else:
            self._end_lone()
            pairs = sum([p.new_tokens * (p.cached_tokens + p.new_tokens / 2) for p in work.prompts])
            self._model.saw_prefill_step(HERE, new_tokens=new_tokens, pairs=pairs, seconds=prefill_s)

    def _count_stall(self, work: StepWork, seconds: float) -> None:
        alone_s = self._model.decode().seconds(work.decodes, work.decode_context_tokens)
        stall_s = max(0.0, seconds - alone_s) if work.prompts else 0.0
        self._stalls.append((self._clock(), stall_s))
        self._stalled_s += stall_s
        self._forget_stalls()

    def _forget_stalls(self) -> None:
        until_s = self._clock() - STALL_WINDOW_S
        while self._stalls and self._stalls[0][0] < until_s:
            self._stalled_s -= self._stalls.popleft()[1]

    def _decodes_s(self, work: StepWork) -> float:
        """What the decodes beside a prefill add."""
        if not work.decodes:
            return 0.0
        model = self._model.decode()
        return model.per_request_s * work.decodes + model.per_context_token_s * work.decode_context_tokens

    def _learn_lone(self, prompt: PromptWork, seconds: float) -> None:
        lone = self._lone
        if (
            lone is not None
            and lone.request_id == prompt.request_id
            and lone.cached_tokens + lone.new_tokens == prompt.cached_tokens
        ):
            lone.new_tokens += prompt.new_tokens
            lone.seconds += seconds
        else:
            self._end_lone()
            self._lone = _Lone(prompt.request_id, prompt.cached_tokens, prompt.new_tokens, seconds)
        if prompt.done:
            self._end_lone()

    def _end_lone(self) -> None:
        lone, self._lone = self._lone, None
        if lone is not None:
            self._model.saw_prefill(
                HERE, new_tokens=lone.new_tokens, cached_tokens=lone.cached_tokens, seconds=lone.seconds
            )


def _median(speeds: Iterable[tuple[float, int]]) -> float:
    """The speed at which half of all tokens were computed at most."""
    ordered = sorted(speeds)
    left = sum([tokens for _, tokens in ordered]) / 2
    for speed, tokens in ordered:
        left -= tokens
        if left <= 0:
            return speed
    return PRIOR_TOKENS_PER_S
