"""What crosses between vLLM's scheduler process and its workers: our values in the engine's envelopes."""

from dataclasses import dataclass

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from disagg_plugin.kv.commands import Command, RankEndpoint, RankReport
from disagg_plugin.kv.geometry import KVGeometry


@dataclass
class StepCommands(KVConnectorMetadata):  # type: ignore[misc]  # vLLM is untyped here
    """Scheduler → workers, with each step. ``computes``: the step runs a forward pass; ``number``: it grows."""

    commands: tuple[Command, ...] = ()
    computes: bool = False
    number: int = 0


@dataclass
class StepReports(KVConnectorWorkerMetadata):  # type: ignore[misc]  # vLLM is untyped here
    """Workers → scheduler, with each step: one report per rank that has news, and the step's number.

    The number comes back because nothing else tells which step ended: engines overlap steps, and one that computes
    nothing may or may not have an output.
    """

    reports: tuple[RankReport, ...] = ()
    number: int = 0

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "StepReports":
        """All ranks' reports of one step."""
        assert isinstance(other, StepReports)
        return StepReports(self.reports + other.reports, max(self.number, other.number))


@dataclass
class RankHandshake(KVConnectorHandshakeMetadata):  # type: ignore[misc]  # vLLM is untyped here
    """Worker → scheduler, once at start: how to reach the rank, or why it cannot take part."""

    rank: int
    endpoint: RankEndpoint | None = None
    geometry: KVGeometry | None = None
    problem: str = ""
