"""What one scheduler process tells admission about itself, as often as it reports at all.

    scheduler process                               API server process
    EngineQueue.state(decode, workers) ──▶ EngineState ──plain──▶ EngineState ──▶ Gate.update(state, engine)

It travels through whatever the engine has for statistics, as plain values (``to_plain``, ``from_plain``).
"""

from typing import Any
from zlib import crc32

import msgspec

from disagg_policies.admission_snapshots import QueuedWork
from disagg_policies.snapshots import DecodeState, WorkerState

RECENT = 128  # arrivals that a state names; more between two states are counted twice for a moment
MAX_WORKERS = 2  # the best ones are enough for an estimate


class EngineState(msgspec.Struct, frozen=True, omit_defaults=True):
    """One engine (data-parallel rank) at one moment; everything has a default, so that old and new ones mix.

    Attributes:
        sequence: Grows; an older state that arrives later is ignored.
        decode: Load, models and KV usage. Its queue counts are totals; admission uses ``queued``.
        workers: The healthy prefill workers with the shortest queues.
        queued: What waits for a local prefill, by engine priority; tokens are those still to be computed.
        landing: Prompts being prefilled elsewhere for this engine, by priority.
        reorders: The engine schedules by priority.
        decode_lasts_s: Fitted seconds from a request's first token to its last, or None: nothing has ended yet.
        drain_tokens_per_s: Prompt tokens that were computed per second while some were queued, or None.
        kv_capacity_tokens, max_running: The engine's limits, or None.
        recent: ``request_mark`` of the latest arrivals: those are counted here and nowhere else.
        draining: It takes no new requests.
        decode_stall_s: Mean seconds by which prompts made recent decode steps longer; 0 where nothing decodes.
    """

    sequence: int = 0
    decode: DecodeState = DecodeState()
    workers: tuple[WorkerState, ...] = ()
    queued: tuple[QueuedWork, ...] = ()
    landing: tuple[QueuedWork, ...] = ()
    reorders: bool = False
    decode_lasts_s: float | None = None
    drain_tokens_per_s: float | None = None
    kv_capacity_tokens: int | None = None
    max_running: int | None = None
    recent: tuple[int, ...] = ()
    draining: bool = False
    decode_stall_s: float = 0.0

    @property
    def queued_tokens(self) -> int:
        """Over all priorities."""
        return sum(work.tokens for work in self.queued)


def request_mark(request_id: str) -> int:
    """32 bits of an engine's request id; two requests with one mark cost an estimate, nothing else."""
    return crc32(request_id.encode())


def to_plain(state: EngineState) -> dict[str, Any]:
    """Dicts, lists and numbers, for statistics channels that know no more."""
    plain: dict[str, Any] = msgspec.to_builtins(state)
    return plain


def from_plain(plain: object) -> EngineState:
    """The state again.

    Raises:
        ValueError: It is none, or of an incompatible version.
    """
    try:
        return msgspec.convert(plain, EngineState)
    except msgspec.ValidationError as error:
        raise ValueError(f"not an EngineState: {error}") from None
