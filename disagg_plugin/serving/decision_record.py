"""A decision with all that it was made from, as one line of JSON from which it can be made again.

    {"decision": 1, "at_s": ..., "took_s": ..., "placed_by": "score", "decided_by": "latency", "problems": [],
     "answer": {"offload": {"workers": [...], "reason": "remote_faster", "local_ttft_s": ..., ...}},
     "parameters": {...}, "snapshot": {...}}

Nothing is left out, defaults included: a later version with other defaults replays it all the same.
"""

from dataclasses import dataclass, replace
from typing import Any

import msgspec
import pluggy

from disagg_plugin.errors import ConfigError
from disagg_plugin.hookspecs import PolicyParameters
from disagg_plugin.plugins import Kind, PolicySettings, available, load_plugins, policy_of
from disagg_policies.snapshots import Decision, Local, Offload, Snapshot

VERSION = 1


@dataclass(frozen=True, slots=True)
class DecisionRecord:
    """One decision.

    Attributes:
        snapshot: As the offload policy saw it, so ``snapshot.placement`` is the placement policy's answer.
        placed_by, decided_by: Names of the policies that answered.
        at_s: Wall clock, seconds since 1970.
        took_s: From the question to this record.
        problems: What went wrong with other policies on the way.
    """

    snapshot: Snapshot
    parameters: PolicyParameters
    decision: Decision
    placed_by: str
    decided_by: str
    at_s: float
    took_s: float
    problems: tuple[str, ...] = ()

    def row(self) -> dict[str, object]:
        """The short form for the debug snapshot and ``disagg decisions``."""
        decision, prompt = self.decision, self.snapshot.prompt
        return {
            "at_s": self.at_s,
            "request_id": prompt.request_id,
            "action": "offload" if isinstance(decision, Offload) else "local",
            "reason": decision.reason,
            "workers": list(decision.workers) if isinstance(decision, Offload) else [],
            "prompt_tokens": prompt.prompt_tokens,
            "held_tokens": prompt.held_tokens,
            "local_ttft_s": decision.local_ttft_s,
            "remote_ttft_s": decision.remote_ttft_s,
            "harm_s": decision.harm_s,
            "candidates": len(self.snapshot.workers),
            "placed_by": self.placed_by,
            "decided_by": self.decided_by,
            "took_us": round(self.took_s * 1e6, 1),
            "problems": list(self.problems),
        }


@dataclass(frozen=True, slots=True)
class Replayed:
    """A recorded decision beside what the same policies answer to the same snapshot now, of whatever type."""

    record: DecisionRecord
    placement: object
    decision: object

    @property
    def equal(self) -> bool:
        return self.placement == self.record.snapshot.placement and self.decision == self.record.decision


def to_json(record: DecisionRecord) -> str:
    """One line; ``from_json`` gives an equal record."""
    kind = "offload" if isinstance(record.decision, Offload) else "local"
    line = {
        "decision": VERSION,
        "at_s": record.at_s,
        "took_s": record.took_s,
        "placed_by": record.placed_by,
        "decided_by": record.decided_by,
        "problems": record.problems,
        "answer": {kind: record.decision},
        "parameters": record.parameters,
        "snapshot": record.snapshot,
    }
    return msgspec.json.encode(line).decode()


def from_json(line: str) -> DecisionRecord:
    """Read a record; whatever a logger put in front of the ``{`` is skipped.

    Raises:
        ConfigError: It is none.
    """
    try:
        values: dict[str, Any] = msgspec.json.decode(line[max(0, line.find("{")) :], type=dict[str, Any])
        if values.get("decision") != VERSION:
            raise ConfigError(f'not a decision: "decision" is {values.get("decision")!r}, must be {VERSION}')
        ((kind, answer),) = values["answer"].items()
        decision: Decision = msgspec.convert(answer, {"offload": Offload, "local": Local}[kind])
        return DecisionRecord(
            snapshot=msgspec.convert(values["snapshot"], Snapshot),
            parameters=msgspec.convert(values["parameters"], PolicyParameters),
            decision=decision,
            placed_by=msgspec.convert(values["placed_by"], str),
            decided_by=msgspec.convert(values["decided_by"], str),
            at_s=msgspec.convert(values["at_s"], float),
            took_s=msgspec.convert(values["took_s"], float),
            problems=msgspec.convert(values["problems"], tuple[str, ...]),
        )
    except (msgspec.MsgspecError, KeyError, ValueError, AttributeError) as error:
        raise ConfigError(f"not a decision: {' '.join(f'{type(error).__name__}: {error}'.split())}") from None


def replay(record: DecisionRecord | str, manager: pluggy.PluginManager | None = None) -> Replayed:
    """Ask the policies that answered then once more, with what they were given then; waits as long as they take.

    Args:
        manager: Where to find the policies; default: the built-ins and what is installed under the recorded names.

    Raises:
        ConfigError: The line is no record, or a policy in it is not to be found here.
    """
    record = from_json(record) if isinstance(record, str) else record
    manager = manager or load_plugins(_settings_for(record))
    place = policy_of(manager, "placement", record.placed_by)
    decide = policy_of(manager, "offload", record.decided_by)
    seen, parameters = record.snapshot, record.parameters
    placement = place.call(snapshot=replace(seen, placement=None), parameters=parameters)
    return Replayed(record, placement, decide.call(snapshot=seen, parameters=parameters))


def _settings_for(record: DecisionRecord) -> PolicySettings:
    named: tuple[tuple[Kind, str], ...] = (("placement", record.placed_by), ("offload", record.decided_by))
    modules = [name for kind, name in named if name not in available(kind)]  # dotted paths, or gone
    module = next((name for name in modules if "." in name), None)
    return PolicySettings(placement=(record.placed_by,), offload=(record.decided_by,), module=module)
