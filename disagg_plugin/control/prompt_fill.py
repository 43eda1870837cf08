"""Prompts whose KV comes from prefill workers into the engine's prefix cache, before the engine queues the request.

    take()       a request arrives; False: not ours, the engine queues it at once
    commands()   each turn: ask again for those that wait, take pages for those that may begin
    ended()      each turn: what landed is given to the prefix cache, and its request is queued
    abort()      before the engine's own abort: what waits here goes where that looks

To the engine an offloaded request is one that waited a little and then found most of its prompt cached. So sampling,
grammars, logprobs, streaming and aborts are its own, and a transfer that fails costs only what did not land.

Scheduler's thread. The engine is whatever has what ``FillEngine`` names; see ``prompt_export`` for the other role.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from disagg_plugin.admission.engine_queue import EngineQueue
from disagg_plugin.control.decode_port import Claim, NotYet, PrefillLocally, PromptView
from disagg_plugin.control.decode_side import DecodeSide
from disagg_plugin.kv.commands import Command, RankReport
from disagg_plugin.kv.dataplane import Completions

Enqueue = Callable[[], None]


class FilledRequest(Protocol):
    """A request of the engine; ``rid`` is the engine's id of it."""

    @property
    def rid(self) -> str: ...


class FilledRoom(Protocol):
    """Pages for a prompt's first tokens: some that the prefix cache holds, locked, and new ones behind them."""

    @property
    def pages(self) -> tuple[int, ...]: ...
    @property
    def cached_tokens(self) -> int: ...


_Request = TypeVar("_Request", bound=FilledRequest)
_Room = TypeVar("_Room", bound=FilledRoom)


class FillEngine(Protocol[_Request, _Room]):
    """The engine's queue, and its prefix cache.

    Attributes:
        page_tokens: Tokens of one page.
    """

    page_tokens: int

    def view(self, request: _Request, stopped: str | None) -> PromptView:
        """What the decision needs; ``stopped``, if set, is why it must not be offloaded."""
        ...

    def match(self, request: _Request) -> tuple[int, Any]:
        """(tokens that the prefix cache holds, of all but the last one; where in it they end)."""
        ...

    def free_tokens(self) -> int: ...

    def reserve(self, request: _Request, matched: tuple[int, Any], end: int) -> _Room | None:
        """Pages for the first ``end`` tokens, of which the cache ``matched`` some just now; None: not so many."""
        ...

    def publish(self, room: _Room, tokens: int) -> bool:
        """Give the first tokens to the prefix cache, locked until ``unlock``, and free the other new pages.

        Returns:
            Whether the cache holds more than before.
        """
        ...

    def cancel(self, room: _Room) -> None:
        """Free the new pages, and end the lock."""
        ...

    def unlock(self, room: _Room) -> None: ...

    def queued(self) -> Collection[_Request]:
        """The engine's own queue."""
        ...

    def queue_limit(self) -> int | None: ...

    def computes_nothing(self) -> bool:
        """No request is being computed, although those in the queue were there a turn ago."""
        ...

    def is_paused(self) -> bool: ...

    def has_none(self) -> bool:
        """It has no request at all."""
        ...

    def has_ended(self, request: _Request) -> bool: ...

    def show(self, request: _Request) -> None:
        """Put it where the engine looks for requests to abort."""
        ...


@dataclass(slots=True, eq=False)
class _Waiting(Generic[_Request]):
    """A request that the engine has not queued yet."""

    req: _Request
    prompt: PromptView
    enqueue: Enqueue
    cached_tokens: int
    landings: int  # that had been when it was looked up


@dataclass(slots=True, eq=False)
class _Receiving(Generic[_Request, _Room]):
    """A request whose pages are being filled; ``enqueue`` is None once it was aborted."""

    req: _Request
    enqueue: Enqueue | None
    room: _Room
    end_token: int


