"""What the admission policies are given, and what they answer: frozen values with units in their names.

    AdmissionSnapshot        all that one admission sees
      request: Arrival         what is known of the request before any work was done for it
      classes: ServiceClass... what was promised to whom, the most urgent first
      decode, workers          the engine and its prefill workers, as everywhere (``snapshots``)
      queued: QueuedWork...    prompts that wait here for a local prefill, by priority
      level                    degradation steps that were on before

    admission policies  AdmissionSnapshot -> Admitted | Refused

More load never turns a refusal into an admission, and whoever overtakes is not refused where the one overtaken is
admitted: both hold for every built-in policy and are tested as properties.
"""

from dataclasses import dataclass

from disagg_policies.snapshots import DecodeState, WorkerState

NEVER_OFFLOAD = "never_offload"
ONLY_OFFLOAD = "only_offload"


@dataclass(frozen=True, slots=True)
class ServiceClass:
    """One class of requests and what it was promised.

    Attributes:
        priority: As the engines count; smaller is more urgent and overtakes.
        ttft_slo_s: Seconds to the first token.
        tpot_slo_s: Mean seconds per further token, or None: nothing was promised.
        degrade: Steps taken under pressure before anybody is refused, in order; ``max_tokens:256``, ``never_offload``,
            ``only_offload``.
    """

    name: str
    priority: int
    ttft_slo_s: float
    tpot_slo_s: float | None = None
    degrade: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request in front of the engine.

    Attributes:
        service_class: Name of one of ``AdmissionSnapshot.classes``.
        prompt_tokens: Counted where the body holds token ids or the engine has tokenized, else estimated.
        cached_tokens: Prefix that the engine need not compute; before tokenization the optimistic guess, so that only
            what would be late even so is refused.
        remote_prefill_done: Another engine has computed the prompt: refusing would waste it.
    """

    service_class: str
    prompt_tokens: int
    cached_tokens: int = 0
    remote_prefill_done: bool = False


@dataclass(frozen=True, slots=True)
class QueuedWork:
    """Prompts of one priority; ``tokens`` are those still to be computed where they wait for a local prefill."""

    priority: int
    requests: int
    tokens: int


@dataclass(frozen=True, slots=True)
class AdmissionSnapshot:
    """All that one admission sees.

    Attributes:
        classes: Sorted by priority.
        decode: Its queue counts are not used: ``queued`` has them by priority.
        workers: Prefill workers; those that are not healthy do not count.
        queued: Prompts that wait here for a local prefill.
        reserved: Work that was admitted and is still on its way to the scheduler: nobody knows yet where it will go.
        reorders: The engine schedules by priority; otherwise everything is ahead of everybody.
        landing: Prompts being prefilled elsewhere, which will decode here; whole prompts are counted.
        decode_lasts_s: Seconds that a decode takes from its first token to its last; fitted.
        mean_prefill_s, mean_decode_s: Seconds of this engine's time that one request takes, a step's seconds shared
            among its batch.
        mean_prompt_tokens: Of those admitted lately; 0: none was.
        drain_tokens_per_s: Prompt tokens that the queue really loses per second, or None: as fast as the model says.
        kv_capacity_tokens: Size of the KV cache, or None: no limit known.
        max_running: Requests that the engine runs at once, or None.
        level: Degradation steps of this request's class that are on.
        overused: The request's key has had more than its share of its class.
        draining: The engine takes no new requests.
        serves: Some engine is there at all.
        offload_above_tokens: A prompt with more uncached tokens is prefilled remotely wherever a worker is there, any
            other one locally; None: whichever way is the shorter one.
        decode_stall_s: Mean seconds by which prompts made recent decode steps longer.
        arriving: ``(priority, tokens per second)`` of prompts that were admitted lately.
    """

    request: Arrival
    classes: tuple[ServiceClass, ...]
    decode: DecodeState = DecodeState()  # noqa: RUF009 - frozen
    workers: tuple[WorkerState, ...] = ()
    queued: tuple[QueuedWork, ...] = ()
    reorders: bool = True
    landing: tuple[QueuedWork, ...] = ()
    decode_lasts_s: float = 5.0
    mean_prefill_s: float = 0.1
    mean_decode_s: float = 0.1
    drain_tokens_per_s: float | None = None
    kv_capacity_tokens: int | None = None
    max_running: int | None = None
    level: int = 0
    overused: bool = False
    draining: bool = False
    serves: bool = True
    reserved: tuple[QueuedWork, ...] = ()
    offload_above_tokens: int | None = None
    decode_stall_s: float = 0.0
    arriving: tuple[tuple[int, float], ...] = ()
    mean_prompt_tokens: float = 0.0

    def class_named(self, name: str) -> ServiceClass:
        """One of the classes.

        Raises:
            ValueError: There is none of this name.
        """
        for service_class in self.classes:
            if service_class.name == name:
                return service_class
        raise ValueError(f"class {name!r} is none of {', '.join(c.name for c in self.classes)}")


@dataclass(frozen=True, slots=True)
class Admitted:
    """Serve it; ``reason`` is a word for counters.

    Attributes:
        steps: Degradation steps to apply to this request.
        level: Steps of its class that are on from now.
        ttft_s, tpot_s: Predicted, where anything was.
        pressure: Share of the class's SLO that others use up; 1 and above: somebody is refused.
    """

    reason: str
    steps: tuple[str, ...] = ()
    level: int = 0
    ttft_s: float | None = None
    tpot_s: float | None = None
    pressure: float = 0.0


@dataclass(frozen=True, slots=True)
class Refused:
    """Do not serve it.

    Attributes:
        retry_after_s: Whole seconds, 1 to 60.
        unavailable: Nobody could be served now, whatever the class: HTTP 503 instead of 429.
        level, ttft_s, tpot_s, pressure: As in ``Admitted``.
    """

    reason: str
    retry_after_s: int
    unavailable: bool = False
    level: int = 0
    ttft_s: float | None = None
    tpot_s: float | None = None
    pressure: float = 0.0


Admission = Admitted | Refused
