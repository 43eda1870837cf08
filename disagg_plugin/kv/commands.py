"""What the scheduler process and its worker ranks say to each other: immutable values, nothing else.

The engine's connector carries :data:`Command` values down with every step (vLLM: connector metadata) and one
:class:`RankReport` per rank up. Order within a step is kept: an ``OpenReceive`` directly followed by its
``AbandonReceive`` is legal and is answered with exactly one completion.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class RankEndpoint:
    """How other engines reach one worker rank; travels in the handshake of the side channel.

    Attributes:
        agent_metadata: NIXL's own description of the agent and its registered memory.
        ring_address: First byte of the landing ring in that process.
        ring_slots: Slots in the whole ring, over all regions.
        encode_bytes_per_s, decode_bytes_per_s: Source bytes that this rank's int8 codec manages; 0: not measured.
    """

    rank: int
    agent_name: str
    agent_metadata: bytes
    ring_address: int
    slot_bytes: int
    ring_slots: int
    encode_bytes_per_s: float = 0.0
    decode_bytes_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class AddPeer:
    """Get ready to exchange chunks with a peer engine, or replace its previous epoch.

    ``peer`` is ``<engine id>`` and stays the same over restarts; ``epoch`` changes with each. The region is the
    range of slots in the *decode* engine's ring which this peer may write to; prefill ranks mirror it slot by
    slot in their staging memory. ``our_ranks``: tensor parallelism of this engine, if it is not the peer's.
    """

    peer: str
    epoch: int
    endpoints: tuple[RankEndpoint, ...]
    region_first_slot: int
    region_slots: int
    receives: bool  # True: this peer writes to us (we decode); False: we write to it (we prefill)
    our_ranks: int = 0


@dataclass(frozen=True, slots=True)
class RemovePeer:
    """Forget a peer: abandon its transfers, release its handles. Its region stays its own."""

    peer: str


@dataclass(frozen=True, slots=True)
class OpenReceive:
    """Decode rank: tokens ``[first_token, end_token)`` of a request will arrive from ``peer``.

    ``block_ids`` cover the request from token 0. ``nonce`` authenticates the peer's notifications. For a request that
    was suspended it goes on, with another transfer, where all ranks have everything before ``first_token``.
    """

    request_id: str
    transfer_id: bytes
    nonce: int
    peer: str
    first_token: int
    end_token: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AbandonReceive:
    """Decode rank: stop waiting. The rank reports the request complete, with what did not land as invalid."""

    request_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class SuspendReceive:
    """Decode rank: nothing more comes from this peer. Keep what landed, refuse the rest, report how far it reaches.

    Another ``OpenReceive`` of the same request goes on from there, or an ``AbandonReceive`` ends it.
    """

    request_id: str


@dataclass(frozen=True, slots=True)
class OpenSend:
    """Prefill rank: the decode side is ready for tokens ``[first_token, end_token)``."""

    transfer_id: bytes
    nonce: int
    peer: str
    first_token: int
    end_token: int
    codec: str


@dataclass(frozen=True, slots=True)
class Computed:
    """Prefill rank: after this step's forward, KV of ``[0, computed_tokens)`` stands in ``block_ids``.

    After a preemption the same transfer starts again with fewer tokens and other blocks.
    """

    transfer_id: bytes
    computed_tokens: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ReleaseWhenStaged:
    """Prefill rank: the engine's request ended; report ``request_id`` once nothing needs its blocks any more."""

    transfer_id: bytes
    request_id: str


@dataclass(frozen=True, slots=True)
class DropSend:
    """Prefill rank: nobody wants this transfer any more."""

    transfer_id: bytes
    reason: str


Command = (
    AddPeer
    | RemovePeer
    | OpenReceive
    | AbandonReceive
    | SuspendReceive
    | OpenSend
    | Computed
    | ReleaseWhenStaged
    | DropSend
)


@dataclass(frozen=True, slots=True)
class ReceiveTiming:
    """When the chunks of one received transfer arrived; ``time.monotonic`` seconds of the rank's host."""

    request_id: str
    first_chunk_s: float
    last_chunk_s: float
    chunks: int
    wire_bytes: int
    raw_bytes: int
    codecs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SendTiming:
    """When one sent transfer was staged and acknowledged; ``time.monotonic`` seconds of the rank's host.

    Attributes:
        wire_s: Time in which the wire was busy with it: no gaps between chunks, nothing before it in the queue.
    """

    transfer_id: bytes
    first_chunk_s: float
    last_computed_s: float  # the engine's step that computed the last token had ended
    acknowledged_s: float
    chunks: int
    wire_bytes: int
    wire_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RankReport:
    """What one rank has to say after a step; empty tuples mean "nothing new".

    Attributes:
        received: Requests whose whole range landed on this rank.
        receive_failed: ``(request_id, reason)``: this rank cannot complete; the scheduler abandons on all ranks.
        receive_suspended: ``(request_id, end)``: suspended; the tokens before ``end`` stand in the cache.
        staged: Transfers whose last token is out of the paged cache.
        sent: Transfers whose last chunk was acknowledged.
        send_failed: ``(transfer_id, reason)``.
        busy: The rank still has writes or acknowledgements outstanding and wants to be stepped.
        counters: Monotonic counts and current gauges of the rank (see ``kv/dataplane.py``).
    """

    rank: int
    received: tuple[str, ...] = ()
    receive_failed: tuple[tuple[str, str], ...] = ()
    receive_suspended: tuple[tuple[str, int], ...] = ()
    staged: tuple[bytes, ...] = ()
    sent: tuple[bytes, ...] = ()
    send_failed: tuple[tuple[bytes, str], ...] = ()
    receive_timings: tuple[ReceiveTiming, ...] = ()
    send_timings: tuple[SendTiming, ...] = ()
    busy: bool = False
    counters: dict[str, float] = field(default_factory=dict)
