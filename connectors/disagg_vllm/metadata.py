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
    """Scheduler → workers, with each step. ``computes``: the step runs a forward pass."""

    commands: tuple[Command, ...] = ()
    computes: bool = False


@dataclass
class StepReports(KVConnectorWorkerMetadata):  # type: ignore[misc]  # vLLM is untyped here
    """Workers → scheduler, with each step: one report per rank."""

    reports: tuple[RankReport, ...] = ()

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "StepReports":
        """All ranks' reports of one step."""
        assert isinstance(other, StepReports)
        return StepReports(self.reports + other.reports)


@dataclass
class RankHandshake(KVConnectorHandshakeMetadata):  # type: ignore[misc]  # vLLM is untyped here
    """Worker → scheduler, once at start: how to reach the rank, or why it cannot take part."""

    rank: int
    endpoint: RankEndpoint | None = None
    geometry: KVGeometry | None = None
    problem: str = ""
