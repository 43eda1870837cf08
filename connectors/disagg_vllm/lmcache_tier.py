"""LMCache between the engine's own prefix cache and a prefill worker: its connector's calls, joined with ours.

``LMCacheScheduler`` keeps the ledger of look-ups and tells ``SchedulerSide`` what LMCache loads of a prompt;
``LMCacheWorker`` joins the child's loads and saves with the data plane's, so that the engine hears of each request
once. ``lmcache_child`` has the child itself.
"""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from disagg_plugin.cache_settings import LMCacheSettings
from disagg_plugin.control.prefix_ledger import Goodbye, PrefixLedger
from disagg_plugin.kv.dataplane import Completions
from disagg_plugin.kv.joined import Join, Joined, Part
from disagg_vllm.lmcache_child import NO_BLOCKS, Child, ShownRequest, can_be_looked_up, shown_step

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

logger = logging.getLogger("vllm.disagg")


@dataclass
class TierStep:
    """Scheduler → workers, with each step, inside ``StepCommands``.

    Attributes:
        metadata: The child's own.
        loads: Loads that begin, with all of their parts.
        sends: Requests that ended and whose blocks are still read.
        ended: Of them, those whose saves the child reports.
    """

    metadata: KVConnectorMetadata | None = None
    loads: tuple[Join, ...] = ()
    sends: tuple[Join, ...] = ()
    ended: frozenset[str] = frozenset()


