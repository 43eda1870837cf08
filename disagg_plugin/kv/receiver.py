"""The receiving half of a worker rank: the peer's slot → private buffer → paged cache.

Two classes, two threads, joined by deques of immutable values:

    Intake (kv/intake.py)  data-plane thread   copies, verifies, answers; knows tickets by nonce
    Scatter                engine's thread     decodes from private buffers into the paged cache, a section at a
                                               time, and completes each request exactly once

**Copy, then verify, then decode.** Slots cannot be fenced: a write that its poster gave up may land at any time. So
nothing is ever decoded from the ring. A slot's bytes are copied first and judged there; a late write costs a chunk,
never a token.

**Back-pressure.** Without a free private buffer a notification waits, unanswered, and its slot stays taken.

**Early chunks.** A peer learns of a ticket from our scheduler, over the network, while this rank learns of it with its
engine's next step, which may be later. A notification with a nonce that was never seen is therefore parked, not
refused, for half a stall time-out; one whose ticket was closed is refused at once.
"""

import logging
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from disagg_plugin.kv.codec import KVCodec, SectionCodec
from disagg_plugin.kv.commands import AbandonReceive, OpenReceive, ReceiveTiming, SuspendReceive
from disagg_plugin.kv.geometry import HeadRange, KVGeometry
from disagg_plugin.kv.ring import Region, SlotArena, SlotPool
from disagg_plugin.kv.wire import ChunkHeader, codec_names
from disagg_plugin.observability.buckets import CHUNK_SCATTER, CHUNK_SECONDS, add_duration
from disagg_plugin.observability.ranges import profile_range

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Where canonical KV goes: the part of ``KVCacheView`` that receiving needs."""

    geometry: KVGeometry
    heads: HeadRange
    block_size: int

    def gather(self, layer: int, side: int, block_ids: Sequence[int], start: int, end: int) -> torch.Tensor: ...

    def scatter(
        self, layer: int, side: int, block_ids: Sequence[int], start: int, end: int, kv: torch.Tensor
    ) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class ReceiveLink:
    """One rank of one epoch of a peer that writes to us. Identity is equality. ``heads``: which come from it."""

    peer: str
    epoch: int
    agent: str
    region: Region  # of the landing ring
    heads: HeadRange | None = None  # None: all that we hold


@dataclass(frozen=True, slots=True)
class Landed:
    """Data plane → engine: a verified chunk in a private buffer, which the engine gives back."""

    nonce: int
    header: ChunkHeader
    buffer: int
    nbytes: int
    at_s: float


@dataclass(frozen=True, slots=True)
class ReceiveBroken:
    """Data plane → engine: this rank will not complete the transfer."""

    nonce: int
    reason: str


class TokenRanges:
    """Disjoint token ranges, merged where they touch."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, end: int) -> bool:
        """False, and no change, if any of these tokens is there already."""
        at = bisect_right(self._starts, start)
        if (at > 0 and self._ends[at - 1] > start) or (at < len(self._starts) and self._starts[at] < end):
            return False
        joins_left = at > 0 and self._ends[at - 1] == start
        joins_right = at < len(self._starts) and self._starts[at] == end
        if joins_left and joins_right:
            self._ends[at - 1] = self._ends.pop(at)
            del self._starts[at]
        elif joins_left:
            self._ends[at - 1] = end
        elif joins_right:
            self._starts[at] = start
        else:
            self._starts.insert(at, start)
            self._ends.insert(at, end)
        return True

    def prefix_end(self, first: int) -> int:
        """End of the range that begins at ``first``; ``first`` if there is none."""
        at = bisect_right(self._starts, first)
        return max(first, self._ends[at - 1]) if at > 0 else first


class LandedHeads:
    """Token ranges of each head; a token has landed when all heads of this rank have."""

    def __init__(self, heads: HeadRange) -> None:
        self._ranges = {head: TokenRanges() for head in range(heads.start, heads.stop)}

    def add(self, start: int, end: int, heads: HeadRange) -> None:
        for head in range(heads.start, heads.stop):
            self._ranges[head].add(start, end)

    def prefix_end(self, first: int) -> int:
        """End of what landed from ``first`` on without a hole, on all heads."""
        return min(ranges.prefix_end(first) for ranges in self._ranges.values())


@dataclass(slots=True)
class ReceiveState:
    """Accounts of one transfer, in the engine's thread."""

    command: OpenReceive
    landed: LandedHeads  # scattered completely
    codecs: set[SectionCodec] = field(default_factory=set)
    chunks: int = 0
    wire_bytes: int = 0
    first_chunk_s: float = 0.0
    last_chunk_s: float = 0.0
    failed: bool = False  # reported; chunks that landed are still scattered, but only ``abandon`` completes it
    unusable: bool = False  # a chunk could not be scattered: drop the others
    suspended: bool = False  # between two senders
    raw_bytes: int = 0

    @property
    def prefix_end(self) -> int:
        return self.landed.prefix_end(self.command.first_token)


