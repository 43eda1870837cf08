"""What the decode role and its surroundings say to each other: the engine's questions, our answers, the I/O thread."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from disagg_plugin.control.events import DecodeEvent
from disagg_policies.snapshots import CodecChoices, PrefillModel, WorkerState


@dataclass(frozen=True, slots=True)
class Route:
    """Somebody else, a router, gives the prompt to ``worker`` and told us under which number.

    Attributes:
        held: The prompt was prefilled before we heard of it; its KV is held under this transfer id.
    """

    worker: str
    room: int = 0
    held: bytes = b""


@dataclass(frozen=True, slots=True)
class PromptView:
    """A request as this role needs it.

    Attributes:
        local_only: Why it must not be offloaded, or None.
        http_fields: What travels with the offload call besides the prompt (LoRA name, cache salt).
        http_headers: The trace context, for the offload call.
        cache_salt, lora: Prefixes under another of these share nothing.
        adapter: Where the LoRA adapter's files are.
        priority: As the engine counts; smaller is more urgent. Travels to workers that schedule by it.
        only_offload: Wherever it can be offloaded, it is, however slow that is.
        route: Set where the decision was made, and the prompt is posted, elsewhere.
    """

    request_id: str
    token_ids: Sequence[int]
    local_only: str | None = None
    http_fields: tuple[tuple[str, object], ...] = ()
    http_headers: tuple[tuple[str, str], ...] = ()
    cache_salt: str = ""
    lora: str = ""
    adapter: str = ""
    priority: int = 0
    only_offload: bool = False
    route: Route | None = None


@dataclass(frozen=True, slots=True)
class PrefillLocally:
    """The engine computes the prompt itself."""

    reason: str


@dataclass(frozen=True, slots=True)
class NotYet:
    """Ask again at the next step; nothing is held."""


@dataclass(frozen=True, slots=True)
class Claim:
    """``tokens`` beyond the cached ones will be delivered; allocate blocks for them."""

    tokens: int


Answer = PrefillLocally | NotYet | Claim


@dataclass(frozen=True, slots=True)
class OfferCall:
    """An offload for the I/O thread: offer to ``workers`` in order, then ``post`` the prompt to who accepts.

    Attributes:
        adapter: Folder of the LoRA adapter; the worker compares its weights with those of its own.
        held: The worker holds the KV already; it compares the prompt, and what it is ``under`` (adapter, cache salt).
    """

    transfer_id: bytes
    nonce: int
    workers: tuple[str, ...]
    token_ids: Sequence[int]
    cached_tokens: int
    http_fields: tuple[tuple[str, object], ...]
    http_headers: tuple[tuple[str, str], ...] = ()
    priority: int = 0
    post: bool = True
    held: bool = False
    under: tuple[str, ...] = ()
    adapter: str = ""


class DecodePort(Protocol):
    """What the I/O thread offers to this role; every call returns at once."""

    def workers(self) -> tuple[WorkerState, ...]:
        """Every prefill worker, healthy or not; the same tuple until something changes."""
        ...

    def overlap_tokens(self, hashes: Sequence[int]) -> tuple[int, ...]:
        """Leading tokens of a prompt that each worker holds, in the order of ``workers``, or ()."""
        ...

    def offer(self, call: OfferCall) -> None: ...
    def ready(self, transfer_id: bytes, peer: str, first_token: int, end_token: int) -> None: ...
    def cancel(self, transfer_id: bytes, peer: str, reason: str) -> None: ...

    def failed(self, peer: str, reason: str) -> None:
        """A transfer that this worker had accepted came to nothing: it counts for its back-off."""
        ...

    def landed(self, peer: str, *, wire_bytes: int, tokens: int) -> None:
        """An offload went well; the KV of so many tokens took so many bytes."""
        ...

    def saw_overhead(self, peer: str, *, seconds: float) -> None:
        """So much longer than its queue, prefill and transfer did an offload take."""
        ...

    def assume(self, prefill: PrefillModel) -> None:
        """The speed to take for workers that have measured nothing yet; without, a slow guess would be never tested."""
        ...

    def ask_for_codecs(self, policy: Callable[[str, CodecChoices], str]) -> None:
        """``policy(worker, choices)`` says how KV from a worker travels; called in another thread."""
        ...

    def drain(self) -> Iterable[DecodeEvent]: ...
