"""The policy under which ``crossover.py`` asks one engine for all three: a request's priority says who decides."""

from disagg_plugin.hookspecs import PolicyParameters, hookimpl
from disagg_policies.placement import least_loaded
from disagg_policies.snapshots import Local, Offload, Snapshot

LATENCY, ALWAYS_LOCAL, ALWAYS_OFFLOAD = 0, 1, 2


@hookimpl
def disagg_decide_offload(snapshot: Snapshot, parameters: PolicyParameters) -> Local | Offload | None:
    """``None`` leaves the request to ``latency``."""
    match snapshot.prompt.priority:
        case 1:
            return Local("forced_local")
        case 2:
            workers = least_loaded(snapshot, prefill_queue_max=parameters.prefill_queue_max).workers
            return Offload(workers, "forced_offload") if workers else Local("nobody_to_force")
        case _:
            return None
