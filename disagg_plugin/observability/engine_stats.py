"""What a scheduler process tells its API server after a step: when it is due, and that it never harms the engine."""

import logging
from collections.abc import Callable
from typing import Any

from disagg_plugin.config import DisaggSettings
from disagg_plugin.observability.collect import Collector
from disagg_plugin.observability.deltas import Deltas
from disagg_plugin.observability.journal import Journal

logger = logging.getLogger(__name__)


class EngineStats:
    """The figures of one scheduler process; its own thread only."""

    def __init__(
        self,
        settings: DisaggSettings,
        journal: Journal,
        figures: Callable[[], dict[str, object]],
        *,
        ring_slots: Callable[[], int],
        ranks: Callable[[], int],
    ) -> None:
        self._settings = settings
        self._journal = journal
        self._figures = figures
        self._ring_slots = ring_slots
        self._ranks = ranks
        self._collector: Collector | None = None
        self._live_requests = 0
        self._at_rest = False
        self._failures = 0
        # what admission in the API server is told: asked for once per stats interval
        self.engine_state: Callable[[], dict[str, Any] | None] | None = None

    def request_came(self) -> None:
        self._live_requests += 1

    def request_ended(self) -> None:
        self._live_requests -= 1

    def take(self, *, needs_steps: bool) -> Deltas | None:
        """What is new, or None; an exception here would end the engine.

        Args:
            needs_steps: The engine goes on stepping although it has no request.
        """
        at_rest = self._live_requests <= 0 and not needs_steps
        comes_to_rest, self._at_rest = at_rest and not self._at_rest, at_rest
        try:
            if self._collector is None:
                self._collector = self._make_collector()
            return self._collector.collect(at_rest=comes_to_rest)
        except Exception:  # figures may be missing, a step may not
            self._failures += 1
            if self._failures == 1:
                logger.exception("disagg: no figures can be collected; further failures are not logged")
            return None

    def _make_collector(self) -> Collector:
        """At the first step: by then the ranks are known."""
        return Collector(
            self._figures,
            self._journal,
            interval_s=self._settings.observability.stats_interval_s,
            ring_slots=self._ring_slots(),
            private_buffers=self._settings.transfer.region_slots * self._ranks(),
            engine_state=lambda: self.engine_state() if self.engine_state is not None else None,
        )
