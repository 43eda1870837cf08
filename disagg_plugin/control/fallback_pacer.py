"""How fast failed offloads come back to their own engine as prompts to compute. Pure.

Fifty transfers that fail at once, because their worker died, are fifty prompts that the engine would mix into the steps
of its running decodes. They come back in order, so many tokens a step on average; the first one always at once. An
engine that does nothing else makes thousands of steps a second, so that only a busy one is ever held back.
"""

from collections.abc import Iterator


class FallbackPacer:
    """A budget of tokens that each step refills; a prompt larger than it goes through and is paid off later."""

    def __init__(self, tokens_per_step: int) -> None:
        self._per_step = tokens_per_step
        self._left = tokens_per_step
        self._waiting: dict[str, int] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._waiting

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, request_id: str, tokens: int) -> None:
        """A request whose last ``tokens`` the engine has to compute itself."""
        self._waiting[request_id] = tokens

    def forget(self, request_id: str) -> bool:
        """The request ended; True if it was waiting."""
        return self._waiting.pop(request_id, None) is not None

    def step(self) -> None:
        """The engine makes a step."""
        self._left = min(self._left + self._per_step, self._per_step)

    def released(self) -> Iterator[str]:
        """Requests that may be computed now, oldest first."""
        while self._waiting and self._left > 0:
            request_id = next(iter(self._waiting))
            self._left -= self._waiting.pop(request_id)
            yield request_id