@dataclass(slots=True)
class ReceiveOutcomes:
    """What the next report and the next completions say; emptied by whoever reads it."""

    received: list[str] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    suspended: list[tuple[str, int]] = field(default_factory=list)
    timings: list[ReceiveTiming] = field(default_factory=list)
    completed: list[str] = field(default_factory=list)  # received and abandoned ones
    invalid_block_ids: set[int] = field(default_factory=set)


class Scatter:
    """Engine's thread: what landed goes into the paged cache, within a time budget."""

    def __init__(
        self,
        sink: Sink,
        *,
        codec: KVCodec,
        private: SlotArena,
        buffers: SlotPool,
        close_ticket: Callable[[int], None],
        clock: Callable[[], float],
        counters: dict[str, float],
    ) -> None:
        self._sink = sink
        self._codec = codec
        self._private = private
        self._buffers = buffers
        self._close_ticket = close_ticket
        self._clock = clock
        self._counters = counters
        self._receives: dict[str, ReceiveState] = {}
        self._by_nonce: dict[int, ReceiveState] = {}
        self._queue: deque[Landed] = deque()
        self._next_section = 0  # of the queue's first chunk
        self._decoded = torch.empty(0, dtype=codec.dtype)
        self.outcomes = ReceiveOutcomes()

    @property
    def open_receives(self) -> int:
        return len(self._receives)

    @property
    def busy(self) -> bool:
        return bool(self._receives or self._queue)

    def open(self, command: OpenReceive) -> bool:
        """False if there is nothing to wait for: the range is empty, or the request is open already."""
        state = self._receives.get(command.request_id)
        if state is None:
            state = self._receives[command.request_id] = ReceiveState(command, LandedHeads(self._sink.heads))
        elif not state.suspended:
            self._counters["late_commands"] += 1
            return False
        elif not self._resume(state, command):
            return False
        if self._by_nonce.setdefault(command.nonce, state) is not state:
            self._fail(state, "nonce_in_use")
            return False
        if command.first_token >= command.end_token:
            self._complete(state)
            return False
        return True

    def abandon(self, command: AbandonReceive) -> None:
        """Complete the request now, with the blocks beyond its landed prefix as invalid; unknown ones are counted."""
        state = self._receives.get(command.request_id)
        if state is None:
            self._counters["late_commands"] += 1
            return
        self._counters["abandoned"] += 1
        self.outcomes.invalid_block_ids.update(invalid_blocks(state.command, state.prefix_end, self._sink.block_size))
        self._end(state)

    def suspend(self, command: SuspendReceive) -> None:
        """Take no more from this sender; what has been scattered counts, what is still queued does not."""
        state = self._receives.get(command.request_id)
        if state is None or state.suspended:
            self._counters["late_commands"] += 1
            return
        self._detach(state)
        state.suspended, state.failed, state.unusable = True, False, False
        self.outcomes.suspended.append((command.request_id, state.prefix_end))

    def _resume(self, state: ReceiveState, command: OpenReceive) -> bool:
        """Go on with another sender; False if that would leave a hole."""
        if not state.command.first_token <= command.first_token <= state.prefix_end:
            self._fail(state, "hole_in_range")
            return False
        state.command, state.landed, state.suspended = command, LandedHeads(self._sink.heads), False
        return True

    def landed(self, chunk: Landed) -> None:
        self._queue.append(chunk)

    def broken(self, nonce: int, reason: str) -> None:
        """This rank cannot complete; said once. Only :meth:`abandon` ends the request."""
        state = self._by_nonce.get(nonce)
        if state is not None:
            self._fail(state, reason)

    def scatter(self, budget_s: float) -> None:
        """Work for ``budget_s`` seconds, but one section at least; the rest waits for the next step."""
        deadline = self._clock() + budget_s
        while self._queue:
            chunk = self._queue[0]
            state = self._by_nonce.get(chunk.nonce)
            if state is not None and not state.unusable and not self._scatter_within_boundary(chunk, state, deadline):
                return
            self._queue.popleft()
            self._next_section = 0
            self._buffers.give(chunk.buffer)
            if self._clock() >= deadline:
                return

    def _scatter_within_boundary(self, chunk: Landed, state: ReceiveState, deadline: float) -> bool:
        """True once the chunk is done with, False if time is up."""
        try:
            if not self._scatter_sections(chunk, state, deadline):
                return False
        except Exception:  # the boundary of one transfer: an exception here would end the engine
            logger.exception("request %s cannot be scattered", state.command.request_id)
            state.unusable = True
            self._fail(state, "bad_chunk")
            return True
        self._account(chunk, state)
        if not state.failed and state.prefix_end >= state.command.end_token:
            self._complete(state)
        return True

    def _scatter_sections(self, chunk: Landed, state: ReceiveState, deadline: float) -> bool:
        header = chunk.header
        memory = self._private.tensor(chunk.buffer)
        wire_dtype: torch.dtype = getattr(torch, header.dtype)
        sections = header.sections()
        while self._next_section < len(sections):
            section = sections[self._next_section]
            layer, side = divmod(self._next_section, header.sides)
            with profile_range("disagg decode"):
                kv = self._codec.decode(
                    memory[section.offset : section.offset + section.nbytes],
                    section.codec,
                    heads=header.heads.count,
                    tokens=header.tokens,
                    wire_dtype=wire_dtype,
                    out=self._decode_buffer(header, section.codec),
                )
            with profile_range("disagg scatter"):
                self._sink_section(layer, side, state.command.block_ids, header, kv)
            self._next_section += 1
            if self._next_section < len(sections) and self._clock() >= deadline:
                return False
        return True

    def _sink_section(
        self, layer: int, side: int, block_ids: Sequence[int], header: ChunkHeader, kv: torch.Tensor
    ) -> None:
        """Write one section. Views write all heads of a rank: where others come from another rank, they stay."""
        sink, at = self._sink, (header.token_start, header.token_end)
        if header.heads != sink.heads:
            all_heads = sink.gather(layer, side, block_ids, *at).clone()
            first = header.heads.start - sink.heads.start
            all_heads[first : first + header.heads.count] = kv
            kv = all_heads
        sink.scatter(layer, side, block_ids, *at, kv)

    def _decode_buffer(self, header: ChunkHeader, codec: SectionCodec) -> torch.Tensor | None:
        """Memory to decode to, kept between sections; RAW is scattered right from the private buffer."""
        if codec is SectionCodec.RAW:
            return None
        shape = (header.heads.count, header.tokens, header.head_dim)
        numel = shape[0] * shape[1] * shape[2]
        if self._decoded.numel() < numel:
            self._decoded = torch.empty(numel, dtype=self._codec.dtype)
        return self._decoded[:numel].view(shape)

    def _account(self, chunk: Landed, state: ReceiveState) -> None:
        header = chunk.header
        state.landed.add(header.token_start, header.token_end, header.heads)
        state.first_chunk_s = state.first_chunk_s or chunk.at_s
        state.last_chunk_s = max(state.last_chunk_s, chunk.at_s)
        state.chunks += 1
        state.wire_bytes += chunk.nbytes
        state.codecs.update(header.codecs)
        add_duration(self._counters, CHUNK_SCATTER, self._clock() - chunk.at_s, CHUNK_SECONDS)
        self._counters["chunks_received"] += 1
        self._counters["wire_bytes_received"] += chunk.nbytes
        raw_bytes = header.tokens * self._sink.geometry.raw_token_bytes(header.heads.count)
        state.raw_bytes += raw_bytes
        self._counters["raw_bytes_received"] += raw_bytes

    def _complete(self, state: ReceiveState) -> None:
        command = state.command
        self.outcomes.received.append(command.request_id)
        self.outcomes.timings.append(
            ReceiveTiming(
                request_id=command.request_id,
                first_chunk_s=state.first_chunk_s,
                last_chunk_s=state.last_chunk_s,
                chunks=state.chunks,
                wire_bytes=state.wire_bytes,
                raw_bytes=state.raw_bytes,
                codecs=codec_names(sorted(state.codecs)),
            )
        )
        self._end(state)

    def _fail(self, state: ReceiveState, reason: str) -> None:
        if not state.failed:
            state.failed = True
            self._counters["receive_failures"] += 1
            self.outcomes.failed.append((state.command.request_id, reason))

    def _end(self, state: ReceiveState) -> None:
        """The one place where a request is completed; what is still queued for it is dropped by ``scatter``."""
        del self._receives[state.command.request_id]
        self._detach(state)
        self.outcomes.completed.append(state.command.request_id)

    def _detach(self, state: ReceiveState) -> None:
        if self._by_nonce.get(state.command.nonce) is state:
            del self._by_nonce[state.command.nonce]
            self._close_ticket(state.command.nonce)


def invalid_blocks(command: OpenReceive, prefix_end: int, block_size: int) -> set[int]:
    """Blocks that hold tokens of ``[prefix_end, end_token)``; none if everything landed."""
    if prefix_end >= command.end_token:
        return set()
    return set(command.block_ids[prefix_end // block_size : -(-command.end_token // block_size)])
