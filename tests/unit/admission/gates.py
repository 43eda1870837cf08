"""A gate for the tests of this folder, on a clock that stands still unless it is told."""

from typing import Any

from disagg_plugin.admission.admitter import Admitter
from disagg_plugin.admission.engine_state import EngineState
from disagg_plugin.admission.gate import Gate
from disagg_plugin.hookspecs import PolicyParameters
from disagg_plugin.plugins import choose, load_plugins
from disagg_plugin.qos_settings import QosSettings
from disagg_policies.admission_snapshots import QueuedWork
from disagg_policies.snapshots import DecodeState, PrefillModel

CLASSES = {
    "high": {"ttft_slo_s": 1.0},
    "normal": {"ttft_slo_s": 2.0},
    "low": {"ttft_slo_s": 4.0, "degrade": ["max_tokens:64"]},
}
SECOND_PER_1000 = DecodeState(prefill=PrefillModel(base_s=0.0, per_token_s=1e-3, per_pair_s=0.0))


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def gate(clock: Clock | None = None, *, accepts_transfers: bool = False, **qos: Any) -> Gate:
    settings = QosSettings.model_validate({"classes": CLASSES, "enable_early_rejection": True, **qos})
    admitter = Admitter(choose(load_plugins()).admission, PolicyParameters())
    return Gate(settings, admitter, clock=clock or Clock(), accepts_transfers=accepts_transfers)


def report(sequence: int, *queued: tuple[int, int], **fields: Any) -> EngineState:
    """An engine's report with ``(priority, tokens)`` queued."""
    work = tuple(QueuedWork(priority, 1, tokens) for priority, tokens in queued)
    return EngineState(**{"sequence": sequence, "decode": SECOND_PER_1000, "queued": work, "reorders": True, **fields})
