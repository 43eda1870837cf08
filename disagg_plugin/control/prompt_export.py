"""Prompts that a prefill engine computes for others, where the engine says of each what has been computed.

    arrived      it came over HTTP; its offer may still be under way
    ticket_of    asked until it says something: was it offered?
    batch_starts, computed   more of it is being, has been computed
    gone         it left the engine, however it ended
    commands, ended          each turn of the engine, around the data plane's work

Scheduler's thread. No engine types: a prompt is whatever has what ``ExportedPrompt`` names.
"""

from collections.abc import Callable, Iterable
from typing import Protocol

from disagg_plugin.admission.engine_queue import EngineQueue
from disagg_plugin.boundary import boundary
from disagg_plugin.control.load import LoadTracker
from disagg_plugin.control.load_reports import HeldPrompt
from disagg_plugin.control.prefill_service import PrefillService
from disagg_plugin.control.prefill_side import PrefillSide
from disagg_plugin.control.step_times import PromptWork
from disagg_plugin.kv.commands import Command, RankReport
from disagg_plugin.kv.dataplane import Completions


class ExportedPrompt(Protocol):
    """One request of a prefill engine.

    Attributes:
        rid: The engine's id of it.
        bootstrap_room: The number under which it was offered.
        pages, tokens: What stands in the engine's cache so far, from the first token on.
        holding: The engine must not free the pages yet.
        reusable: The prompt's tokens and salt say everything that its KV depends on.
    """

    rid: str
    bootstrap_room: int
    prompt: list[int]
    reusable: bool
    cache_salt: str
    priority: int
    pages: tuple[int, ...]
    tokens: int
    holding: bool


class PrefixSource(Protocol):
    """A store beside the engine's own prefix cache: ``disagg_lmcache.prefix_tier``."""

    def loading(self, request: ExportedPrompt) -> bool: ...
    def computed(self, request: ExportedPrompt) -> None: ...
    def reading(self, request: ExportedPrompt) -> bool: ...
    def gone(self, request: ExportedPrompt) -> None: ...


class PromptExport:
    """All such prompts of one engine.

    Attributes:
        offer_timeout_s: How long a prompt may wait for its offer.
        broken: It gave up: every prompt of it fails.
    """

    def __init__(
        self,
        prefill: PrefillSide,
        service: PrefillService,
        load: LoadTracker,
        queue: EngineQueue,
        *,
        pages_wait_s: float,
        step: Callable[[], None],
        kv_usage: Callable[[], float],
        give_up: Callable[[], None],
        prefixes: PrefixSource | None = None,
    ) -> None:
        self._prefill = prefill
        self._service = service
        self._load = load
        self._queue = queue
        self._kv_usage = kv_usage
        self.offer_timeout_s = pages_wait_s
        self.step = step
        self.give_up = give_up
        self._prefixes = prefixes
        self.broken = False
        self._requests: dict[str, ExportedPrompt] = {}

    @boundary
    def arrived(self, request: ExportedPrompt) -> None:
        """A request came over HTTP; its offer may still be under way."""
        self._requests[request.rid] = request
        self._load.arrived(request.rid, len(request.prompt))
        self._queue.arrived(request.rid, len(request.prompt), request.priority)
        self._publish()

    @boundary
    def ticket_of(self, request: ExportedPrompt) -> bool | None:
        """True: offered; False: another prompt was, or this one was withdrawn; None: nothing yet."""
        transfer_id = self._prefill.offered_in_room(request.bootstrap_room)
        if transfer_id is None:
            return False if self._prefill.withdrawn_in_room(request.bootstrap_room) else None
        return self._prefill.new_request(request.rid, transfer_id, len(request.prompt), prompt=request.prompt)

    def loading(self, request: ExportedPrompt) -> bool:
        """Whether a prefix of it is being loaded: it must not be queued yet."""
        return self._prefixes is not None and request.rid in self._requests and self._prefixes.loading(request)

    def reading(self, request: ExportedPrompt) -> bool:
        """Whether its pages are being read for the prefix store."""
        return self._prefixes is not None and self._prefixes.reading(request)

    @boundary
    def batch_starts(self, works: Iterable[PromptWork]) -> None:
        """A forward that computes these parts of prompts is about to be launched."""
        for work in works:
            if (request := self._requests.get(work.request_id)) is not None:
                self._prefill.scheduled(request.rid, request.tokens, request.pages)
        self._publish()

    @boundary
    def computed(self, request: ExportedPrompt) -> None:
        """More of the prompt stands in its pages; after the last of it the engine must keep them while we read."""
        self._prefill.scheduled(request.rid, request.tokens, request.pages)
        if request.tokens >= len(request.prompt):
            self._service.holds(HeldPrompt(request.prompt, request.cache_salt))
            request.holding = self._prefill.finished(request.rid, completed=True)
        if self._prefixes is not None:
            self._prefixes.computed(request)
        self.step()

    @boundary
    def gone(self, request: ExportedPrompt) -> None:
        """The request left the engine, however it ended."""
        if self._requests.pop(request.rid, None) is not None:
            self._prefill.finished(request.rid, completed=False)
            if self._prefixes is not None:
                self._prefixes.gone(request)
            self.step()  # its pages are the engine's again after this call: nothing may read them any more
            self._load.finished(request.rid)
            self._queue.finished(request.rid)
            self._publish()

    def commands(self) -> list[Command]:
        """For the data plane; called once a turn."""
        return self._prefill.step()

    def cache_reset(self) -> None:
        """The prefix cache is empty."""
        self._service.cache_reset()

    def ended(self, report: RankReport, done: Completions) -> None:
        """What the data plane completed in this turn."""
        self._prefill.reports((report,))
        for rid in done.released:
            self._prefill.released(rid)
            if (request := self._requests.get(rid)) is not None:
                request.holding = False

    def _publish(self) -> None:
        self._service.publish(self._load.load(), self._kv_usage())
