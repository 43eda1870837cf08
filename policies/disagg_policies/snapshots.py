"""What the policies are given, and what they answer: frozen values with units in their names.

    Snapshot                 all that one decision sees
      prompt: Prompt           the request
      decode: DecodeState      this decode engine (D)
      workers: WorkerState...  every prefill worker (P) that D knows, healthy or not
      overlap_tokens           per worker: prefix of this prompt that it holds
      previous: PolicyState    what hysteresis and taking turns need
      placement: Placement     once the placement policy was asked

    placement policies  Snapshot     -> Placement          which workers, best first
    offload policies    Snapshot     -> Local | Offload    whether at all
    codec policies      CodecChoices -> Codec              how KV travels on one link

A ``WorkerState`` is built when a report arrives or when D's own work in flight changes, not per decision: its report's
age is ``now_s - reported_s``. Times on one clock; no value is infinite or NaN, so that a snapshot survives JSON and a
logged decision can be replayed exactly. New fields get defaults.
"""

from dataclasses import dataclass, fields, replace

DEFAULT_TOKENS_PER_S = 1_000.0  # prefill speed assumed before anything was measured
RUNNING_SCALE = 16  # requests; a worker that runs as many counts as half busy
NOT_BY_SPEED = ("kv_budget", "deadline")  # reasons of decisions that carry estimates but did not follow them


@dataclass(frozen=True, slots=True)
class PrefillModel:
    """Seconds of a prefill: ``base_s + per_token_s * new + per_pair_s * new * (cached + new / 2)``.

    The last term is attention: every new token looks at the tokens before it. Fitted by ``serving.latency``; the
    defaults are the priors.

    Attributes:
        per_pair_s: Seconds per (new token, token before it).
        samples: Observations behind the numbers; 0 means priors.
        error: Mean relative error of its predictions, 0.1 = 10 %.
    """

    base_s: float = 0.005
    per_token_s: float = 1 / DEFAULT_TOKENS_PER_S
    per_pair_s: float = 2e-8
    samples: int = 0
    error: float = 0.0

    def seconds(self, new_tokens: int, cached_tokens: int) -> float:
        """Predicted duration of ``new_tokens`` behind ``cached_tokens``; 0 where there is nothing to do."""
        if new_tokens <= 0:
            return 0.0
        pairs = new_tokens * (cached_tokens + new_tokens / 2)
        return self.base_s + self.per_token_s * new_tokens + self.per_pair_s * pairs

    def marginal_s(self, context_tokens: int) -> float:
        """Seconds that one more new token costs at the end of ``context_tokens``."""
        return self.per_token_s + self.per_pair_s * context_tokens


@dataclass(frozen=True, slots=True)
class DecodeModel:
    """Seconds of a decode step: ``base_s + per_request_s * batch + per_context_token_s * context``."""

    base_s: float = 0.01
    per_request_s: float = 1e-4
    per_context_token_s: float = 1e-7
    samples: int = 0
    error: float = 0.0

    def seconds(self, batch: int, context_tokens: int) -> float:
        """Predicted duration of a step of ``batch`` requests with ``context_tokens`` in all."""
        return self.base_s + self.per_request_s * batch + self.per_context_token_s * context_tokens


