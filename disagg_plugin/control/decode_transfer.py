"""One offloaded request as its decode engine follows it, and when its chunks arrived."""

from dataclasses import asdict, dataclass, field

from disagg_plugin.control.decode_port import PromptView
from disagg_plugin.kv.commands import OpenReceive, ReceiveTiming
from disagg_plugin.kv.lifecycle import OVER, State
from disagg_plugin.serving.decision_record import DecisionRecord


@dataclass(frozen=True, slots=True)
class Arrival:
    """What the ranks measured of one transfer, all ranks together; ``time.monotonic`` seconds."""

    first_chunk_s: float
    last_chunk_s: float
    chunks: int  # of the rank with most
    wire_bytes: int
    raw_bytes: int
    codecs: tuple[str, ...]

    @classmethod
    def of(cls, timing: ReceiveTiming) -> "Arrival":
        return cls(
            timing.first_chunk_s,
            timing.last_chunk_s,
            timing.chunks,
            timing.wire_bytes,
            timing.raw_bytes,
            timing.codecs,
        )

    def joined(self, other: "Arrival") -> "Arrival":
        """Two ranks: the earliest first chunk, the latest last one, bytes of both."""
        return Arrival(
            min(self.first_chunk_s, other.first_chunk_s),
            max(self.last_chunk_s, other.last_chunk_s),
            max(self.chunks, other.chunks),
            self.wire_bytes + other.wire_bytes,
            self.raw_bytes + other.raw_bytes,
            tuple(sorted({*self.codecs, *other.codecs})),
        )


@dataclass(slots=True)
class Transfer:
    """One offloaded request."""

    request_id: str
    transfer_id: bytes
    nonce: int
    prompt_tokens: int
    cached_tokens: int  # that D held when it was offered: its own, and LMCache's
    offered_s: float
    lmcache_tokens: int = 0  # of them, what LMCache loads
    asked_s: float = 0.0  # before the policies
    given_up_s: float = 0.0
    state: State = State.OFFERED
    peer: str = ""
    reason: str = "over_threshold"
    failure: str = ""
    eta_s: float = 0.0
    accepted_s: float = 0.0
    started_s: float = 0.0
    ready_s: float = 0.0
    landed_s: float = 0.0
    first_token: int = 0
    end_token: int = 0
    held_tokens: int = 0
    completed: bool = False  # the engine took the blocks back; True before anything was held
    request_ended: bool = False  # the engine will not ask again
    prefill_ended_s: float = 0.0
    arrival: Arrival | None = None
    record: DecisionRecord | None = None  # until it is over: what the estimates were
    prompt: PromptView | None = None  # until it is over: for another offer
    attempted_s: float = 0.0  # the newest offer
    tried: list[str] = field(default_factory=list)  # workers that it was taken from again
    command: OpenReceive | None = None  # what the ranks were told last
    suspended: dict[int, int] = field(default_factory=dict)  # rank -> tokens that stand in the cache
    done_ranks: set[int] = field(default_factory=set)  # that have reported it as received

    @property
    def promised_tokens(self) -> int:
        """KV that it will hold here, or holds."""
        if self.state in OVER:
            return self.held_tokens
        return self.held_tokens or max(0, self.prompt_tokens - 1 - self.cached_tokens)

    def row(self) -> dict[str, object]:
        """For the debug snapshot."""
        return {
            "request_id": self.request_id,
            "transfer_id": self.transfer_id.hex(),
            "state": self.state.value,
            "peer": self.peer,
            "reason": self.reason,
            "failure": self.failure,
            "tried": list(self.tried),
            "prompt_tokens": self.prompt_tokens,
            "lmcache_tokens": self.lmcache_tokens,
            "first_token": self.first_token,
            "end_token": self.end_token,
            "asked_s": self.asked_s,
            "offered_s": self.offered_s,
            "accepted_s": self.accepted_s,
            "started_s": self.started_s,
            "ready_s": self.ready_s,
            "landed_s": self.landed_s,
            "given_up_s": self.given_up_s,
            "prefill_ended_s": self.prefill_ended_s,
            **(asdict(self.arrival) if self.arrival else {}),
        }
