"""The ``disagg-data`` thread: everything that touches the transport happens here, and nothing else does.

It sleeps on a condition while no transfer is open, and polls every <= 1 ms while one is, and for a while after. While
it sleeps it looks up once a second, for peers that still wait for an answer.

An agent that cannot be reached loses everything under way and is introduced anew, from the metadata that we have: a
connection that was cut may work again, while the transport would remember the broken one for ever.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from disagg_plugin.errors import TransportError, WireError
from disagg_plugin.kv.commands import OpenReceive
from disagg_plugin.kv.intake import Intake
from disagg_plugin.kv.poster import Poster
from disagg_plugin.kv.receiver import Landed, ReceiveBroken, ReceiveLink
from disagg_plugin.kv.sender import ChunkDone, SendBroken, SendLink, StagedChunk
from disagg_plugin.kv.transport import Transport
from disagg_plugin.kv.wire import Kind, parse_notification

logger = logging.getLogger(__name__)

COUNTERS = (
    *("nacks", "nacks_received", "chunks_resent", "discards", "replays", "foreign", "late", "early", "bad_slots"),
    *("unparsable", "checksum_failures", "stale_answers", "buffer_waits", "send_deadlines", "receive_deadlines"),
    *("transport_errors", "reintroductions", "internal_errors"),
)

_P = ParamSpec("_P")
_T = TypeVar("_T")

_SPIN_S = 0.0001  # poll without a pause this long after something happened
_SHORT_WAIT_S = 0.0002  # and this often for as long as _SHORT_WAITS_S
_SHORT_WAITS_S = 0.01
_LONG_WAIT_S = 0.001
_IDLE_WAIT_S = 1.0
_UNUSED_AGENTS_MAX = 16
_QUARANTINE_WAIT_S = 0.05  # nothing is open, but a slot is still waiting for its answer

Link = SendLink | ReceiveLink


@dataclass(frozen=True, slots=True)
class Connect:
    """Engine → thread: load the peer's metadata, then use this link."""

    link: Link
    metadata: bytes


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Engine → thread."""

    link: Link
    reason: str


@dataclass(frozen=True, slots=True)
class CloseTicket:
    """Engine → thread."""

    nonce: int


@dataclass(frozen=True, slots=True)
class LinkLost:
    """Thread → engine: the peer cannot be reached under this link."""

    link: Link


ThreadCommand = Connect | Disconnect | CloseTicket | OpenReceive | StagedChunk
Event = ChunkDone | SendBroken | Landed | ReceiveBroken | LinkLost


@dataclass(slots=True)
class _Agent:
    """An agent that the transport knows, also when its last link has ended.

    A peer that was only silent for a while comes back as it was; a connection that one side made anew does not match
    what the other side kept.
    """

    peer: str
    metadata: bytes
    links: int = 0


class Pump:
    """What the ``disagg-data`` thread does, one round a call; nothing else touches the transport."""

    def __init__(
        self,
        transport: Transport,
        poster: Poster,
        intake: Intake,
        *,
        emit: Callable[[Event], None],
        counters: dict[str, float],
        lost: set[str],
    ) -> None:
        """
        Args:
            lost: Where ``poster`` and ``intake`` leave the names of agents that they cannot reach.
        """
        self._lost = lost
        self.inbox: deque[ThreadCommand] = deque()
        self._transport = transport
        self._poster = poster
        self._intake = intake
        self._emit = emit
        self._counters = counters
        self._agents: dict[str, _Agent] = {}  # loaded ones, in order of their last use
        self._last_error = ""

    @property
    def waiting(self) -> bool:
        """Answers are owed, in either direction."""
        return self._poster.waiting > 0 or self._intake.waiting > 0

    @property
    def connected(self) -> bool:
        """Somebody may write to us: also one that was given up and does not know it yet, or waits for answers."""
        return bool(self._agents)

    @property
    def quarantined(self) -> int:
        return self._poster.quarantined

    @property
    def unanswered(self) -> int:
        return self._intake.waiting

    def once(self) -> bool:
        """Commands, notifications, writes, deadlines; True if anything happened. Never raises."""
        happened = False
        while self.inbox:
            command = self.inbox.popleft()
            self._within_boundary(self._do, command)
            happened = True
        for agent, message in self._within_boundary(self._transport.poll) or ():
            self._within_boundary(self._hear, agent, message)
            happened = True
        happened |= bool(self._within_boundary(self._poster.pump))
        happened |= bool(self._within_boundary(self._intake.pump))
        while self._lost:
            self._within_boundary(self._introduce_again, self._lost.pop())
        return happened

    def close(self) -> None:
        """Release every handle and the transport; the thread has ended."""
        self._within_boundary(self._poster.close)
        self._within_boundary(self._transport.close)

    def _within_boundary(self, step: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T | None:
        try:
            return step(*args, **kwargs)
        except Exception as error:  # the thread must outlive whatever a peer or NIXL does
            self._counters["internal_errors"] += 1
            if repr(error) != self._last_error:
                logger.exception("data plane: %s", step)
                self._last_error = repr(error)
            return None

    def _do(self, command: ThreadCommand) -> None:
        match command:
            case StagedChunk():
                self._poster.post(command)
            case OpenReceive():
                self._intake.open(command)
            case CloseTicket():
                self._intake.close(command.nonce)
            case Connect():
                self._connect(command)
            case Disconnect():
                self._disconnect(command)

    def _hear(self, agent: str, message: bytes) -> None:
        try:
            notification = parse_notification(message)
        except WireError:
            self._counters["unparsable"] += 1
            return
        if notification.kind is Kind.CHUNK:
            self._intake.take(agent, notification)
        else:
            self._poster.answer(agent, notification)

    def _connect(self, command: Connect) -> None:
        link = command.link
        try:
            if link.agent not in self._agents:
                self._drop_agents_before(link)
                self._transport.remove_peer(link.agent)
                self._transport.add_peer(command.metadata)
                self._agents[link.agent] = _Agent(link.peer, command.metadata)
        except TransportError as error:
            self._counters["transport_errors"] += 1
            logger.warning("peer %s cannot be used: %s", link.peer, error)
            self._emit(LinkLost(link))
            return
        self._agents[link.agent].links += 1
        if isinstance(link, SendLink):
            self._poster.connect(link)
        else:
            self._intake.connect(link)

    def _disconnect(self, command: Disconnect) -> None:
        link = command.link
        if isinstance(link, SendLink):
            self._poster.disconnect(link)
        else:
            self._intake.disconnect(link, command.reason)
        if (agent := self._agents.pop(link.agent, None)) is not None:
            self._agents[link.agent] = agent
            agent.links -= 1

    def _drop_agents_before(self, link: Link) -> None:
        """Unload the peer's earlier lives, and whoever was not used for longest if there are many."""
        unused = [(name, agent) for name, agent in self._agents.items() if agent.links <= 0]
        for at, (name, agent) in enumerate(unused):
            if agent.peer == link.peer or at < len(unused) - _UNUSED_AGENTS_MAX:
                del self._agents[name]
                self._transport.remove_peer(name)
                self._intake.unloaded(name)

    def _introduce_again(self, agent: str) -> None:
        known = self._agents.get(agent)
        if known is None:
            return
        self._counters["reintroductions"] += 1
        self._poster.forget_posted(agent)
        self._transport.remove_peer(agent)
        try:
            self._transport.add_peer(known.metadata)
        except TransportError as error:  # the next write fails as well, and brings us here again
            logger.warning("peer %s cannot be introduced again: %s", agent, error)
        self._intake.reintroduced(agent)


