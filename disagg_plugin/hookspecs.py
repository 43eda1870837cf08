"""The hooks through which policies are replaced; a docstring is the contract. ``docs/hooks.md`` shows them in use.

Every hook is called with frozen values and answers with one, or with ``None``, which leaves it to the next policy in
the chain. What holds for all of them:

- *Pure*: the answer depends on the arguments alone, or a logged decision cannot be replayed. What has to be remembered
  is in ``Snapshot.previous``; the time is ``Snapshot.now_s``.
- *In time*: called on a thread of its own, which the scheduler awaits for ``policy.hook_timeout_ms`` at most (5 ms for
  all hooks of a decision together). A late answer is discarded and the built-in answers.
- *Three strikes*: a hook that raises, answers nonsense (another type, a worker that the snapshot does not have, a
  number that is not finite) or is late, three times in a row, is disabled until restart: counted, logged once.
- *Arguments by name*: an implementation takes those that it needs and leaves out the others.
"""

from dataclasses import dataclass

import pluggy

from disagg_policies.admission_snapshots import Admission, AdmissionSnapshot
from disagg_policies.snapshots import Codec, CodecChoices, Decision, Placement, Snapshot

hookspec = pluggy.HookspecMarker("disagg")
hookimpl = pluggy.HookimplMarker("disagg")


@dataclass(frozen=True, slots=True)
class PolicyParameters:
    """What the settings say to policies: the arguments of the built-in ones, and free for yours to read.

    Attributes:
        prompt_length_threshold: Uncached prompt tokens up to which a prompt stays.
        prefill_queue_max: Requests; a worker with as many is not asked.
        min_cache_hit_ratio: A prompt cached to at least this share stays, or None.
        prefix_cache_weight, queue_length_weight, decode_load_weight, link_weight: Of ``placement.score``.
        enable_hotspot_prevention: A worker above its fair share loses its prefix bonus.
        decode_harm_weight: Seconds of TTFT that one second of stall of one running decode is worth.
        offload_hysteresis: Share by which a worker has to win after a local decision.
        codec_hysteresis: Share by which the codec not in use has to be faster.
        chunk_tokens: Prompt tokens of one prefill step of a worker.
        suspect_after_s: Age from which a load report is not believed, seconds.
        offers: How many workers a placement names: the second is asked if the first refuses.
        reject_on_slo_violation: Refuse what is predicted to miss its SLO; otherwise it is served late.
        low_priority_threshold_s: Predicted seconds to the first token above which the lowest class is refused, or None.
        degrade_from, degrade_hysteresis: Pressure at which degradation begins, and how far it must fall to end.
    """

    prompt_length_threshold: int = 256
    prefill_queue_max: int = 32
    min_cache_hit_ratio: float | None = None
    prefix_cache_weight: float = 10.0
    queue_length_weight: float = 1.5
    decode_load_weight: float = 0.5
    link_weight: float = 1.0
    enable_hotspot_prevention: bool = True
    decode_harm_weight: float = 0.1
    offload_hysteresis: float = 0.05
    codec_hysteresis: float = 0.05
    chunk_tokens: int = 2048
    suspect_after_s: float = 1.0
    offers: int = 2
    reject_on_slo_violation: bool = True
    low_priority_threshold_s: float | None = None
    degrade_from: float = 0.7
    degrade_hysteresis: float = 0.1


@hookspec(firstresult=True)
def disagg_place_prefill(snapshot: Snapshot, parameters: PolicyParameters) -> Placement | None:
    """Order the prefill workers for one prompt, best first.

    Asked once per new prompt, before it is decided whether to offload at all; ``snapshot.placement`` is None. Name
    only workers of ``snapshot.workers`` that are healthy; a placement without workers, with a reason, keeps the
    prompt here. The one that refuses is followed by the next.
    """


@hookspec(firstresult=True)
def disagg_decide_offload(snapshot: Snapshot, parameters: PolicyParameters) -> Decision | None:
    """Decide whether one prompt is prefilled here (``Local``) or on a worker (``Offload``).

    Asked once per new prompt; ``snapshot.placement`` is the answer of ``disagg_place_prefill``. ``Offload.workers``
    may differ from it. The reason is a lower-case word with underscores: it names a counter, so no ids in it.
    """


@hookspec(firstresult=True)
def disagg_choose_codec(choices: CodecChoices, parameters: PolicyParameters) -> Codec | None:
    """Choose how KV travels on one link: ``raw`` or ``int8``.

    Asked per link when its measured speed changed, not per prompt, and only under ``transfer.codec: auto``. The guard
    on real KV may still step a layer down from ``int8``; no policy can step it up.
    """


@hookspec(firstresult=True)
def disagg_admit(snapshot: AdmissionSnapshot, parameters: PolicyParameters) -> Admission | None:
    """Decide whether one request is served at all (``Admitted``), or answered 429 or 503 at once (``Refused``).

    Asked in the API server's event loop before the prompt is tokenized, and again with its exact length where the
    engine has such a point: be quick. ``snapshot.level`` is the memory. The reason names a counter.
    """
