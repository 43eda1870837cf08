"""What crosses between vLLM's scheduler process and its workers: our values in the engine's envelopes."""

from dataclasses import dataclass

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from disagg_plugin.kv.commands import Command, RankEndpoint, RankReport
from disagg_plugin.kv.geometry import KVGeometry
from disagg_vllm.lmcache_tier import TierStep


@dataclass
class StepCommands(KVConnectorMetadata):  # type: ignore[misc]  # vLLM is untyped here
    """Scheduler → workers, with each step. ``computes``: the step runs a forward pass; ``number``: it grows.

    ``tier``: for the LMCache child, where there is one.
    """

    commands: tuple[Command, ...] = ()
    computes: bool = False
    number: int = 0
    tier: TierStep | None = None


@dataclass
class StepReports(KVConnectorWorkerMetadata):  # type: ignore[misc]  # vLLM is untyped here
    """Workers → scheduler, with each step: one report per rank that has news, and the step's number.

    The number comes back because nothing else tells which step ended: engines overlap steps, and one that computes
    nothing may or may not have an output.

    ``lmcache_failed``: requests that LMCache did not serve as promised; ``lmcache_problem``: it is not used any more.
    """

    reports: tuple[RankReport, ...] = ()
    number: int = 0
    lmcache_failed: tuple[str, ...] = ()
    lmcache_problem: str = ""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "StepReports":
        """All ranks' reports of one step."""
        assert isinstance(other, StepReports)
        return StepReports(
            self.reports + other.reports,
            max(self.number, other.number),
            self.lmcache_failed + other.lmcache_failed,
            self.lmcache_problem or other.lmcache_problem,
        )


@dataclass
class RankHandshake(KVConnectorHandshakeMetadata):  # type: ignore[misc]  # vLLM is untyped here
    """Worker → scheduler, once at start: how to reach the rank, or why it cannot take part."""

    rank: int
    endpoint: RankEndpoint | None = None
    geometry: KVGeometry | None = None
    problem: str = ""
    lmcache_problem: str = ""  # why it cannot use LMCache, where it is to be used