@dataclass(frozen=True, slots=True)
class Link:
    """The wire between one P and D, for the codec in use: ``setup_s + bytes / bytes_per_s``.

    Attributes:
        setup_s: Fixed part of a transfer, seconds (latency included).
        wire_bytes_per_token: Over all layers and ranks, after compression.
    """

    bytes_per_s: float = 1e9
    setup_s: float = 0.001
    wire_bytes_per_token: float = 0.0
    samples: int = 0
    error: float = 0.0

    @property
    def s_per_token(self) -> float:
        """Seconds that one more token of KV takes on the wire."""
        return self.wire_bytes_per_token / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request at the moment of the decision.

    Attributes:
        request_id: Only breaks ties, so that equal workers share equal work.
        cached_tokens: Prefix that the decode engine holds in its own cache.
        lmcache_tokens: Prefix that LMCache holds for the decode engine, counted from token 0 as well.
        priority: As the engine counts; smaller is more urgent.
        deadline_s: Seconds from now until the first token is due, or None.
        only_offload: Admission wants it to be prefilled elsewhere wherever that is possible, however slow.
    """

    request_id: str
    prompt_tokens: int
    cached_tokens: int
    lmcache_tokens: int = 0
    priority: int = 0
    deadline_s: float | None = None
    only_offload: bool = False

    @property
    def held_tokens(self) -> int:
        """Prefix that D need not have computed: the longer of its own cache and LMCache."""
        return max(self.cached_tokens, self.lmcache_tokens)

    @property
    def uncached_tokens(self) -> int:
        """What somebody has to compute."""
        return self.prompt_tokens - max(self.cached_tokens, self.lmcache_tokens)


class _Derived:
    """What follows from a ``WorkerState``'s fields, computed once: rows are made per report and read per decision.

    No fields of the dataclass, so they are neither compared, nor shown, nor written to JSON; whoever makes an equal
    row has equal ones.

    Attributes:
        queue_s: Seconds until the worker would start a prompt that arrives now.
        requests: Waiting there, and offered since its report.
        s_per_token: Seconds of prefill per prompt token, by its measured speed.
        busy: Its decode and KV load, ``kv_usage + running / (running + 16)``, 0 to 2.
        wire_setup_s, wire_s_per_token: Of its link.
    """

    __slots__ = ("busy", "queue_s", "requests", "s_per_token", "wire_s_per_token", "wire_setup_s")

    queue_s: float
    requests: int
    s_per_token: float
    busy: float
    wire_setup_s: float
    wire_s_per_token: float


@dataclass(frozen=True, slots=True)
class WorkerState(_Derived):
    """One prefill worker as the decode engine knows it: its last report, and what D gave it since.

    Attributes:
        healthy: Connected, compatible and not backed off. That the report is fresh is checked against the clock.
        queued_requests: Requests waiting there, by its report.
        max_prompt_tokens: Longest prompt it takes.
        queued_prefill_tokens: Prompt tokens that it has still to compute, by its report.
        running_requests: Requests that it is computing, by its report.
        kv_usage: Used share of its KV cache, 0 to 1.
        prefill_tokens_per_s: Its prefill speed as it measured it; above 0.
        reported_s: When the report arrived, on the clock of ``Snapshot.now_s``.
        in_flight_requests: Offered by this D since that report.
        in_flight_tokens: Prompt tokens of those.
        overhead_s: What an offload to it costs that is neither queue, prefill nor bytes: offer, HTTP, hand-over.
        prefill: What D learned about its prefills.
        link: What D learned about the wire from it.
        draining: It is about to leave and takes no more prompts; then it is not ``healthy``.
        by_priority: ``(priority, tokens)`` of its queue and of what is in flight, where it schedules by priority: what
            is less urgent is not ahead of a prompt. Empty where it does not.
    """

    worker: str
    healthy: bool
    queued_requests: int
    max_prompt_tokens: int
    queued_prefill_tokens: int = 0
    running_requests: int = 0
    kv_usage: float = 0.0
    prefill_tokens_per_s: float = DEFAULT_TOKENS_PER_S
    reported_s: float = 0.0
    in_flight_requests: int = 0
    in_flight_tokens: int = 0
    overhead_s: float = 0.0
    prefill: PrefillModel = PrefillModel()
    link: Link = Link()
    by_priority: tuple[tuple[int, int], ...] = ()
    draining: bool = False

    def __post_init__(self) -> None:
        speed, running, link = self.prefill_tokens_per_s, self.running_requests, self.link
        if not speed > 0:  # NaN too
            raise ValueError(f"prefill_tokens_per_s of {self.worker} is {speed}: must be above 0")
        derive = object.__setattr__  # the only way in a frozen class
        derive(self, "queue_s", (self.queued_prefill_tokens + self.in_flight_tokens) / speed)
        derive(self, "requests", self.queued_requests + self.in_flight_requests)
        derive(self, "s_per_token", 1.0 / speed)
        derive(self, "busy", self.kv_usage + running / (running + RUNNING_SCALE))
        derive(self, "wire_setup_s", link.setup_s)
        derive(self, "wire_s_per_token", link.wire_bytes_per_token / link.bytes_per_s)

    def __reduce__(self) -> tuple[type["WorkerState"], tuple[object, ...]]:
        """Copies and pickles are made anew, so that nothing derived is missing."""
        return WorkerState, tuple([getattr(self, field.name) for field in fields(self)])


@dataclass(frozen=True, slots=True)
class DecodeState:
    """The decode engine's own load.

    Attributes:
        engine: Stable id; with the request id it breaks ties, so that many Ds do not herd.
        running_decodes: Requests that a local prefill would stall.
        decode_context_tokens: Their contexts in all.
        queued_requests: Requests that wait here for a local prefill.
        queued_prefill_tokens: Their uncached prompt tokens, and what is left of a prefill under way.
        kv_usage: Used share of the KV cache, 0 to 1.
        held_kv_tokens: KV held here for transfers that have not landed, promised ones included.
        held_kv_budget_tokens: Limit for that, or None.
        prefill: What D learned about its own prefills.
        decode: What D learned about its own decode steps.
    """

    engine: str = ""
    running_decodes: int = 0
    decode_context_tokens: int = 0
    queued_requests: int = 0
    queued_prefill_tokens: int = 0
    kv_usage: float = 0.0
    held_kv_tokens: int = 0
    held_kv_budget_tokens: int | None = None
    prefill: PrefillModel = PrefillModel()
    decode: DecodeModel = DecodeModel()


@dataclass(frozen=True, slots=True)
class PolicyState:
    """What was decided before, as far as the next decision depends on it; see ``remember``.

    Attributes:
        remote_sizes: Bit *k* is set where the last compared prompt with ``uncached_tokens.bit_length() == k`` went
            to a worker.
        local_sizes: The same for those that stayed. A size in neither has no history.
        turn: Placements made so far.
    """

    remote_sizes: int = 0
    local_sizes: int = 0
    turn: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """Workers to offer to, best first; none, and why.

    Attributes:
        reason: The policy's name, or ``no_workers``, ``draining``, ``no_healthy_worker``,
            ``prompt_too_long``, ``queue_full``.
        scores: Of ``workers``, where the policy computes any; higher is better.
    """

    workers: tuple[str, ...]
    reason: str
    scores: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that one decision sees.

    Attributes:
        overlap_tokens: Leading tokens of this prompt that each worker holds, in the order of ``workers``; empty
            where nothing is known.
        placement: What the placement policy answered; an offload policy that finds None asks ``least_loaded``.
    """

    prompt: Prompt
    decode: DecodeState
    workers: tuple[WorkerState, ...]
    overlap_tokens: tuple[int, ...] = ()
    now_s: float = 0.0
    previous: PolicyState = PolicyState()
    placement: Placement | None = None


