"""The decode role in SGLang: a prompt's KV comes from elsewhere into the prefix cache, then the request is queued.

    take()       a request arrives; False: not ours, SGLang queues it at once
    commands()   each turn: ask again for those that wait, allocate pages for those that may begin
    ended()      each turn: what landed is inserted into the radix tree, and its request is queued
    abort()      before SGLang's own abort: what waits here goes where that looks

To SGLang an offloaded request is one that waited a little and then found most of its prompt cached. So sampling,
grammars, logprobs, streaming and aborts are its own, and a transfer that fails costs only what did not land.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from disagg_plugin.admission.engine_queue import EngineQueue
from disagg_plugin.control.decode_port import Claim, NotYet, PrefillLocally, PromptView, Route
from disagg_plugin.control.decode_side import DecodeSide
from disagg_plugin.control.prefill_workers import PrefillWorkers
from disagg_plugin.kv.commands import Command, RankReport
from disagg_plugin.kv.dataplane import Completions
from disagg_policies.admission_snapshots import ONLY_OFFLOAD
from disagg_sglang.support import local_only_reason, routing_of
from disagg_sglang.tree_pages import Reserved, TreePages, key_of

logger = logging.getLogger(__name__)

MAX_UNKNOWN_ROUTES = 16  # that are named in the log: they come from clients

Enqueue = Callable[[], None]


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request that SGLang has not queued yet."""

    req: Any
    prompt: PromptView
    enqueue: Enqueue
    cached_tokens: int
    landings: int  # that had been when it was looked up


@dataclass(slots=True, eq=False)
class _Receiving:
    """A request whose pages are being filled; ``enqueue`` is None once it was aborted."""

    req: Any
    enqueue: Enqueue | None
    reserved: Reserved
    end_token: int


