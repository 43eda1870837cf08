"""Messages of the side channel: msgspec structs, msgpack on the wire, one frame each, never pickle.

    decode engine (DEALER)                       prefill engine (ROUTER)
    Hello ────────────────────────────────────▶  compare: protocol, model, weights, geometry
          ◀──────────────────────────────────── Welcome | Rejected
    Offer ────────────────────────────────────▶  queue limit, prompt limit
          ◀──────────────────────────────────── Accepted | Refused
          ◀──────────────────────────────────── Started      first chunk scheduled
    Ready ────────────────────────────────────▶  KV of [first_token, end_token) may be sent
    Renew ────────────────────────────────────▶  KV that is held for us is still wanted
          ◀──────────────────────────────────── Sent         all of it has been acknowledged
    Cancel ◀──────────────────────────────────▶ Cancel       either side gives up
    Heartbeat ────────────────────────────────▶              answered only by Rejected, if we do not know the sender
          ◀──────────────────────────────────── LoadReport   unasked: after steps, every 20 to 500 ms
    DigestRequest ────────────────────────────▶              a part of the prefix digest is missing: all of it, please
    SnapshotRequest ──────────────────────────▶
          ◀──────────────────────────────────── Snapshot     debug view, JSON text

Tickets (transfer id + nonce) travel only here. HTTP carries the transfer id alone, and nothing that a client
can put into HTTP is ever used as an address, a slot or an agent.
"""

from typing import Literal

import msgspec

from disagg_plugin.kv.commands import RankEndpoint
from disagg_plugin.kv.geometry import KVGeometry

PROTOCOL_VERSION = 1
PRIORITY = "priority"  # feature of an engine that schedules by it: prompts may be sent with one
HELD = "held"  # feature of an engine that keeps KV for a router: it understands offers of what it holds
EngineKind = Literal["vllm", "sglang"]
MAX_MESSAGE_BYTES = 4 << 20  # libzmq drops larger ones silently at the receiver: refused at the sender


class Message(msgspec.Struct, frozen=True, tag_field="t"):
    """Base of every message; the tag is the class name."""


class ModelIdentity(msgspec.Struct, frozen=True):
    """What must be equal for KV to be exchangeable; engine-neutral.

    Attributes:
        config_fingerprint: Hash over the architecture's numbers (rope scaling, overrides, quantization...).
        weights_digest: Hash over the weights' headers and samples, or the configured revision id.
        served_name: For messages to people only; never compared.
    """

    config_fingerprint: str
    weights_digest: str
    served_name: str = ""


class Hello(Message, frozen=True, tag="hello"):
    """A decode engine introduces itself.

    Attributes:
        engine: Stable id of the sending engine, the same over restarts.
        epoch: New with every start of the process.
        region_first_slot, region_slots: The part of each decode rank's ring that this peer may write to.
    """

    protocol: int
    features: tuple[str, ...]
    engine: str
    epoch: int
    model: ModelIdentity
    geometry: KVGeometry
    endpoints: tuple[RankEndpoint, ...]
    region_first_slot: int
    region_slots: int


class Welcome(Message, frozen=True, tag="welcome"):
    """The prefill engine agrees; from now on it accepts offers from this peer.

    Attributes:
        kind: Which HTTP dialect the prompt is to be posted in.
        http_dp_rank: Prompts for this rank are posted with this number; None: the HTTP API leads to no other rank.
        bootstrap_port: By what number a stock SGLang router names this engine in requests; 0 if none does.
    """

    protocol: int
    features: tuple[str, ...]
    engine: str
    epoch: int
    model: ModelIdentity
    geometry: KVGeometry
    endpoints: tuple[RankEndpoint, ...]
    max_prompt_tokens: int
    prefill_queue_max: int
    kind: EngineKind = "vllm"
    bootstrap_port: int = 0
    http_dp_rank: int | None = None


class Rejected(Message, frozen=True, tag="rejected"):
    """The two engines do not fit: what differs, and both values. No offer will be accepted."""

    reason: str
    ours: str
    theirs: str


class Offer(Message, frozen=True, tag="offer"):
    """May this prompt be prefilled at your place?

    Attributes:
        cached_tokens: Prefix that the decode side holds already (it may still grow or shrink until Ready).
        deadline_s: Seconds from now after which the decode side will not wait any more.
        codec: "raw", "int8" or "int8c": what the decode side wants on this link.
        prompt_digest: Of the prompt's token ids, or 0 where the transfer id alone, a secret, proves the prompt.
        adapter: Digest of the LoRA adapter's weights, or empty: the prompt is for the model itself.
        held: A router had the prompt prefilled; its KV is held under this transfer id.
    """

    transfer_id: bytes
    nonce: int
    prompt_tokens: int
    cached_tokens: int
    deadline_s: float
    codec: str
    priority: int = 0
    prompt_digest: int = 0
    adapter: str = ""
    held: bool = False


