"""What one API server has of admission: the gate, what it shares with other servers, and the prefixes it remembers.

Engine-neutral: a connector gets the middleware in front of its engine's HTTP server, reports to ``heard``, and each
prompt, with its token ids, to ``exact`` before it is queued.
"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from disagg_plugin.admission.admitter import Admitter
from disagg_plugin.admission.board import SYNC_S, Board
from disagg_plugin.admission.engine_state import from_plain
from disagg_plugin.admission.gate import Gate, Refusal, Ticket
from disagg_plugin.admission.prefix_memory import PrefixMemory
from disagg_plugin.config import DisaggSettings
from disagg_plugin.hookspecs import PolicyParameters
from disagg_plugin.observability.frontend import Frontend
from disagg_plugin.observability.slo import SloTarget
from disagg_plugin.plugins import choose, load_plugins

logger = logging.getLogger(__name__)

UNKNOWN_CAPACITY_TOKENS = 1 << 20


def make_gate(settings: DisaggSettings) -> Gate:
    """The gate of one API server."""
    qos = settings.qos
    parameters = PolicyParameters(
        prefill_queue_max=settings.split_policy.prefill_queue_max,
        reject_on_slo_violation=qos.reject_on_slo_violation,
        low_priority_threshold_s=None if qos.low_priority_threshold_ms is None else qos.low_priority_threshold_ms / 1e3,
        degrade_from=qos.degrade_from,
        degrade_hysteresis=qos.degrade_hysteresis,
    )
    chosen = choose(load_plugins(settings.policy), settings.policy).admission
    admitter = Admitter(chosen, parameters, bound_s=settings.policy.hook_timeout_ms / 1e3)
    by_length = settings.role == "decode" and settings.policy.offload == ("threshold",)
    return Gate(
        qos,
        admitter,
        accepts_transfers=settings.role != "decode",
        offload_above_tokens=settings.split_policy.prompt_length_threshold if by_length else None,
    )


class Site:
    """All calls from the API server's event loop."""

    def __init__(
        self, settings: DisaggSettings, *, by_priority: bool, caches_prefixes: bool, board: Path | None = None
    ) -> None:
        """
        Args:
            by_priority: The engine schedules by priority, the lowest first.
            board: Where several API servers of one engine meet.

        Raises:
            OSError: There is no such board.
        """
        self._settings = settings
        self.gate = make_gate(settings)
        self.by_priority = by_priority
        self.board = Board(board) if board is not None else None
        if self.board is not None:
            self.gate.also_count(self.board.work)
        self.memory = PrefixMemory() if caches_prefixes else None
        self._will_sync = False

    def observe(self, figures: Frontend) -> None:
        """Count outcomes and measure SLOs in ``figures``."""
        classes = self.gate.book.classes
        figures.configure_slo(
            {one.name: SloTarget(ttft_s=one.ttft_slo_s, tpot_s=one.tpot_slo_s) for one in classes},
            default_class=self._settings.qos.default_class,
            objective=self._settings.observability.slo_objective,
        )
        self.gate.observer = figures

    def say(self) -> None:
        """One line: what is active."""
        logger.info(
            "disagg: early rejection is active: policy %s, classes %s",
            ", ".join(self._settings.policy.admission),
            ", ".join(f"{one.name} (TTFT {one.ttft_slo_s:g} s)" for one in self.gate.book.classes),
        )
        if not self.by_priority:
            logger.info("disagg: the engine does not schedule by priority: classes differ in what is refused only")

    def heard(self, engine: int, state: Mapping[str, Any]) -> None:
        """An engine's report came."""
        self.gate.update(from_plain(state), str(engine))
        self.sync()

    def sync(self) -> bool:
        """Exchange what is known with the other API servers, where there are any; false: that was done just now."""
        return self.board is None or self.board.sync(self.gate, time.monotonic())

    def sync_soon(self) -> None:
        """Exchange it once what is being admitted now, or has just left, is among it: perhaps nothing else happens."""
        if self.board is None or self._will_sync:
            return
        self._will_sync = True
        asyncio.get_running_loop().call_later(SYNC_S, self._sync_late)

    def _sync_late(self) -> None:
        self._will_sync = False
        if not self.sync():
            self.sync_soon()

    def exact(
        self, ticket: Ticket, request_id: str, token_ids: Sequence[int], *, salt: str = "", lora: str = ""
    ) -> Refusal | None:
        """The second stage, with the prompt as the engine will see it; None: queue it."""
        hashes: list[int] = []
        cached_tokens = None
        if self.memory is not None:
            hashes = self.memory.hashes(token_ids, salt=salt, lora=lora)
            cached_tokens = self.memory.cached_tokens(hashes)
            if self.board is not None:  # the rest of the conversation may have gone through another API server
                cached_tokens = max(cached_tokens, ticket.route.cached_tokens(len(token_ids)))
        self.sync_soon()
        refusal = self.gate.exact(ticket, request_id, len(token_ids), cached_tokens)
        if refusal is None and self.memory is not None:
            if cached_tokens is not None:
                ticket.route.saw_cached(len(token_ids), cached_tokens)
            self.memory.remember(hashes, self.gate.kv_capacity_tokens() or UNKNOWN_CAPACITY_TOKENS)
        return refusal