class LMCacheScheduler:
    """The scheduler process's half. Silent (no request is shown to the child) until ``ready``."""

    def __init__(
        self,
        child: Any,
        problem: str,
        settings: LMCacheSettings,
        *,
        block_size: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.child = Child(child, problem or "not started")
        self._start_problem = problem
        self._settings = settings
        self._block_size = block_size
        self._ledger = PrefixLedger(
            block_size=block_size,
            lookup_timeout_s=settings.lookup_timeout_ms / 1e3,
            store_received=settings.store_received,
            clock=clock,
        )
        self._shown: dict[str, ShownRequest] = {}
        self._promised: dict[str, tuple[int, int]] = {}  # tokens cached, and of LMCache
        self._step = TierStep()
        self._ended: set[str] = set()
        self._lookup_s = 0.0
        self._lookups = 0

    def ready(self, rank_problems: list[str]) -> None:
        """All workers have their children, or say why not."""
        self.child.problem = next(filter(None, [self._start_problem, *rank_problems]), "")
        if self.child.problem:
            logger.warning("disagg: LMCache is not used: %s", self.child.problem)
        else:
            logger.info("disagg: LMCache at %s serves prefixes", self._settings.url)

    # the engine's calls, in the order of a step

    def look_up(self, request: Any, cached_tokens: int) -> int | None:
        """Tokens beyond ``cached_tokens`` that LMCache loads, or None: ask again."""
        request_id = request.request_id
        if self.child.problem:
            return 0
        if not can_be_looked_up(request):
            self._ledger.withdraw(request_id)
            return 0
        shown = self._shown.setdefault(request_id, ShownRequest(request))
        return self._ledger.look_up(request_id, cached_tokens, lambda: self._ask(shown, cached_tokens))

    def promise(self, request_id: str, cached_tokens: int, store_tokens: int) -> None:
        """What the engine has and is told now; ``allocated`` follows if it finds room."""
        self._promised[request_id] = (cached_tokens, store_tokens)

    def allocated(self, request: Any, blocks: Any, external_tokens: int) -> int:
        """Blocks were given to a request; how many of its external tokens come over the wire."""
        request_id = request.request_id
        cached_tokens, promised_tokens = self._promised.pop(request_id, (0, 0))
        store_tokens = min(promised_tokens, external_tokens)
        wire_tokens = external_tokens - store_tokens
        self._ledger.totals.update(device_hit_tokens=cached_tokens, wire_tokens=wire_tokens)
        if self._ledger.allocated(request_id, store_tokens, wire_tokens):
            self.child.call("update_state_after_alloc", self._shown[request_id], blocks, store_tokens)
        if external_tokens:
            (block_ids,) = blocks.get_block_ids()
            self._step.loads += (self._join(request_id, block_ids, cached_tokens, store_tokens, wire_tokens),)
        return wire_tokens

    def build_step(self, output: "SchedulerOutput") -> TierStep:
        """The step's message to the workers."""
        self._settle_late_answers()
        for request_id in output.preempted_req_ids or ():
            self._ledger.preempted(request_id)
        step, self._step = self._step, TierStep()
        step.ended, self._ended = frozenset(self._ended), set()
        step.metadata = self.child.call("build_connector_meta", shown_step(output, self._told(output)))
        stats = self.child.call("get_kv_connector_stats")  # it collects them until it is asked
        if stats is not None:
            durations_s = stats.data.get("lookup_duration_seconds", [])
            self._lookups += len(durations_s)
            self._lookup_s += sum(durations_s)
        return step

    def update(self, output: Any, failed: Iterable[str] = (), problem: str = "") -> None:
        """What came back from the workers.

        Args:
            failed: Requests that LMCache did not serve as promised.
            problem: Why a worker cannot use LMCache any more.
        """
        for request_id in set(failed):
            self._ledger.load_failed(request_id)
        if problem:
            self.child.stop(problem)
        for request_id in output.finished_recving or ():
            self._ledger.load_ended(request_id)
        self.child.call("update_connector_output", output)

    def finished(self, request: Any) -> bool:
        """The request ended; True if its blocks are still read by the child."""
        request_id = request.request_id
        goodbye = self._ledger.finished(request_id)
        self._promised.pop(request_id, None)
        if goodbye is Goodbye.WAIT and not self.child.problem:
            return False
        shown = self._shown.pop(request_id, None)
        if goodbye in (Goodbye.NOTHING, Goodbye.WAIT) or shown is None:
            return False
        if goodbye is Goodbye.RELEASE:
            self.child.call("update_state_after_alloc", shown, NO_BLOCKS, 0)
        answer = self.child.call("request_finished", shown, [])
        if goodbye is not Goodbye.END_AFTER_SAVES or answer is None or not answer[0]:
            return False
        self._ended.add(request_id)
        return True

    def sent_by(self, request_id: str, *, store: bool, wire: bool) -> None:
        """The ended request's blocks are still read: the workers report it when the last reader is done."""
        parts = [part for part, reads in ((Part.STORE, store), (Part.WIRE, wire)) if reads]
        self._step.sends += (Join(request_id, frozenset(parts)),)

    def hit_tokens(self, request_id: str) -> int:
        """What LMCache loads for an allocated request."""
        return self._ledger.loads(request_id)

    @property
    def needs_steps(self) -> bool:
        """Whether something of a request that is over still waits for LMCache."""
        return not self.child.problem and bool(self._ledger.unanswered())

    def snapshot(self) -> dict[str, object]:
        """The debug view."""
        return {
            "url": self._settings.url,
            "inactive_reason": self.child.problem,
            "tracked_requests": self._ledger.tracked,
            "unanswered_lookups": len(self._ledger.unanswered()),
            "mean_lookup_s": self._lookup_s / self._lookups if self._lookups else None,
            "totals": dict(self._ledger.totals),
        }

    # inside

    def _ask(self, shown: ShownRequest, cached_tokens: int) -> int | None:
        """Tokens beyond the cached ones, None for "not yet", 0 once LMCache is not used any more."""
        answer = self.child.call("get_num_new_matched_tokens", shown, cached_tokens)
        return 0 if answer is None else answer[0]

    def _join(
        self, request_id: str, block_ids: list[int], cached_tokens: int, store_tokens: int, wire_tokens: int
    ) -> Join:
        size = self._block_size
        first = cached_tokens // size
        behind_store = -(-(cached_tokens + store_tokens) // size)
        parts = [part for part, tokens in ((Part.STORE, store_tokens), (Part.WIRE, wire_tokens)) if tokens]
        return Join(
            request_id,
            frozenset(parts),
            block_ids=tuple(block_ids[first:]),
            store_block_ids=tuple(block_ids[first:behind_store]) if store_tokens else (),
            kept_block_ids=tuple(block_ids[:first]),
        )

    def _told(self, output: "SchedulerOutput") -> dict[str, int]:
        cached = output.scheduled_cached_reqs
        before = {r.req_id: r.num_computed_tokens for r in output.scheduled_new_reqs}
        before.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        told = {}
        for request_id, tokens in before.items():
            after = tokens + output.num_scheduled_tokens[request_id]
            if (more := self._ledger.computed(request_id, tokens, after)) is not None:
                told[request_id] = more
        return told

    def _settle_late_answers(self) -> None:
        for request_id in self._ledger.unanswered():
            shown = self._shown.get(request_id)
            if shown is not None and self._ask(shown, 0) is None:
                continue
            self.child.call("update_state_after_alloc", shown, NO_BLOCKS, 0)
            if self._ledger.answered(request_id):
                self.child.call("request_finished", shown, [])
                self._shown.pop(request_id, None)


class LMCacheWorker:
    """One worker rank's half: joins the child's loads and saves with ours."""

    def __init__(self, child: Any, problem: str) -> None:
        self.child = Child(child, problem)
        self._loads = Joined()
        self._sends = Joined()
        self._step = TierStep()
        self._bound = False
        self._failed: set[str] = set()

    def register(self, kv_caches: dict[str, Any]) -> None:
        """The engine's caches exist."""
        self.child.call("register_kv_caches", kv_caches)

    def bind(self, step: TierStep | None) -> None:
        """A step begins."""
        self._step = step or TierStep()
        for join in self._step.loads:
            self._loads.open(join)
        for join in self._step.sends:
            self._sends.open(join)
        self._bound = not self.child.problem and self._step.metadata is not None
        if self._bound:
            self.child.call("bind_connector_metadata", self._step.metadata)
        else:
            self._failed |= self._loads.store_failed(join.request_id for join in self._step.loads)

    def preempt(self, step: TierStep | None) -> None:
        """Blocks are about to be overwritten."""
        if step is not None and step.metadata is not None:
            self.child.call("handle_preemptions", step.metadata)

    def start_loads(self, forward_context: Any) -> None:
        """Submit the step's loads."""
        if self._bound:
            self.child.call("start_load_kv", forward_context)

    def start_saves(self) -> None:
        """Submit the step's saves."""
        if self._bound:
            self.child.call("wait_for_save")

    def completions(self, own: Completions) -> Completions:
        """What the engine is told after a step: a request once, when all that moves its KV has ended."""
        results = self.child.call("get_transfer_results", set(self._step.ended))
        if results is not None:
            errors = self.child.call("get_block_ids_with_load_errors") or set()
            self._failed |= self._loads.store_invalid(errors)
            self._loads.ended(Part.STORE, sorted(results.finished_recving))
            self._sends.ended(Part.STORE, sorted(results.finished_sending))
        else:
            self._failed |= self._loads.store_failed()
            self._sends.store_failed()
        self._step = replace(self._step, ended=frozenset())
        self._loads.invalid(own.invalid_block_ids)
        self._loads.ended(Part.WIRE, own.received)
        self._sends.ended(Part.WIRE, own.released)
        received, invalid = self._loads.take()
        released, _ = self._sends.take()
        return Completions(tuple(received), frozenset(invalid), tuple(released))

    def take_failed(self) -> tuple[str, ...]:
        """Requests that LMCache did not serve as promised, since the last call."""
        failed, self._failed = self._failed, set()
        return tuple(sorted(failed))

    def unbind(self) -> None:
        """A step is over."""
        if self._bound:
            self.child.call("clear_connector_metadata")

    @property
    def unexpected(self) -> int:
        """Reports of the child, or of ours, that nobody waited for."""
        return self._loads.unexpected + self._sends.unexpected
