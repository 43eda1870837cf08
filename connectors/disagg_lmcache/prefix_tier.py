"""LMCache under a prefill engine whose requests may wait before they are computed; engine's thread, no engine types.

    loading     asked until it says False: what the store has of a prompt is being fetched, or copied into pages
    computed    more of the prompt stands in its pages: whole chunks that the store lacks are copied out
    reading     whether its pages are still being copied from: the engine must keep them
    gone        the request left the engine, however it ended
    step        each turn of the engine: copy, for so long

What was fetched becomes a prefix of the engine's own cache before the request is queued, so that the engine finds it
like anything else it holds. Everything before that is private memory: an answer that comes late, or not at all, costs
time, and the prompt is computed.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

from disagg_lmcache.kv_chunks import PagedKV, gather_steps, namespace_of, new_chunk, scatter_steps
from disagg_lmcache.prefix_store import Found, PrefixStore
from disagg_lmcache.server_client import ServerClient
from disagg_plugin.boundary import boundary, guarded
from disagg_plugin.cache_settings import LMCacheSettings
from disagg_plugin.control.messages import ModelIdentity
from disagg_plugin.control.prompt_export import ExportedPrompt
from disagg_plugin.lmcache_check import require_installed, unreachable

logger = logging.getLogger(__name__)


class Room(Protocol):
    """Pages for a prompt's prefix.

    Attributes:
        pages: From the first token on, those that the engine's cache held already included.
        cached_tokens: So many tokens of them.
    """

    @property
    def pages(self) -> tuple[int, ...]: ...
    @property
    def cached_tokens(self) -> int: ...


_Room = TypeVar("_Room", bound=Room)


class PrefixCache(Protocol[_Room]):
    """The engine's own prefix cache."""

    def cached_tokens(self, prompt: ExportedPrompt) -> int:
        """How much of the prompt it holds."""
        ...

    def reserve(self, prompt: ExportedPrompt, end: int) -> _Room | None:
        """Pages for the first ``end`` tokens, of which it may hold some; None: there is no room now."""
        ...

    def publish(self, room: _Room, end: int) -> None:
        """The pages hold KV up to ``end``: the cache's from now on."""
        ...

    def cancel(self, room: _Room) -> None:
        """Its new pages are free again."""
        ...


@dataclass(slots=True, eq=False)
class _Prompt(Generic[_Room]):
    request: ExportedPrompt
    looking: bool = False
    room: _Room | None = None  # while it is filled
    chunk_tokens: int = 0  # 0: none of it is stored
    stored_tokens: int = 0  # up to here it is in the store, or on its way there
    session: str = ""  # under which its chunks are stored
    reading: int = 0  # copies out of its pages that have not ended
    gone: bool = False


@dataclass(slots=True, eq=False)
class _Copy(Generic[_Room]):
    prompt: _Prompt[_Room]
    steps: Iterator[None]
    then: Callable[[], None]