class PromptFill:
    """All requests of one decode server that wait for KV; scheduler's thread."""

    def __init__(self, scheduler: Any, decode: DecodeSide, workers: PrefillWorkers, queue: EngineQueue) -> None:
        """
        Raises:
            ConfigError: The engine's prefix cache has not the calls that are needed.
        """
        self._scheduler = scheduler
        self._cache = TreePages(scheduler)
        self._decode = decode
        self._workers = workers
        self._queue = queue
        self._waiting: dict[str, _Waiting] = {}
        self._receiving: dict[str, _Receiving] = {}
        self._running: dict[str, Any] = {}  # SGLang's again; until they end
        self._queued: list[tuple[Any, Any]] = []  # (request, lock on what it was given) until SGLang locks it itself
        self._unknown_routes: set[tuple[str, int]] = set()
        self._landings = 0
        self._stopped: str | None = None

    @property
    def open(self) -> bool:
        """Whether anything here keeps the engine from being idle."""
        return bool(self._waiting or self._receiving or self._queued)

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn, or for room."""
        return len(self._waiting)

    @property
    def receiving(self) -> int:
        """Requests whose pages are being filled."""
        return len(self._receiving)

    def take(self, req: Any, enqueue: Enqueue) -> bool:
        """True if the request waits here; ``enqueue`` is called when it need not any more."""
        if req.rid in self._waiting or req.rid in self._receiving or req.rid in self._running:
            return False  # a client's second request under one id: SGLang's business
        if self.exceeds_queue_limit(req):
            return False  # SGLang refuses it
        cached_tokens, _ = self._match(req)
        self._queue.cached(req.rid, cached_tokens)
        waiting = _Waiting(req, self._view(req), enqueue, cached_tokens, self._landings)
        answer = self._ask(waiting)
        if isinstance(answer, PrefillLocally):
            self._running[req.rid] = req
            return False
        self._waiting[req.rid] = waiting
        if isinstance(answer, Claim):
            self._begin(waiting)
        return True

    def exceeds_queue_limit(self, req: Any) -> bool:
        """Whether ``--max-queued-requests`` is reached by what waits here and in SGLang's queue together."""
        limit = self._scheduler.max_queued_requests
        if limit is None or req.rid in self._running:  # that one was let in when it arrived
            return False
        return len(self._scheduler.waiting_queue) + len(self._waiting) + len(self._receiving) >= int(limit)

    def commands(self) -> list[Command]:
        """For the data plane; called once a turn."""
        for waiting in list(self._waiting.values()):
            match self._ask(waiting):
                case PrefillLocally():
                    self._enqueue(waiting)
                case Claim():
                    self._begin(waiting)
                case NotYet():
                    pass
        if self._queued:
            self._unlock_queued()
        self._forget_ended()
        return self._decode.step()

    def ended(self, report: RankReport, done: Completions) -> None:
        """What the data plane completed in this turn."""
        self._decode.reports((report,))
        for rid in done.received:
            self._decode.load_completed(rid)
            if (fill := self._receiving.pop(rid, None)) is not None:
                self._insert(fill, done.invalid_block_ids)

    def abort(self, rid: str, *, everything: bool) -> None:
        """SGLang is about to abort what begins with ``rid``: show it what waits here, and give its KV up."""
        for running in [known for known in self._running if everything or known.startswith(rid)]:
            del self._running[running]
            self._ended(running)
        mine = [waiting.req for waiting in self._waiting.values()]
        mine += [fill.req for fill in self._receiving.values() if fill.enqueue is not None]
        for req in mine:
            if everything or req.rid.startswith(rid):
                self._waiting.pop(req.rid, None)
                if (fill := self._receiving.get(req.rid)) is not None:
                    fill.enqueue = None  # its pages are free once the data plane let go of them
                self._ended(req.rid)
                self._scheduler.waiting_queue.append(req)

    def dropped(self, req: Any) -> None:
        """SGLang drops a request unserved: its queue is full, or it waited too long."""
        if self._running.pop(req.rid, None) is not None:
            self._ended(req.rid)

    def stop(self, reason: str) -> None:
        """From now on every prompt is computed here; of what has not landed yet, nothing is used."""
        self._stopped = reason
        for waiting in list(self._waiting.values()):
            self._ended(waiting.req.rid)
            self._enqueue(waiting)

    def give_up(self) -> None:
        """The data plane is closed, nothing lands any more: what waits here is computed here."""
        for fill in self._receiving.values():
            self._cache.cancel(fill.reserved)
        for _, lock in self._queued:
            self._cache.tree.unlock(lock)
        held = [waiting.enqueue for waiting in self._waiting.values()]
        held += [fill.enqueue for fill in self._receiving.values() if fill.enqueue is not None]
        self._waiting, self._receiving, self._running, self._queued = {}, {}, {}, []
        for enqueue in held:
            enqueue()

    def snapshot(self) -> dict[str, int]:
        """For the debug view."""
        return {"waiting": len(self._waiting), "receiving": len(self._receiving), "locked": len(self._queued)}

    # -- inside ------------------------------------------------------------------------------------------------

    def _ended(self, rid: str) -> None:
        self._decode.finished(rid)
        self._queue.finished(rid)

    def _enqueue(self, waiting: _Waiting) -> None:
        """The prompt is computed here after all."""
        del self._waiting[waiting.req.rid]
        self._running[waiting.req.rid] = waiting.req
        waiting.enqueue()

    def _computes_nothing(self) -> bool:
        scheduler = self._scheduler
        return scheduler.running_batch.is_empty() and scheduler.last_batch is None and scheduler.chunked_req is None

    def _unlock_queued(self) -> None:
        """Locks end when SGLang took the request, and when they may be what keeps it from taking any.

        Many prompts that landed at once may lock so much of the pool that none of them fits with its output: then
        nothing would run, and nothing would ever be freed. Unlocked, what the first one lacks room for is evicted.
        """
        scheduler = self._scheduler
        still = {id(req) for req in scheduler.waiting_queue}
        if self._computes_nothing() or scheduler._engine_paused:  # although they were queued a turn ago
            still = set()
        for req, lock in self._queued:
            if id(req) not in still:
                self._cache.tree.unlock(lock)
        self._queued = [(req, lock) for req, lock in self._queued if id(req) in still]

    def _forget_ended(self) -> None:
        """Requests that were served; and once SGLang has none at all, all: a safety net under ``dropped``."""
        scheduler = self._scheduler
        none = self._computes_nothing() and not (scheduler.waiting_queue or scheduler.grammar_manager.grammar_queue)
        for rid, req in list(self._running.items()):
            if none or req.finished():
                del self._running[rid]
                self._ended(rid)

    def _ask(self, waiting: _Waiting) -> PrefillLocally | NotYet | Claim:
        if waiting.landings != self._landings:  # perhaps of a prompt that begins like this one
            waiting.landings, (waiting.cached_tokens, _) = self._landings, self._match(waiting.req)
        free_tokens = self._cache.free_tokens()
        answer = self._decode.match(waiting.prompt, waiting.cached_tokens, free_tokens=free_tokens)
        self._queue.landing(waiting.req.rid, not isinstance(answer, PrefillLocally))
        return answer

    def _view(self, req: Any) -> PromptView:
        local_only = self._stopped or local_only_reason(req)
        route = None
        if local_only is None and req.bootstrap_room is not None:
            where = (str(req.bootstrap_host), int(req.bootstrap_port or 0))
            worker = self._workers.worker_at(*where)
            if worker is not None:
                route = Route(worker, int(req.bootstrap_room))
            else:
                local_only = "unknown_bootstrap_host"
                self._say_unknown(where)
        fields: list[tuple[str, object]] = [("cache_salt", req.cache_salt)] if req.cache_salt else []
        return PromptView(
            req.rid,
            req.origin_input_ids.tolist(),
            local_only,
            tuple(fields),
            cache_salt=req.cache_salt or "",
            priority=req.priority or 0,
            route=route,
            only_offload=routing_of(req) == ONLY_OFFLOAD,
        )

    def _say_unknown(self, where: tuple[str, int]) -> None:
        if where not in self._unknown_routes and len(self._unknown_routes) < MAX_UNKNOWN_ROUTES:
            self._unknown_routes.add(where)
            logger.warning(
                "disagg: a router names %s:%d, which is none of prefill_workers or not connected: prefilled locally",
                *where,
            )

    def _match(self, req: Any) -> tuple[int, Any]:
        """(tokens of the prompt that the prefix cache holds, the node where they end)."""
        return self._cache.match(key_of(req, len(req.origin_input_ids) - 1))

    def _begin(self, waiting: _Waiting) -> None:
        """Pages for what is missing; if there are none right now, the next turn asks again."""
        req = waiting.req
        cached, node = self._match(req)
        if cached != waiting.cached_tokens:
            waiting.cached_tokens = cached
            if not isinstance(self._ask(waiting), Claim):
                return
        end = len(req.origin_input_ids) - 1
        reserved = self._cache.reserve(key_of(req, end), (cached, node), end)
        if reserved is None:
            return
        del self._waiting[req.rid]
        self._receiving[req.rid] = _Receiving(req, waiting.enqueue, reserved, end)
        self._decode.allocated(req.rid, reserved.pages, end - cached)

    def _insert(self, fill: _Receiving, invalid: frozenset[int]) -> None:
        """Give what landed to the prefix cache and the rest back, then let the request be queued."""
        reserved, page = fill.reserved, self._cache.page
        first_new = reserved.cached_tokens // page
        pages = reserved.pages
        good = next((at for at in range(first_new, len(pages)) if pages[at] in invalid), len(pages))
        good = first_new if self._stopped else good
        self._landings += self._cache.publish(reserved, min(good, fill.end_token // page) * page)
        if fill.enqueue is None:
            self._cache.tree.unlock(reserved.lock)
            return
        self._queued.append((fill.req, reserved.lock))
        self._running[fill.req.rid] = fill.req
        fill.enqueue()
