"""What a prefill engine knows of one prompt whose KV goes elsewhere; ``PrefillSide`` changes it."""

from dataclasses import dataclass, field

from disagg_plugin.control.events import Held, TicketOffered, TicketReady
from disagg_plugin.kv.lifecycle import LOADING, State


@dataclass(slots=True)
class PrefillTicket:
    """One offered prompt, or one that is held for a router."""

    offer: TicketOffered
    offered_s: float
    state: State = State.ACCEPTED
    request_id: str = ""
    ready: TicketReady | None = None
    opened: bool = False  # the ranks know about it
    request_ended_s: float = 0.0
    hold_until_s: float = 0.0
    routed: Held | None = None  # where a router sent it
    verified: bool = True  # False until its adapter was compared: nothing is said or sent before
    holding: bool = False  # the engine keeps the blocks until the ranks release them
    computed_tokens: int = 0
    failure: str = ""
    staged_ranks: set[int] = field(default_factory=set)
    sent_ranks: set[int] = field(default_factory=set)
    started_s: float = 0.0
    last_computed_s: float = 0.0
    acknowledged_s: float = 0.0
    chunks: int = 0
    wire_bytes: int = 0
    wire_s: float = 0.0  # of the slowest rank

    @property
    def needs_steps(self) -> bool:
        """The engine does not compute its request, not yet or not any more, and what becomes of it comes with steps."""
        computing = self.request_id and not self.request_ended_s
        return self.holding or (self.state in LOADING and not computing)

    def row(self) -> dict[str, object]:
        """For the debug view."""
        return {
            "request_id": self.request_id,
            "transfer_id": self.offer.transfer_id.hex(),
            "state": self.state.value,
            "peer": self.offer.peer,
            "failure": self.failure,
            "prompt_tokens": self.offer.prompt_tokens,
            "offered_s": self.offered_s,
            "started_s": self.started_s,
            "last_computed_s": self.last_computed_s,
            "acknowledged_s": self.acknowledged_s,
            "chunks": self.chunks,
            "wire_bytes": self.wire_bytes,
        }