class PromptFill(Generic[_Request, _Room]):
    """All requests of one decode engine that wait for KV."""

    def __init__(self, engine: FillEngine[_Request, _Room], decode: DecodeSide, queue: EngineQueue) -> None:
        self._engine = engine
        self._decode = decode
        self._queue = queue
        self._waiting: dict[str, _Waiting[_Request]] = {}
        self._receiving: dict[str, _Receiving[_Request, _Room]] = {}
        self._running: dict[str, _Request] = {}  # the engine's again; until they end
        self._queued: list[tuple[_Request, _Room]] = []  # locked until the engine locks what it was given itself
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

    def take(self, req: _Request, enqueue: Enqueue) -> bool:
        """True if the request waits here; ``enqueue`` is called when it need not any more."""
        if req.rid in self._waiting or req.rid in self._receiving or req.rid in self._running:
            return False  # a client's second request under one id: the engine's business
        if self.exceeds_queue_limit(req):
            return False  # the engine refuses it
        cached_tokens, _ = self._engine.match(req)
        self._queue.cached(req.rid, cached_tokens)
        waiting = _Waiting(req, self._engine.view(req, self._stopped), enqueue, cached_tokens, self._landings)
        answer = self._ask(waiting)
        if isinstance(answer, PrefillLocally):
            self._running[req.rid] = req
            return False
        self._waiting[req.rid] = waiting
        if isinstance(answer, Claim):
            self._begin(waiting)
        return True

    def exceeds_queue_limit(self, req: _Request) -> bool:
        """Whether the engine's queue limit is reached by what waits here and in its queue together."""
        limit = self._engine.queue_limit()
        if limit is None or req.rid in self._running:  # that one was let in when it arrived
            return False
        return len(self._engine.queued()) + len(self._waiting) + len(self._receiving) >= limit

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
        """The engine is about to abort what begins with ``rid``: show it what waits here, and give its KV up."""
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
                self._engine.show(req)

    def dropped(self, req: _Request) -> None:
        """The engine drops a request unserved: its queue is full, or it waited too long."""
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
            self._engine.cancel(fill.room)
        for _, room in self._queued:
            self._engine.unlock(room)
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

    def _enqueue(self, waiting: _Waiting[_Request]) -> None:
        """The prompt is computed here after all."""
        del self._waiting[waiting.req.rid]
        self._running[waiting.req.rid] = waiting.req
        waiting.enqueue()

    def _unlock_queued(self) -> None:
        """Locks end when the engine took the request, and when they may be what keeps it from taking any.

        Many prompts that landed at once may lock so much of the cache that none of them fits with its output: then
        nothing would run, and nothing would ever be freed. Unlocked, what the first one lacks room for is evicted.
        """
        still = {id(req) for req in self._engine.queued()}
        if self._engine.computes_nothing() or self._engine.is_paused():
            still = set()
        for req, room in self._queued:
            if id(req) not in still:
                self._engine.unlock(room)
        self._queued = [(req, room) for req, room in self._queued if id(req) in still]

    def _forget_ended(self) -> None:
        """Requests that were served; and once the engine has none at all, all: a safety net under ``dropped``."""
        none = self._engine.has_none()
        for rid, req in list(self._running.items()):
            if none or self._engine.has_ended(req):
                del self._running[rid]
                self._ended(rid)

    def _ask(self, waiting: _Waiting[_Request]) -> PrefillLocally | NotYet | Claim:
        if waiting.landings != self._landings:  # perhaps of a prompt that begins like this one
            waiting.landings, (waiting.cached_tokens, _) = self._landings, self._engine.match(waiting.req)
        free_tokens = self._engine.free_tokens()
        answer = self._decode.match(waiting.prompt, waiting.cached_tokens, free_tokens=free_tokens)
        self._queue.landing(waiting.req.rid, not isinstance(answer, PrefillLocally))
        return answer

    def _begin(self, waiting: _Waiting[_Request]) -> None:
        """Pages for what is missing; if there are none right now, the next turn asks again."""
        req = waiting.req
        matched = self._engine.match(req)
        if matched[0] != waiting.cached_tokens:
            waiting.cached_tokens = matched[0]
            if not isinstance(self._ask(waiting), Claim):
                return
        end = len(waiting.prompt.token_ids) - 1
        room = self._engine.reserve(req, matched, end)
        if room is None:
            return
        del self._waiting[req.rid]
        self._receiving[req.rid] = _Receiving(req, waiting.enqueue, room, end)
        self._decode.allocated(req.rid, room.pages, end - room.cached_tokens)

    def _insert(self, fill: _Receiving[_Request, _Room], invalid: frozenset[int]) -> None:
        """Give what landed to the prefix cache and the rest back, then let the request be queued."""
        room, page = fill.room, self._engine.page_tokens
        first_new = room.cached_tokens // page
        good = next((at for at in range(first_new, len(room.pages)) if room.pages[at] in invalid), len(room.pages))
        good = first_new if self._stopped else good
        self._landings += self._engine.publish(room, min(good, fill.end_token // page) * page)
        if fill.enqueue is None:
            self._engine.unlock(room)
            return
        self._queued.append((fill.req, room))
        self._running[fill.req.rid] = fill.req
        fill.enqueue()
