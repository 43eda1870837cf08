"""The policies of ``disagg_policies`` as plugins like any other; they are the last of every chain and always answer.

Pure arithmetic over frozen values, without a lock, I/O or a loop over anything but the workers: so the host calls them
inline, on the scheduler's thread.
"""

from collections.abc import Callable, Iterator

from disagg_plugin.hookspecs import PolicyParameters, hookimpl
from disagg_policies import admission, codec, offload, placement
from disagg_policies.admission_snapshots import Admission, AdmissionSnapshot
from disagg_policies.snapshots import Codec, CodecChoices, Decision, Placement, Snapshot


class OffloadPolicy:
    """An offload policy as a plugin."""

    def __init__(self, policy: Callable[[Snapshot, PolicyParameters], Decision]) -> None:
        self._policy = policy

    @hookimpl
    def disagg_decide_offload(self, snapshot: Snapshot, parameters: PolicyParameters) -> Decision:
        return self._policy(snapshot, parameters)


class PlacementPolicy:
    """A placement policy as a plugin."""

    def __init__(self, policy: Callable[[Snapshot, PolicyParameters], Placement]) -> None:
        self._policy = policy

    @hookimpl
    def disagg_place_prefill(self, snapshot: Snapshot, parameters: PolicyParameters) -> Placement:
        return self._policy(snapshot, parameters)


class CodecPolicy:
    """A codec policy as a plugin."""

    def __init__(self, policy: Callable[[CodecChoices, PolicyParameters], Codec]) -> None:
        self._policy = policy

    @hookimpl
    def disagg_choose_codec(self, choices: CodecChoices, parameters: PolicyParameters) -> Codec:
        return self._policy(choices, parameters)


class AdmissionPolicy:
    """An admission policy as a plugin."""

    def __init__(self, policy: Callable[[AdmissionSnapshot, PolicyParameters], Admission]) -> None:
        self._policy = policy

    @hookimpl
    def disagg_admit(self, snapshot: AdmissionSnapshot, parameters: PolicyParameters) -> Admission:
        return self._policy(snapshot, parameters)


def _threshold(snapshot: Snapshot, p: PolicyParameters) -> Decision:
    return offload.threshold(
        snapshot.prompt,
        snapshot.workers,
        prompt_length_threshold=p.prompt_length_threshold,
        prefill_queue_max=p.prefill_queue_max,
        decode_engine=snapshot.decode.engine,
        min_cache_hit_ratio=p.min_cache_hit_ratio,
        placement=snapshot.placement,
        now_s=snapshot.now_s,
        suspect_after_s=p.suspect_after_s,
    )


def _latency(snapshot: Snapshot, p: PolicyParameters) -> Decision:
    return offload.latency(
        snapshot,
        decode_harm_weight=p.decode_harm_weight,
        hysteresis=p.offload_hysteresis,
        chunk_tokens=p.chunk_tokens,
        prompt_length_threshold=p.prompt_length_threshold,
        min_cache_hit_ratio=p.min_cache_hit_ratio,
    )


def _score(snapshot: Snapshot, p: PolicyParameters) -> Placement:
    return placement.score(
        snapshot,
        prefix_cache_weight=p.prefix_cache_weight,
        queue_length_weight=p.queue_length_weight,
        decode_load_weight=p.decode_load_weight,
        link_weight=p.link_weight,
        enable_hotspot_prevention=p.enable_hotspot_prevention,
        limit=p.offers,
        prefill_queue_max=p.prefill_queue_max,
        suspect_after_s=p.suspect_after_s,
    )


def _by_queue(policy: Callable[..., Placement]) -> Callable[[Snapshot, PolicyParameters], Placement]:
    return lambda snapshot, p: policy(
        snapshot, limit=p.offers, prefill_queue_max=p.prefill_queue_max, suspect_after_s=p.suspect_after_s
    )


def _projected(snapshot: AdmissionSnapshot, p: PolicyParameters) -> Admission:
    return admission.projected(
        snapshot,
        reject_on_slo_violation=p.reject_on_slo_violation,
        low_priority_threshold_s=p.low_priority_threshold_s,
        degrade_from=p.degrade_from,
        hysteresis=p.degrade_hysteresis,
        chunk_tokens=p.chunk_tokens,
    )


def _current_queue(snapshot: AdmissionSnapshot, p: PolicyParameters) -> Admission:
    return admission.current_queue(
        snapshot,
        reject_on_slo_violation=p.reject_on_slo_violation,
        low_priority_threshold_s=p.low_priority_threshold_s,
        degrade_from=p.degrade_from,
        hysteresis=p.degrade_hysteresis,
    )


def plugins() -> Iterator[tuple[str, object]]:
    """Name and plugin of every built-in; the names are ``KIND.NAME``, the default of each kind first."""
    yield "offload.latency", OffloadPolicy(_latency)
    yield "offload.threshold", OffloadPolicy(_threshold)
    yield "placement.score", PlacementPolicy(_score)
    yield "placement.least_loaded", PlacementPolicy(_by_queue(placement.least_loaded))
    yield "placement.round_robin", PlacementPolicy(_by_queue(placement.round_robin))
    yield "placement.power_of_two", PlacementPolicy(_by_queue(placement.power_of_two))
    yield "codec.by_link", CodecPolicy(lambda choices, p: codec.by_link(choices, hysteresis=p.codec_hysteresis))
    yield "admission.projected", AdmissionPolicy(_projected)
    yield "admission.current_queue", AdmissionPolicy(_current_queue)


def names(kind: str) -> tuple[str, ...]:
    """Short names of the built-ins of ``kind``, the default first."""
    return tuple(name.partition(".")[2] for name, _ in plugins() if name.startswith(f"{kind}."))