class PumpLoop:
    """Calls ``Pump.once`` from its own thread for as long as there is a reason to.

    Attributes:
        open_transfers: Written by the engine's thread, read by ours: poll while it is not zero.
    """

    def __init__(self, pump: Pump, *, linger_s: float) -> None:
        self.open_transfers = 0
        self._pump = pump
        self._linger_s = linger_s
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="disagg-data", daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def tell(self, command: ThreadCommand) -> None:
        """Queue a command and wake the thread; the lock is never held while anything is done."""
        self._pump.inbox.append(command)
        if self._thread.is_alive():
            with self._wake:
                self._wake.notify()

    def stop(self) -> None:
        """End the thread after the round it is in."""
        self._closing = True
        if self._thread.is_alive():
            with self._wake:
                self._wake.notify()
            self._thread.join()

    def _run(self) -> None:
        last_event_s = last_open_s = time.monotonic()
        while not self._closing:
            happened = self._pump.once()
            now = time.monotonic()
            if happened:
                last_event_s = now
            if self.open_transfers or self._pump.waiting or happened:
                last_open_s = now
            quiet_s = now - last_event_s
            if quiet_s < _SPIN_S:
                time.sleep(0)
            elif now - last_open_s < self._linger_s:
                self._wait(_SHORT_WAIT_S if quiet_s < _SHORT_WAITS_S else _LONG_WAIT_S)
            else:
                self._wait(_QUARANTINE_WAIT_S if self._pump.quarantined else self._idle_wait_s())

    def _idle_wait_s(self) -> float | None:
        return _IDLE_WAIT_S if self._pump.connected else None

    def _wait(self, timeout_s: float | None) -> None:
        with self._wake:
            if not self._pump.inbox and not self._closing:
                self._wake.wait(timeout_s)