class Accepted(Message, frozen=True, tag="accepted"):
    """Send the prompt over HTTP now; its first chunk should start in about ``eta_s``."""

    transfer_id: bytes
    eta_s: float


class Refused(Message, frozen=True, tag="refused"):
    """No; ``reason`` is a word for counters: queue_full, prompt_too_long, draining, unknown_peer, hold_expired,
    prompt_differs."""

    transfer_id: bytes
    reason: str


class Started(Message, frozen=True, tag="started"):
    """The first chunk of this prompt is being computed: allocate, and say Ready."""

    transfer_id: bytes


class Ready(Message, frozen=True, tag="ready"):
    """Blocks are allocated: send KV of tokens ``[first_token, end_token)``."""

    transfer_id: bytes
    first_token: int
    end_token: int


class Renew(Message, frozen=True, tag="renew"):
    """Go on holding the KV of these transfers: their requests still wait for room here."""

    transfer_ids: tuple[bytes, ...]


class Sent(Message, frozen=True, tag="sent"):
    """Every chunk was acknowledged.

    Attributes:
        wire_s: Seconds in which the wire was busy with them, on the rank that took longest: no gaps between chunks.
    """

    transfer_id: bytes
    wire_bytes: int
    wire_s: float


class Cancel(Message, frozen=True, tag="cancel"):
    """The sender gives this transfer up; idempotent."""

    transfer_id: bytes
    reason: str


class Heartbeat(Message, frozen=True, tag="heartbeat"):
    """I am alive, in this epoch."""

    epoch: int


class PrefillSpeed(msgspec.Struct, frozen=True):
    """What a prefill engine measured of its own prefills; ``disagg_policies.snapshots.PrefillModel`` has the formula.

    Attributes:
        samples: Prefills behind the numbers; with 0 they are guesses.
        error: Mean relative error of its predictions.
    """

    base_s: float
    per_token_s: float
    per_pair_s: float
    samples: int
    error: float


class DigestPart(msgspec.Struct, frozen=True):
    """A piece of the prefixes that a prefill engine holds; ``control.digest_stream`` puts them together.

    Attributes:
        sequence: Of this pair of engines; one more than the part before, unless ``full``.
        full: Forget every part before.
        added, removed: Chunk hashes, 8 bytes each, little-endian.
    """

    sequence: int
    full: bool
    added: bytes
    removed: bytes


class LoadReport(Message, frozen=True, tag="load"):
    """What a prefill engine says about itself; engine-neutral.

    Attributes:
        queued_requests: Waiting requests, and accepted prompts that have not arrived over HTTP yet: every offer that
            was accepted before this report is counted in it.
        queued_prefill_tokens: Prompt tokens of those, and what is left of the prompts under way.
        kv_usage: Used share of the KV cache, 0 to 1.
        prefill_tokens_per_s: Recent speed of steps that prefill.
        digest: A part of its prefix digest, if there is news; several parts are several reports.
        by_priority: ``(priority, tokens)`` of what is queued, where the engine schedules by priority.
        draining: It is about to leave: every offer will be refused.
    """

    epoch: int
    queued_requests: int
    queued_prefill_tokens: int
    running_requests: int
    kv_usage: float
    prefill_tokens_per_s: float
    prefill: PrefillSpeed | None = None
    digest: DigestPart | None = None
    by_priority: tuple[tuple[int, int], ...] = ()
    draining: bool = False


class DigestRequest(Message, frozen=True, tag="digest?"):
    """A part of the prefix digest is missing here: send all of it."""


class SnapshotRequest(Message, frozen=True, tag="snapshot?"):
    """Ask for the debug view."""


class Snapshot(Message, frozen=True, tag="snapshot"):
    """The debug view as JSON text, for people, tests and ``disagg status``."""

    json: str


AnyMessage = (
    Hello
    | Welcome
    | Rejected
    | Offer
    | Accepted
    | Refused
    | Started
    | Ready
    | Renew
    | Sent
    | Cancel
    | Heartbeat
    | LoadReport
    | DigestRequest
    | SnapshotRequest
    | Snapshot
)
