"""The data-plane thread's half of sending: finished slots go out, answers come back, deadlines pass.

Every chunk is in one of these places:

    posted       written or being written, no answer yet, within its deadline
    quarantined  the same past its deadline: its transfer is lost, its slot stays taken; the peer is asked again now
                 and then, as its answer, or our notification, may have been lost with a connection
    answered     the peer is done with it, our side of the write is not: wait for the handle, then free the slot

No torch here: checksums are computed by xxhash over numpy views, which leaves the GIL to the engine.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from disagg_plugin.errors import PeerLost, TransportError
from disagg_plugin.kv.ring import SlotArena
from disagg_plugin.kv.sender import ChunkDone, SendBroken, SendLink, StagedChunk
from disagg_plugin.kv.transport import Transport, WriteHandle, WriteState
from disagg_plugin.kv.wire import Bytes, Kind, Notification, seal
from disagg_plugin.observability.buckets import CHUNK_SECONDS, CHUNK_WRITE, add_duration

logger = logging.getLogger(__name__)

ASK_AGAIN_TIMES = 3


@dataclass(slots=True)
class Posted:
    """One chunk under way; ``handle`` is ``None`` once our side of the write has ended."""

    chunk: StagedChunk
    deadline_s: float
    handle: WriteHandle | None = None
    since_s: float = 0.0  # the first attempt
    posted_s: float = 0.0
    wire_s: float = 0.0
    attempt: int = 0
    answer: Kind | None = None
    quarantined: bool = False
    ask_again_s: float = 0.0
    asked: int = 0  # again

    def is_meant_by(self, answer: Notification) -> bool:
        """Whether an answer for this slot is about this chunk and this attempt."""
        chunk = self.chunk
        return (chunk.nonce, chunk.sequence, self.attempt) == (answer.nonce, answer.sequence, answer.attempt)


class Poster:
    """Owns every write of this rank; all calls from the data-plane thread."""

    def __init__(
        self,
        transport: Transport,
        arena: SlotArena,
        *,
        stall_timeout_s: float,
        emit: Callable[[ChunkDone | SendBroken], None],
        clock: Callable[[], float],
        counters: dict[str, float],
        lost: set[str],
    ) -> None:
        """
        Args:
            lost: Agents that cannot be reached any more are added here.
        """
        self._lost = lost
        self._transport = transport
        self._arena = arena
        self._stall_timeout_s = stall_timeout_s
        self._emit = emit
        self._clock = clock
        self._counters = counters
        self._links: dict[str, SendLink] = {}  # by agent name
        self._posted: dict[tuple[str, int], Posted] = {}  # by agent name and slot
        self._wire_free_s: dict[str, float] = {}  # by agent name: when the last write to it ended

    @property
    def waiting(self) -> int:
        """Chunks within their deadline: answers are expected soon. Any thread may ask."""
        return sum(not posted.quarantined for posted in list(self._posted.values()))

    @property
    def quarantined(self) -> int:
        """Chunks past their deadline. Any thread may ask."""
        return sum(posted.quarantined for posted in list(self._posted.values()))

    def connect(self, link: SendLink) -> None:
        self._links[link.agent] = link

    def disconnect(self, link: SendLink) -> None:
        """Release every handle towards this agent; its writes may still land, in slots only it may write to."""
        self._links.pop(link.agent, None)
        self._wire_free_s.pop(link.agent, None)
        for key in [key for key, posted in self._posted.items() if posted.chunk.link is link]:
            posted = self._posted.pop(key)
            if posted.handle is not None:
                posted.handle.release()

    def forget_posted(self, agent: str) -> None:
        """The connection to this agent is gone, and with it every write and every answer under way."""
        for key in [key for key in self._posted if key[0] == agent]:
            handle = self._posted[key].handle
            if handle is not None:
                handle.release()
            self._finish(key, "peer_lost")

    def close(self) -> None:
        for link in list(self._links.values()):
            self.disconnect(link)

    def post(self, chunk: StagedChunk) -> None:
        """Write a staged chunk; chunks over a link that has been replaced meanwhile are dropped."""
        if self._links.get(chunk.link.agent) is not chunk.link:
            return
        now = self._clock()
        posted = Posted(chunk, now + self._stall_timeout_s, since_s=now)
        self._posted[chunk.link.agent, chunk.slot] = posted
        seal(self._memory(chunk))
        self._write(posted)

    def answer(self, agent: str, answer: Notification) -> None:
        """The peer's verdict on one chunk; anything that does not match what stands in the slot is only counted."""
        posted = self._posted.get((agent, answer.slot))
        if posted is None or posted.answer is not None or not posted.is_meant_by(answer):
            self._counters["stale_answers"] += 1
            return
        if answer.kind is Kind.NACK:
            self._counters["nacks_received"] += 1
        posted.answer = answer.kind
        self._advance((agent, answer.slot), posted)

    def pump(self) -> bool:
        """Drive every write forward and check deadlines; True if anything changed."""
        changed = False
        now = self._clock()
        for key, posted in list(self._posted.items()):
            changed |= self._advance(key, posted)
            if now > posted.deadline_s and not posted.quarantined and key in self._posted:
                posted.quarantined = True
                posted.ask_again_s = now + self._stall_timeout_s
                self._counters["send_deadlines"] += 1
                self._emit(SendBroken(posted.chunk.transfer_id, "stalled"))
                changed = True
            elif posted.quarantined and now > posted.ask_again_s and key in self._posted:
                posted.ask_again_s = now + self._stall_timeout_s
                self._ask_again(key[0], posted)
        return changed

    def _ask_again(self, agent: str, posted: Posted) -> None:
        posted.asked += 1
        if posted.asked > ASK_AGAIN_TIMES:  # writes and notifications vanish without an error
            self._lost.add(agent)
            return
        if posted.handle is not None:
            return  # the write itself is still under way, says the transport
        try:
            self._transport.notify(agent, posted.chunk.notification(posted.attempt).pack())
        except (PeerLost, TransportError):
            self._counters["transport_errors"] += 1
            self._lost.add(agent)

    def _advance(self, key: tuple[str, int], posted: Posted) -> bool:
        if posted.handle is not None:
            state = posted.handle.state()  # asking also sends the notification, so ask until it ends
            if state is WriteState.PENDING:
                return False
            posted.handle.release()
            posted.handle = None
            self._account(key[0], posted)
            if state is WriteState.FAILED and posted.answer is None:
                self._lost.add(key[0])
                self._finish(key, "transport")
                return True
        match posted.answer:
            case None:
                return False
            case Kind.ACK:
                self._finish(key, None)
            case Kind.NACK if posted.attempt == 0 and not posted.quarantined:
                posted.attempt = 1
                posted.answer = None
                posted.deadline_s = self._clock() + self._stall_timeout_s
                self._counters["chunks_resent"] += 1
                self._write(posted)
            case Kind.NACK:
                self._finish(key, "bad_chunk")
            case _:
                self._finish(key, "discarded")
        return True

    def _write(self, posted: Posted) -> None:
        chunk = posted.chunk
        link = chunk.link
        posted.posted_s = self._clock()
        try:
            posted.handle = self._transport.write(
                link.agent,
                local_address=self._arena.slot_address(link.region.slot(chunk.slot)),
                remote_address=link.remote_address + chunk.slot * link.remote_slot_bytes,
                nbytes=chunk.nbytes,
                notification=chunk.notification(posted.attempt).pack(),
            )
        except (PeerLost, TransportError) as error:
            self._counters["transport_errors"] += 1
            self._lost.add(link.agent)
            logger.warning("chunk %d of %s: %s", chunk.sequence, chunk.transfer_id.hex(), error)
            self._finish((link.agent, chunk.slot), "peer_lost" if isinstance(error, PeerLost) else "transport")

    def _account(self, agent: str, posted: Posted) -> None:
        """A write ended: writes to one peer share a wire, so that each counts only from the end of the one before."""
        now = self._clock()
        posted.wire_s += now - max(posted.posted_s, self._wire_free_s.get(agent, 0.0))
        self._wire_free_s[agent] = now

    def _finish(self, key: tuple[str, int], failure: str | None) -> None:
        posted, now = self._posted.pop(key), self._clock()
        chunk = posted.chunk
        if failure is None:
            add_duration(self._counters, CHUNK_WRITE, now - posted.since_s, CHUNK_SECONDS)
        self._emit(ChunkDone(chunk.link, chunk.slot, chunk.transfer_id, failure, now, posted.wire_s))

    def _memory(self, chunk: StagedChunk) -> Bytes:
        return self._arena.array(chunk.link.region.slot(chunk.slot))[: chunk.nbytes]
