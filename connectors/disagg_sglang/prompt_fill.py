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

import torch

from disagg_plugin.control.decode_port import Claim, NotYet, PrefillLocally, PromptView, Route
from disagg_plugin.control.decode_side import DecodeSide
from disagg_plugin.control.prefill_workers import PrefillWorkers
from disagg_plugin.kv.commands import Command, RankReport
from disagg_plugin.kv.dataplane import Completions
from disagg_sglang.support import local_only_reason

logger = logging.getLogger(__name__)

Enqueue = Callable[[], None]


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request that SGLang has not queued yet."""

    req: Any
    prompt: PromptView
    enqueue: Enqueue
    cached_tokens: int


@dataclass(slots=True, eq=False)
class _Receiving:
    """A request whose pages are being filled; ``enqueue`` is None once it was aborted."""

    req: Any
    enqueue: Enqueue | None
    prefix_slots: torch.Tensor
    new_slots: torch.Tensor
    pages: tuple[int, ...]
    end_token: int
    lock: Any


class PromptFill:
    """All requests of one decode server that wait for KV; scheduler's thread."""

    def __init__(self, scheduler: Any, decode: DecodeSide, workers: PrefillWorkers) -> None:
        self._scheduler = scheduler
        self._tree = scheduler.tree_cache
        self._allocator = scheduler.token_to_kv_pool_allocator
        self._page = int(self._allocator.page_size)
        self._decode = decode
        self._workers = workers
        self._waiting: dict[str, _Waiting] = {}
        self._receiving: dict[str, _Receiving] = {}
        self._running: dict[str, Any] = {}  # SGLang's again; until they end
        self._queued: list[tuple[Any, Any]] = []  # (request, lock on what it was given) until SGLang locks it itself
        self._unknown_routes: set[tuple[str, int]] = set()

    @property
    def open(self) -> bool:
        """Whether anything here keeps the engine from being idle."""
        return bool(self._waiting or self._receiving or self._queued)

    def take(self, req: Any, enqueue: Enqueue) -> bool:
        """True if the request waits here; ``enqueue`` is called when it need not any more."""
        if req.rid in self._waiting or req.rid in self._receiving or req.rid in self._running:
            return False  # a client's second request under one id: SGLang's business
        cached_tokens, _ = self._match(req)
        waiting = _Waiting(req, self._view(req), enqueue, cached_tokens)
        answer = self._ask(waiting)
        if isinstance(answer, PrefillLocally):
            self._running[req.rid] = req
            return False
        self._waiting[req.rid] = waiting
        if isinstance(answer, Claim):
            self._begin(waiting)
        return True

    def commands(self) -> list[Command]:
        """For the data plane; called once a turn."""
        for waiting in list(self._waiting.values()):
            match self._ask(waiting):
                case PrefillLocally():
                    del self._waiting[waiting.req.rid]
                    self._running[waiting.req.rid] = waiting.req
                    waiting.enqueue()
                case Claim():
                    self._begin(waiting)
                case NotYet():
                    pass
        if self._queued:
            still = {id(req) for req in self._scheduler.waiting_queue}
            for req, lock in self._queued:
                if id(req) not in still:
                    self._tree.unlock(lock)
            self._queued = [(req, lock) for req, lock in self._queued if id(req) in still]
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
            self._decode.finished(running)
        mine = [waiting.req for waiting in self._waiting.values()]
        mine += [fill.req for fill in self._receiving.values() if fill.enqueue is not None]
        for req in mine:
            if everything or req.rid.startswith(rid):
                self._waiting.pop(req.rid, None)
                if (fill := self._receiving.get(req.rid)) is not None:
                    fill.enqueue = None  # its pages are free once the data plane let go of them
                self._decode.finished(req.rid)
                self._scheduler.waiting_queue.append(req)

    def snapshot(self) -> dict[str, int]:
        """For the debug view."""
        return {"waiting": len(self._waiting), "receiving": len(self._receiving), "locked": len(self._queued)}

    # -- inside ------------------------------------------------------------------------------------------------

    def _forget_ended(self) -> None:
        """Of requests that it drops unserved SGLang says nothing; once it has none at all, they are gone."""
        scheduler = self._scheduler
        queued = scheduler.waiting_queue or scheduler.chunked_req or scheduler.grammar_manager.grammar_queue
        none = not queued and scheduler.running_batch.is_empty() and scheduler.last_batch is None
        for rid, req in list(self._running.items()):
            if none or req.finished():
                del self._running[rid]
                self._decode.finished(rid)

    def _ask(self, waiting: _Waiting) -> PrefillLocally | NotYet | Claim:
        free_tokens = int(self._allocator.available_size() + self._tree.evictable_size())
        return self._decode.match(waiting.prompt, waiting.cached_tokens, free_tokens=free_tokens)

    def _view(self, req: Any) -> PromptView:
        local_only = local_only_reason(req)
        route = None
        if local_only is None and req.bootstrap_room is not None:
            where = (str(req.bootstrap_host), int(req.bootstrap_port))
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
        )

    def _say_unknown(self, where: tuple[str, int]) -> None:
        if where not in self._unknown_routes:
            self._unknown_routes.add(where)
            logger.warning(
                "disagg: a router names %s:%d, which is none of prefill_workers or not connected: prefilled locally",
                *where,
            )

    def _match(self, req: Any) -> tuple[int, Any]:
        """(tokens of the prompt that the prefix cache holds, the node where they end)."""
        from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams

        key = _key(req, len(req.origin_input_ids) - 1)
        result = self._tree.match_prefix(MatchPrefixParams(key=key.page_aligned(self._page)))
        return int(result.device_prefix_len), result.last_device_node

    def _begin(self, waiting: _Waiting) -> None:
        """Pages for what is missing; if there are none right now, the next turn asks again."""
        from sglang.srt.mem_cache.common import evict_from_tree_cache

        req = waiting.req
        cached, node = self._match(req)
        if cached != waiting.cached_tokens:
            waiting.cached_tokens = cached
            if not isinstance(self._ask(waiting), Claim):
                return
        end = len(req.origin_input_ids) - 1
        lock = self._tree.lock(node)
        prefix_slots = self._tree.path_device_indices(node)[:cached].clone()
        needed = -(-(end - cached) // self._page) * self._page
        evict_from_tree_cache(self._tree, needed)
        new_slots = self._allocator.alloc(needed)
        if new_slots is None:
            self._tree.unlock(lock)
            return
        slots = torch.cat([prefix_slots, new_slots])
        pages = tuple((slots[:: self._page] // self._page).tolist())
        del self._waiting[req.rid]
        self._receiving[req.rid] = _Receiving(req, waiting.enqueue, prefix_slots, new_slots, pages, end, lock)
        self._decode.allocated(req.rid, pages, end - cached)

    def _insert(self, fill: _Receiving, invalid: frozenset[int]) -> None:
        """Give what landed to the prefix cache and the rest back, then let the request be queued."""
        from sglang.srt.mem_cache.base_prefix_cache import InsertParams

        cached, page = len(fill.prefix_slots), self._page
        first_new = cached // page
        good = next((at for at in range(first_new, len(fill.pages)) if fill.pages[at] in invalid), len(fill.pages))
        tokens = min(good, fill.end_token // page) * page
        if tokens > cached:
            slots = torch.cat([fill.prefix_slots, fill.new_slots])[:tokens].to(torch.int64)
            params = InsertParams(key=_key(fill.req, tokens), value=slots, prev_prefix_len=cached)
            lock = self._tree.lock(self._tree.insert(params).last_device_node)
            self._tree.unlock(fill.lock)
            fill.lock = lock
        left = fill.new_slots[max(tokens - cached, 0) :]
        if len(left):
            self._allocator.free(left)
        if fill.enqueue is None:
            self._tree.unlock(fill.lock)
            return
        self._queued.append((fill.req, fill.lock))
        self._running[fill.req.rid] = fill.req
        fill.enqueue()


def _key(req: Any, tokens: int) -> Any:
    from sglang.srt.mem_cache.radix_cache import RadixKey

    return RadixKey(req.origin_input_ids[:tokens], req.extra_key, cache_salt=req.cache_salt)