@dataclass(frozen=True, slots=True)
class Local:
    """Prefill on the decode engine; ``reason`` is a word for counters.

    Attributes:
        local_ttft_s, remote_ttft_s: Seconds to the first token either way, where they were estimated.
        harm_s: What the stall of the running decodes was weighed with, seconds; not part of ``local_ttft_s``.
    """

    reason: str
    local_ttft_s: float | None = None
    remote_ttft_s: float | None = None
    harm_s: float | None = None


@dataclass(frozen=True, slots=True)
class Offload:
    """Offer to ``workers`` in this order: the second is asked only if the first refuses. Estimates as in ``Local``."""

    workers: tuple[str, ...]
    reason: str
    local_ttft_s: float | None = None
    remote_ttft_s: float | None = None
    harm_s: float | None = None


Decision = Local | Offload


@dataclass(frozen=True, slots=True)
class CodecChoices:
    """One link, and what the two codecs would make of a token of KV there.

    Attributes:
        raw_bytes_per_token, int8_bytes_per_token: On the wire, over all layers and ranks.
        encode_bytes_per_s: Source bytes that P encodes a second.
        decode_bytes_per_s: Source bytes that D decodes a second, or None: not measured, not counted.
        previous: Codec in use on the link, or None.
    """

    link: Link
    raw_bytes_per_token: float
    int8_bytes_per_token: float
    encode_bytes_per_s: float
    decode_bytes_per_s: float | None = None
    previous: str | None = None


@dataclass(frozen=True, slots=True)
class Codec:
    """``raw`` or ``int8``, why, and the seconds per token that were compared."""

    name: str
    reason: str
    raw_s_per_token: float
    int8_s_per_token: float


def remember(previous: PolicyState, prompt: Prompt, decision: Decision, *, placed: bool) -> PolicyState:
    """The state for the next snapshot; whoever runs the policies calls it once a decision, own policies included.

    Only a decision by two estimates leaves a trace in the sizes: a full queue or cache says nothing about speed.

    Args:
        placed: Whether a placement policy was asked.
    """
    turn = previous.turn + placed
    if decision.remote_ttft_s is None or decision.reason in NOT_BY_SPEED:
        return replace(previous, turn=turn)
    size = 1 << prompt.uncached_tokens.bit_length()
    if isinstance(decision, Offload):
        return PolicyState(previous.remote_sizes | size, previous.local_sizes & ~size, turn)
    return PolicyState(previous.remote_sizes & ~size, previous.local_sizes | size, turn)
