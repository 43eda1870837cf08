"""Prompts that arrive together and begin alike: the first one's transfer serves them all. Pure, no I/O.

A prompt whose next uncached piece is already on its way for another one waits for that (with a deadline) and is decided
on anew, when the engine's own prefix cache has what they share: then it needs its own rest only. It waits only where
that is at least half of what it needs, and never for something less urgent than itself.

    leader_of()   each time a request is to be decided on: for whom it waits, or None
    begin()       a request is offered: others may wait for it
    landed()      its KV is here; the engine's cache shows it a moment later
    end()         the request is over, or must not be waited for
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from disagg_plugin.serving.prefix_hash import CHUNK_TOKENS

SHOWS_WITHIN_S = 0.25  # from the end of a transfer until the engine's prefix cache has it
LEAST_SHARE = 0.5


@dataclass(slots=True)
class _Leader:
    hashes: tuple[int, ...]  # that it owns
    priority: int
    landed_s: float | None = None


@dataclass(slots=True)
class _Follower:
    hashes: Sequence[int]
    until_s: float


class SharedPrefixes:
    """Of one decode engine.

    Args:
        wait_s: Longest wait of one request for others; 0: none waits.
    """

    def __init__(self, wait_s: float, clock: Callable[[], float]) -> None:
        self._wait_s = wait_s
        self._clock = clock
        self._leaders: dict[str, _Leader] = {}
        self._owner: dict[int, str] = {}  # prefix hash: request
        self._followers: dict[str, _Follower] = {}

    def __contains__(self, request_id: str) -> bool:
        """Whether a request waits for another one."""
        return request_id in self._followers

    def __len__(self) -> int:
        return len(self._followers)

    def leader_of(
        self,
        request_id: str,
        prompt_tokens: int,
        hashes: Callable[[], Sequence[int]],
        *,
        cached_tokens: int,
        priority: int,
    ) -> str | None:
        """The request that this one should wait for; None: it is to be decided on now, and does not wait any more.

        Args:
            hashes: Of the prompt's prefixes; called only if they matter.
        """
        follower = self._followers.get(request_id)
        if follower is None:
            if not self._leaders or self._wait_s <= 0 or prompt_tokens - cached_tokens < CHUNK_TOKENS:
                return None
            follower = _Follower(hashes(), self._clock() + self._wait_s)
        leader = self._leader(follower, prompt_tokens, cached_tokens, priority)
        if leader is None or leader == request_id or self._clock() > follower.until_s:
            self._followers.pop(request_id, None)
            return None
        self._followers[request_id] = follower
        return leader

    def begin(self, request_id: str, hashes: Sequence[int], *, priority: int) -> None:
        """This request is offered to a prefill worker."""
        if self._wait_s <= 0 or not hashes:
            return
        owned = tuple([one for one in hashes if self._owner.setdefault(one, request_id) == request_id])
        self._leaders[request_id] = _Leader(owned, priority)

    def landed(self, request_id: str) -> None:
        """Its KV is here: whoever waits looks into the engine's cache once more."""
        if (leader := self._leaders.get(request_id)) is not None and leader.landed_s is None:
            leader.landed_s = self._clock()

    def end(self, request_id: str) -> None:
        """The request ended, in any state."""
        self._followers.pop(request_id, None)
        if (leader := self._leaders.pop(request_id, None)) is not None:
            for one in leader.hashes:
                self._owner.pop(one, None)

    def _leader(self, follower: _Follower, prompt_tokens: int, cached_tokens: int, priority: int) -> str | None:
        hashes, first = follower.hashes, cached_tokens // CHUNK_TOKENS
        if first >= len(hashes):
            return None
        name = self._owner.get(hashes[first])
        leader = self._leaders.get(name) if name is not None else None
        if leader is None or leader.priority > priority:
            return None
        if leader.landed_s is not None and self._clock() > leader.landed_s + SHOWS_WITHIN_S:
            return None
        shared = first
        while shared < len(hashes) and self._owner.get(hashes[shared]) == name:
            shared += 1
        shared_tokens = shared * CHUNK_TOKENS - cached_tokens
        return name if shared_tokens >= LEAST_SHARE * (prompt_tokens - cached_tokens) else None
