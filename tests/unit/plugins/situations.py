"""Snapshots for the tests of this folder."""

from disagg_plugin.hookspecs import PolicyParameters
from disagg_plugin.plugins import PolicySettings, choose, load_plugins
from disagg_plugin.serving.decisions import Decider
from disagg_policies.snapshots import (
    CodecChoices,
    DecodeState,
    Link,
    PrefillModel,
    Prompt,
    Snapshot,
    WorkerState,
)

SLOW = PrefillModel(per_token_s=1e-3, per_pair_s=0.0)
FAST = PrefillModel(per_token_s=1e-4, per_pair_s=0.0)
PROMPT = Prompt("r-1", 4_000, 0)
BUSY = DecodeState(engine="d-0", running_decodes=8, prefill=SLOW)
WORKERS = (
    WorkerState("p-0", healthy=True, queued_requests=0, max_prompt_tokens=32_000, prefill=FAST),
    WorkerState(
        "p-1", healthy=True, queued_requests=4, max_prompt_tokens=32_000, queued_prefill_tokens=2_000, prefill=FAST
    ),
    WorkerState("p-2", healthy=False, queued_requests=0, max_prompt_tokens=32_000, prefill=FAST),
)
SNAPSHOT = Snapshot(PROMPT, BUSY, WORKERS)
CHOICES = CodecChoices(Link(1e8, samples=10), 65_536.0, 33_792.0, 2e9)


def decider(*plugins: object, bound_s: float = 5.0, parameters: PolicyParameters | None = None) -> Decider:
    """One that asks ``plugins`` in this order for each hook that they implement, on a clock that stands still."""
    settings: dict[str, list[str]] = {"offload": [], "placement": [], "codec": [], "admission": []}
    named = [(f"own_{number}", plugin) for number, plugin in enumerate(plugins)]
    for name, plugin in named:
        for kind, hook in (
            ("offload", "disagg_decide_offload"),
            ("placement", "disagg_place_prefill"),
            ("codec", "disagg_choose_codec"),
            ("admission", "disagg_admit"),
        ):
            if hasattr(plugin, hook):
                settings[kind].append(name)
    chosen = PolicySettings.model_validate({kind: names for kind, names in settings.items() if names})
    return Decider(
        choose(load_plugins(chosen, extra=named), chosen),
        parameters,
        bound_s=bound_s,
        clock=lambda: 0.5,
        log_interval_s=None,
    )
