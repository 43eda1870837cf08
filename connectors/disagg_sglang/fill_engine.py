"""SGLang's scheduler as ``control.prompt_fill`` sees it: its queue, its prefix cache, and what its requests say."""

import logging
from collections.abc import Collection
from typing import Any

from disagg_plugin.control.decode_port import PromptView, Route
from disagg_plugin.control.prefill_workers import PrefillWorkers
from disagg_policies.admission_snapshots import ONLY_OFFLOAD
from disagg_sglang.support import local_only_reason, routing_of
from disagg_sglang.tree_pages import Reserved, TreePages, key_of

logger = logging.getLogger(__name__)

MAX_UNKNOWN_ROUTES = 16  # that are named in the log: they come from clients


class SchedulerQueue(TreePages):
    """See ``FillEngine``; its thread is the scheduler's."""

    def __init__(self, scheduler: Any, workers: PrefillWorkers) -> None:
        """
        Raises:
            ConfigError: The engine's prefix cache has not the calls that are needed.
        """
        super().__init__(scheduler)
        self._scheduler = scheduler
        self._workers = workers
        self._unknown_routes: set[tuple[str, int]] = set()

    def view(self, request: Any, stopped: str | None) -> PromptView:
        """See ``FillEngine``."""
        local_only = stopped or local_only_reason(request)
        route = None
        if local_only is None and request.bootstrap_room is not None:
            where = (str(request.bootstrap_host), int(request.bootstrap_port or 0))
            worker = self._workers.worker_at(*where)
            if worker is not None:
                route = Route(worker, int(request.bootstrap_room))
            else:
                local_only = "unknown_bootstrap_host"
                self._say_unknown(where)
        fields: list[tuple[str, object]] = [("cache_salt", request.cache_salt)] if request.cache_salt else []
        return PromptView(
            request.rid,
            request.origin_input_ids.tolist(),
            local_only,
            tuple(fields),
            cache_salt=request.cache_salt or "",
            priority=request.priority or 0,
            route=route,
            only_offload=routing_of(request) == ONLY_OFFLOAD,
        )

    def match(self, request: Any) -> tuple[int, Any]:
        """See ``FillEngine``."""
        return self.match_key(key_of(request, len(request.origin_input_ids) - 1))

    def reserve(self, request: Any, matched: tuple[int, Any], end: int) -> Reserved | None:
        """See ``FillEngine``."""
        return self.reserve_key(key_of(request, end), matched, end)

    def queued(self) -> Collection[Any]:
        """See ``FillEngine``."""
        queue: list[Any] = self._scheduler.waiting_queue
        return queue

    def queue_limit(self) -> int | None:
        """See ``FillEngine``."""
        limit = self._scheduler.max_queued_requests
        return None if limit is None else int(limit)

    def computes_nothing(self) -> bool:
        """See ``FillEngine``."""
        scheduler = self._scheduler
        return scheduler.running_batch.is_empty() and scheduler.last_batch is None and scheduler.chunked_req is None

    def is_paused(self) -> bool:
        """See ``FillEngine``."""
        return bool(self._scheduler._engine_paused)

    def has_none(self) -> bool:
        """See ``FillEngine``."""
        scheduler = self._scheduler
        return self.computes_nothing() and not (scheduler.waiting_queue or scheduler.grammar_manager.grammar_queue)

    def has_ended(self, request: Any) -> bool:
        """See ``FillEngine``."""
        return bool(request.finished())

    def show(self, request: Any) -> None:
        """See ``FillEngine``."""
        self._scheduler.waiting_queue.append(request)

    def _say_unknown(self, where: tuple[str, int]) -> None:
        if where not in self._unknown_routes and len(self._unknown_routes) < MAX_UNKNOWN_ROUTES:
            self._unknown_routes.add(where)
            logger.warning(
                "disagg: a router names %s:%d, which is none of prefill_workers or not connected: prefilled locally",
                *where,
            )