class PrefixTier(Generic[_Room]):
    """All prompts of one prefill engine.

    Attributes:
        broken: It gave up; nothing is looked up or stored any more.
    """

    consequence = "LMCache is not used"

    def __init__(
        self,
        store: PrefixStore,
        view: PagedKV,
        cache: PrefixCache[_Room],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._view = view
        self._cache = cache
        self._clock = clock
        self._prompts: dict[str, _Prompt[_Room]] = {}
        self._copies: deque[_Copy[_Room]] = deque()
        self._totals: Counter[str] = Counter()
        self.broken = False

    def loading(self, request: ExportedPrompt) -> bool:
        """Whether the request must wait before it is queued."""
        return bool(self._loading(request))

    @boundary
    def _loading(self, request: ExportedPrompt) -> bool:
        prompt = self._prompts.get(request.rid)
        if prompt is None:
            prompt = self._begin(request)
        if prompt.looking and (found := self._store.answer(request.rid)) is not None:
            prompt.looking = False
            self._found(prompt, found)
        return prompt.looking or prompt.room is not None

    @boundary
    def computed(self, request: ExportedPrompt) -> None:
        """More of the prompt stands in its pages."""
        prompt, size = self._prompts.get(request.rid), self._store.chunk_tokens
        if prompt is None or prompt.chunk_tokens != size:  # none of it, or for another server than this one
            return
        while size and prompt.stored_tokens + size <= request.tokens:
            self._copy_out(prompt, prompt.stored_tokens)
            prompt.stored_tokens += size

    def reading(self, request: ExportedPrompt) -> bool:
        """Whether the engine must keep its pages for us."""
        prompt = self._prompts.get(request.rid)
        return prompt is not None and prompt.reading > 0

    @boundary
    def gone(self, request: ExportedPrompt) -> None:
        """The request left the engine: its pages are the engine's again."""
        if (prompt := self._prompts.pop(request.rid, None)) is not None:
            prompt.gone = True
            self._store.forget(request.rid)
            self._cancel(prompt)
            if prompt.session:
                self._store.end(prompt.session)

    @boundary
    def step(self, budget_s: float) -> None:
        """Copy for about so long; a part of a chunk at least."""
        until_s = self._clock() + budget_s
        while self._copies:
            copy = self._copies[0]
            if copy.prompt.gone or next(copy.steps, self) is self:
                self._copies.popleft()
                if not copy.prompt.gone:
                    copy.then()
            if self._clock() >= until_s:
                return

    @property
    def open(self) -> bool:
        """Whether pages are in use, or requests wait, for us."""
        return bool(self._copies) or any(prompt.looking for prompt in self._prompts.values())

    def stop(self, reason: str) -> None:
        """Nothing of the store may be used any more, nor be stored; what is on its way is dropped."""
        self._store.stop(reason)
        for prompt in self._prompts.values():
            prompt.looking, prompt.reading, prompt.chunk_tokens = False, 0, 0
            self._store.forget(prompt.request.rid)
            self._cancel(prompt)
        self._copies.clear()

    def give_up(self) -> None:
        """After an error of ours."""
        self.broken = True
        guarded(self.stop)("internal_error")  # what went wrong may have left it in disorder; the requests come first
        self._prompts.clear()

    def close(self) -> None:
        """End the store's threads."""
        self._store.close()

    def figures(self) -> dict[str, object]:
        """For the debug view and the metrics."""
        view = self._store.figures()
        totals = Counter(view["totals"])  # type: ignore[call-overload]  # a dict of counts
        return {**view, "tracked_requests": len(self._prompts), "totals": dict(totals + self._totals)}

    # -- inside ----------------------------------------------------------------------------------------------------

    def _begin(self, request: ExportedPrompt) -> _Prompt[_Room]:
        prompt = self._prompts[request.rid] = _Prompt[_Room](request)
        if not request.reusable:
            return prompt
        cached_tokens = self._cache.cached_tokens(request)
        prompt.chunk_tokens = size = self._store.chunk_tokens
        prompt.stored_tokens = cached_tokens // size * size if size else 0
        self._totals["device_hit_tokens"] += cached_tokens
        prompt.looking = self._store.look_up(request.rid, request.prompt, request.cache_salt, cached_tokens)
        return prompt

    def _found(self, prompt: _Prompt[_Room], found: Found) -> None:
        prompt.stored_tokens = max(prompt.stored_tokens, found.end)
        if not found.chunks:
            return
        room = self._cache.reserve(prompt.request, found.end)
        if room is None:
            self._totals["unused_lookups"] += 1
            return
        if not found.start <= room.cached_tokens < found.end:  # the engine's cache changed meanwhile
            self._cache.cancel(room)
            self._totals["unused_lookups"] += 1
            return
        prompt.room = room
        # in front of copies for the store: these a request waits for
        self._copies.appendleft(_Copy(prompt, self._copy_in(room, found), lambda: self._publish(prompt, found)))

    def _copy_in(self, room: _Room, found: Found) -> Iterator[None]:
        size = (found.end - found.start) // len(found.chunks)
        for number, chunk in enumerate(found.chunks):
            at = found.start + number * size
            if (start := max(at, room.cached_tokens)) < at + size:
                yield from scatter_steps(self._view, room.pages, chunk, at, start, at + size)

    def _publish(self, prompt: _Prompt[_Room], found: Found) -> None:
        room, prompt.room = prompt.room, None
        assert room is not None
        self._cache.publish(room, found.end)
        self._totals["store_hit_tokens"] += found.end - room.cached_tokens

    def _copy_out(self, prompt: _Prompt[_Room], start: int) -> None:
        size, geometry = prompt.chunk_tokens, self._view.geometry
        if not self._store.takes(size * geometry.raw_token_bytes()):
            self._totals["store_dropped"] += 1
            prompt.chunk_tokens = 0  # what follows would never be found without it
            return
        prompt.session = prompt.session or self._store.new_puts()
        chunk = new_chunk(geometry, size)
        request, end = prompt.request, start + size
        pages = request.pages

        def store() -> None:
            prompt.reading -= 1
            self._store.put(prompt.session, request.prompt, request.cache_salt, (start, end), chunk)

        prompt.reading += 1
        self._copies.append(_Copy(prompt, gather_steps(self._view, pages, start, chunk), store))

    def _cancel(self, prompt: _Prompt[_Room]) -> None:
        if (room := prompt.room) is not None:
            prompt.room = None
            self._cache.cancel(room)


def open_store(settings: LMCacheSettings, model: ModelIdentity, view: PagedKV) -> PrefixStore:
    """The store at ``cache.lmcache.url``, for KV of this model; takes seconds where nobody answers.

    Raises:
        ConfigError: LMCache is not installed, or its server does not answer and has to.
    """
    require_installed()
    geometry = view.geometry
    connect = partial(ServerClient, settings, namespace_of(model, geometry), geometry, page_tokens=view.block_size)
    store = PrefixStore(connect, settings, geometry)
    if problem := store.start():
        error = unreachable(settings, problem)
        if settings.on_unreachable == "fail":
            store.close()
            raise error
        logger.warning("disagg: %s. It is used as soon as it answers.", error)
    return store
