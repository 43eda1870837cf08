"""What a store beside the engine (LMCache) holds of each request's prompt, and what it must be told. Pure, no I/O.

    look_up()    each step while the request waits: tokens that the store will load, or None: ask again
    allocated()  the engine gave blocks: so many of them will be filled by the store
    computed()   each step in which the request runs: how many tokens more the store may take as computed
    load_ended() the engine has the load's blocks back
    preempted()  its blocks are gone; it begins again
    finished()   the request ended, in any state: what to say to the store

A look-up has a deadline: after it the request goes on without the store, and its late answer only gives back what it
locked. A request that the store served badly once is not shown to it again, as it keeps books of its own: blocks that
it believes to know would be others by then.

Positions are counted from token 0. ``computed`` corrects the store's books in both directions: KV that came over the
wire counts (the store would not know), KV whose load failed does not (the store would pass garbage on).
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto


class Phase(Enum):
    """How far a request has come with the store."""

    ASKED = auto()  # no answer yet
    FOUND = auto()  # answered; the store keeps what it found for us
    LOADING = auto()  # its blocks wait for KV, of the store or of the wire
    SERVED = auto()
    PREEMPTED = auto()
    WITHDRAWN = auto()  # the store knows nothing of it, or is not shown it any more


class Goodbye(Enum):
    """What to tell the store when a request ends."""

    NOTHING = auto()
    RELEASE = auto()  # it looked up for nothing: let it unlock what it found
    WAIT = auto()  # its answer is still to come: ask until it is there, then release
    END = auto()  # the request is over; nothing of its blocks is read any more
    END_AFTER_SAVES = auto()  # the request is over; blocks may still be read


@dataclass(slots=True)
class _Entry:
    asked_s: float
    phase: Phase = Phase.ASKED
    answered: bool = False
    cached_tokens: int = 0  # at the last answer
    found_tokens: int = 0
    load_tokens: int = 0
    believed_tokens: int = 0  # what the store takes as computed


class PrefixLedger:
    """The store's view of one scheduler's requests.

    Args:
        block_size: Tokens a block; what the store holds is whole blocks.
        store_received: Whether the store may have what came over the wire.
    """

    def __init__(
        self,
        *,
        block_size: int,
        lookup_timeout_s: float,
        store_received: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._block_size = block_size
        self._lookup_timeout_s = lookup_timeout_s
        self._store_received = store_received
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._unanswered: dict[str, float] = {}  # given up, or their request ended; since when
        self.totals: Counter[str] = Counter()

    def look_up(self, request_id: str, cached_tokens: int, ask: Callable[[], int | None]) -> int | None:
        """Tokens beyond the engine's ``cached_tokens`` that the store will load, or None: not known yet.

        Args:
            ask: Asks the store about this request: tokens beyond the cached ones, or None for "not yet".
        """
        entry = self._entries.get(request_id)
        if entry is None or entry.phase is Phase.PREEMPTED:
            entry = self._entries[request_id] = _Entry(self._clock())
            self.totals["lookups"] += 1
        match entry.phase:
            case Phase.WITHDRAWN:
                return 0
            case Phase.LOADING | Phase.SERVED:  # the engine begins again: nothing of the load could be used
                self._withdraw(entry, "load_failed")
                return 0
            case Phase.FOUND if entry.cached_tokens == cached_tokens:
                return max(0, entry.found_tokens - cached_tokens)
            case _:
                return self._ask(request_id, entry, cached_tokens, ask)

    def _ask(self, request_id: str, entry: _Entry, cached_tokens: int, ask: Callable[[], int | None]) -> int | None:
        answer = ask()
        if answer is None:
            if self._clock() - entry.asked_s < self._lookup_timeout_s:
                return None
            self._withdraw(entry, "lookup_timeout")
            self._unanswered[request_id] = self._clock()
            return 0
        entry.phase = Phase.FOUND
        entry.cached_tokens = cached_tokens
        entry.found_tokens = cached_tokens + answer if answer > 0 else 0
        return max(0, answer)

    def withdraw(self, request_id: str) -> None:
        """Never ask about this request: a request that nothing is looked up for has no books at the store."""
        self._entries.setdefault(request_id, _Entry(self._clock())).phase = Phase.WITHDRAWN

    def allocated(self, request_id: str, load_tokens: int, wire_tokens: int) -> bool:
        """Blocks were given; whether the store is to be told. For both calls that an asynchronous load has."""
        entry = self._entries.get(request_id)
        if entry is None or entry.phase is Phase.WITHDRAWN:
            return False
        if entry.phase is not Phase.FOUND:
            return True
        entry.load_tokens = load_tokens
        held = max(entry.cached_tokens, entry.found_tokens)
        # a whole prompt is found less its last token, which the engine computes: the store counts it none the less
        entry.believed_tokens = held + (-held % self._block_size if held == entry.found_tokens else 0)
        entry.phase = Phase.LOADING if load_tokens + wire_tokens > 0 else Phase.SERVED
        self.totals["store_hit_tokens"] += load_tokens
        return True

    def computed(self, request_id: str, before_tokens: int, after_tokens: int) -> int | None:
        """How many tokens more the store may take as computed after this step, or None: it knows not of the request.

        Negative where it takes too many for computed.

        Args:
            before_tokens, after_tokens: What is computed before and after the step, from token 0.
        """
        entry = self._entries.get(request_id)
        if entry is None or entry.phase not in (Phase.SERVED, Phase.LOADING):
            return None
        more = after_tokens - entry.believed_tokens
        if not self._store_received:
            more = min(more, after_tokens - before_tokens)
        entry.believed_tokens += more
        return more

    def load_ended(self, request_id: str) -> None:
        """The load's blocks are the engine's again."""
        entry = self._entries.get(request_id)
        if entry is not None and entry.phase is Phase.LOADING:
            entry.phase = Phase.SERVED

    def preempted(self, request_id: str) -> None:
        """The engine took the request's blocks away; it will look up anew."""
        entry = self._entries.get(request_id)
        if entry is not None and entry.phase in (Phase.LOADING, Phase.SERVED):
            entry.phase = Phase.PREEMPTED

    def load_failed(self, request_id: str) -> None:
        """The store did not deliver what it promised; the engine computes it."""
        entry = self._entries.get(request_id)
        self.totals["failed_loads"] += 1
        if entry is not None:
            self.totals["failed_load_tokens"] += entry.load_tokens

    def loads(self, request_id: str) -> int:
        """Tokens that the store loads, or loaded, for the request."""
        entry = self._entries.get(request_id)
        return entry.load_tokens if entry is not None else 0

    def finished(self, request_id: str) -> Goodbye:
        """The request ended; called once."""
        entry = self._entries.pop(request_id, None)
        if entry is None:
            return Goodbye.NOTHING
        match entry.phase:
            case Phase.ASKED:
                self._unanswered[request_id] = self._clock()
                self.totals["unused_lookups"] += 1
                return Goodbye.WAIT
            case Phase.FOUND:
                self.totals["unused_lookups"] += 1
                return Goodbye.RELEASE
            case Phase.LOADING:
                return Goodbye.END
            case Phase.SERVED | Phase.PREEMPTED:
                return Goodbye.END_AFTER_SAVES
            case Phase.WITHDRAWN if request_id in self._unanswered:
                return Goodbye.WAIT
            case _:
                return Goodbye.END if entry.answered else Goodbye.NOTHING

    def unanswered(self) -> list[str]:
        """Look-ups that nobody waits for any more, whose answers are still to come."""
        return list(self._unanswered)

    def answered(self, request_id: str) -> bool:
        """The late answer is there and released; whether its request is over too, so that the store can forget it."""
        self._unanswered.pop(request_id, None)
        entry = self._entries.get(request_id)
        if entry is not None:
            entry.answered = True
        return entry is None

    def knows(self, request_id: str) -> Phase | None:
        """How far the request has come, if the ledger has it."""
        entry = self._entries.get(request_id)
        return entry.phase if entry is not None else None

    @property
    def tracked(self) -> int:
        """Requests in the ledger, and answers still to come."""
        return len(self._entries) + len(self._unanswered)

    def _withdraw(self, entry: _Entry, reason: str) -> None:
        entry.answered = entry.phase is not Phase.ASKED
        entry.phase = Phase.WITHDRAWN
        self.totals[reason] += 1
