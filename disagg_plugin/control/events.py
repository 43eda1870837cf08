"""Values that the I/O thread hands to the scheduler's thread; the other direction is method calls on the ports.

Each side drains its deque at its own pace; nobody waits for the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from disagg_plugin.kv.commands import AddPeer


@dataclass(frozen=True, slots=True)
class PeerJoined:
    """A peer is compatible and its workers can be reached; ``add`` goes to our worker ranks."""

    add: AddPeer


@dataclass(frozen=True, slots=True)
class PeerLeft:
    """A peer is gone or was replaced: whatever it owes us will not come."""

    peer: str
    reason: str


@dataclass(frozen=True, slots=True)
class PrefillAccepted:
    """Decode: ``peer`` took the offer and has the prompt; it starts in about ``eta_s``."""

    transfer_id: bytes
    peer: str
    eta_s: float


@dataclass(frozen=True, slots=True)
class PrefillStarted:
    """Decode: the first chunk is being computed, says ``peer``."""

    transfer_id: bytes
    peer: str = ""


@dataclass(frozen=True, slots=True)
class PrefillFailed:
    """Decode: nobody will deliver this transfer, or ``peer`` will not; ``reason`` is a word for counters."""

    transfer_id: bytes
    reason: str
    peer: str = ""


@dataclass(frozen=True, slots=True)
class PrefillEnded:
    """Decode: the prefill engine answered the HTTP call; chunks may still be under way."""

    transfer_id: bytes


@dataclass(frozen=True, slots=True)
class Held:
    """Prefill: a prompt computed for a router. ``under``: adapter's name, cache salt; ``adapter``: its folder."""

    prompt: Sequence[int] = ()
    under: tuple[str, ...] = ()
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class TicketOffered:
    """Prefill: an offer was accepted; its HTTP request will come."""

    transfer_id: bytes
    nonce: int
    peer: str
    prompt_tokens: int
    codec: str
    deadline_s: float
    adapter: str = ""
    prompt_digest: int = 0
    held: bool = False


@dataclass(frozen=True, slots=True)
class TicketReady:
    """Prefill: the decode side has allocated blocks for ``[first_token, end_token)``."""

    transfer_id: bytes
    first_token: int
    end_token: int


@dataclass(frozen=True, slots=True)
class TicketRenewed:
    """Prefill: the decode side still wants what is held for it."""

    transfer_id: bytes


@dataclass(frozen=True, slots=True)
class AdapterChecked:
    """Prefill: whether the adapter that computes this prompt is the decode side's."""

    transfer_id: bytes
    same: bool


@dataclass(frozen=True, slots=True)
class TicketCancelled:
    """Prefill: the decode side gave up."""

    transfer_id: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class Leaving:
    """Prefill: this engine is about to leave; nothing is offered to it any more."""


DecodeEvent = PeerJoined | PeerLeft | PrefillAccepted | PrefillStarted | PrefillFailed | PrefillEnded
PrefillEvent = (
    PeerJoined | PeerLeft | TicketOffered | TicketReady | TicketRenewed | TicketCancelled | AdapterChecked | Leaving
)
