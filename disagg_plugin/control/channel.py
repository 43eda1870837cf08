"""The side channel's two ends: ROUTER and DEALER sockets on one asyncio loop, CURVE, one msgpack frame a message.

Everything here belongs to the loop that ran ``start``; nothing is safe to call from another thread. Sockets are plain
(synchronous) ZeroMQ sockets driven by their file descriptor: a sleeping channel costs nothing, a message one wake-up.

How an authentication failure is seen, on each end:

==================  ==================================================  ==========================================
what is wrong       the server sees                                     the client sees
==================  ==================================================  ==========================================
client key unknown  its ZAP handler refuses: address and key            HANDSHAKE_FAILED_AUTH
other server key    HANDSHAKE_FAILED_PROTOCOL, "cryptographic"          closed in mid-handshake, with every key
keys on one end     HANDSHAKE_FAILED_PROTOCOL, "mechanism mismatch"     the same event, or closed in mid-handshake
==================  ==================================================  ==========================================

Keys on one end only: whoever finds out first hangs up, and on loopback the other end may learn nothing from that
attempt; within the first ten, quick ones each end has been first (0.6 s at most in 60 runs). A connection closed in
mid-handshake may also be a server that just stopped, so the client believes it only when the next attempt ends in the
same way, some 100 ms later. A client makes a new socket for each attempt: libzmq does not reconnect after a protocol
error, and a fresh socket holds no stale messages.
"""

import asyncio
import ipaddress
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import zmq
from zmq.utils import z85

from disagg_plugin.control.keys import AllowList, KeyRing
from disagg_plugin.control.messages import AnyMessage
from disagg_plugin.control.sockets import (
    HANDSHAKE_S,
    Guarded,
    RateLimit,
    Reader,
    bind_problem,
    decode,
    encode,
    endpoint,
    hand_over,
    monitor,
    new_socket,
    peer_address,
    resolve,
    set_transport_options,
)
from disagg_plugin.errors import ConfigError, DisaggError

BOUND_IDENTITIES = 4096
CONNECT_S = 3.0
RETRY_MIN_S = 0.1
RETRY_MAX_S = 2.0
RETRY_QUICKLY = 10  # attempts before the pause grows
LOG_AGAIN_S = 60.0

_COUNTERS = ("messages_in", "messages_out", "dropped", "malformed", "oversized", "callback_errors")
# values of HANDSHAKE_FAILED_PROTOCOL_FAILED_PROTOCOL, from zmq.h
_CRYPTOGRAPHIC = 0x11000001
_MECHANISM_MISMATCH = 0x11000002

logger = logging.getLogger(__name__)


class ChannelState(StrEnum):
    """What a client knows about its server."""

    CONNECTING = "connecting"  # before the first outcome only
    UP = "up"
    AUTHENTICATION_FAILED = "authentication failed"  # still retried: keys may be repaired at run time
    DOWN = "down"  # nobody answers there


def check_exposure(host: str, keys: KeyRing | None, insecure: bool) -> None:
    """Without keys only a loopback address may be bound, unless the user insists.

    Raises:
        ConfigError: One line that names the three ways out.
    """
    if keys is not None or insecure or host == "localhost":
        return
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ConfigError(
            f"side channel: {host} can be reached by other machines: set side_channel.keys_dir (`disagg keygen DIR`), "
            "or side_channel.host to 127.0.0.1, or side_channel.insecure"
        )


class SideChannelServer:
    """Accepts clients, each known by the identity it chose and bound to the key that it came with.

    libzmq lets a newer connection take over an identity, which a client needs that reconnects. So clients choose
    identities that nobody can guess, and what comes under a known identity with another key is dropped.

    Args:
        port: TCP port; 0 lets the operating system choose.
        keys: None serves clients without keys only; see :func:`check_exposure`.
        on_message: Called on the loop with (identity, message). What it raises is logged, counted and forgotten.
        context: Shared with clients if given, and not closed; at most one server with keys in a context.
    """

    def __init__(
        self,
        *,
        host: str,
        port: int,
        keys: KeyRing | None,
        on_message: Callable[[bytes, AnyMessage], None],
        context: "zmq.Context[Any] | None" = None,
    ) -> None:
        self.counters = dict.fromkeys((*_COUNTERS, "rejected_auth", "handshake_failed", "impostors"), 0)
        self._host, self._port, self._keys = host, port, keys
        self._on_message = Guarded(on_message, self.counters)
        self._owns_context = context is None
        self._context: zmq.Context[Any] = zmq.Context(io_threads=1) if context is None else context
        self._allowed = AllowList(keys) if keys else None
        self._readers: list[Reader] = []
        self._router: Reader | None = None
        self._zap: Reader | None = None
        self._addresses: dict[int, str] = {}  # descriptor -> peer, of open connections
        self._keys_of: dict[bytes, str] = {}  # identity -> the client's public key; in order of their last message
        self._failure: str | None = None  # of the connection whose DISCONNECTED comes next
        self._may_log = RateLimit(LOG_AGAIN_S)

    async def start(self) -> int:
        """Bind; returns the port.

        Raises:
            ConfigError: The address cannot be bound; the line says why and which setting to change.
        """
        try:
            if self._keys is not None:
                self._zap = Reader(new_socket(self._context, zmq.REP), self._on_zap)
                self._readers.append(self._zap)
                self._zap.socket.bind("inproc://zeromq.zap.01")  # before the router: no connection goes unasked
            router = new_socket(self._context, zmq.ROUTER)
            self._router = Reader(router, self._on_frames, whole=True)
            self._readers.insert(0, self._router)  # closed before the ZAP handler
            set_transport_options(router)
            router.setsockopt(zmq.ROUTER_MANDATORY, 1)
            router.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a client that reconnects replaces its former self
            router.setsockopt(zmq.BACKLOG, 512)
            if self._keys is not None:
                router.setsockopt(zmq.CURVE_SERVER, 1)
                router.setsockopt(zmq.CURVE_SECRETKEY, self._keys.server.secret)
                router.setsockopt(zmq.ZAP_DOMAIN, b"disagg")
                router.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # no handler, no entry
            events = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED
            events |= zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            self._readers.insert(1, monitor(router, events, self._on_event))
            address = self._host if self._host == "*" else await resolve(self._host, router)
            try:
                router.bind(endpoint(address, self._port))
            except zmq.ZMQError as error:
                raise ConfigError(bind_problem(error, self._host, self._port)) from None
            return int(router.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        except BaseException:  # not swallowed: no socket stays behind, cancellation included
            await self.close()
            raise

    def send(self, identity: bytes, message: AnyMessage) -> bool:
        """Hand a message over; never blocks. False: that client is gone or reads too slowly, counted as ``dropped``.

        Raises:
            PeerError: The message is larger than ``MAX_MESSAGE_BYTES``; nothing was sent.
        """
        payload = encode(message, self.counters)
        return hand_over(self._router, [identity, payload], self.counters)

    def key_of(self, identity: bytes) -> str:
        """The public key that proved this client (Z85); empty without keys, or if it was never heard."""
        return self._keys_of.get(identity, "")

    async def close(self) -> None:
        """Release the port and every socket; idempotent."""
        self._router = None
        while self._readers:
            self._readers.pop(0).close()
        if self._owns_context:
            self._context.destroy(linger=0)

    def _on_frames(self, frames: list[zmq.Frame]) -> None:
        if len(frames) != 2:
            self.counters["malformed"] += 1
            return
        identity = frames[0].bytes
        if not self._is_itself(identity, frames[1]):
            self.counters["impostors"] += 1
            return
        message = decode(frames[1].bytes, self.counters)
        if message is not None:
            self._on_message(identity, message)

    def _is_itself(self, identity: bytes, frame: zmq.Frame) -> bool:
        """Whether this message came with the key that the identity came with first."""
        if self._keys is None:
            return True
        key = str(frame.get("User-Id"))
        bound = self._keys_of.pop(identity, key)
        self._keys_of[identity] = bound
        if len(self._keys_of) > BOUND_IDENTITIES:
            del self._keys_of[next(iter(self._keys_of))]
        return bound == key

    def _on_zap(self, frames: list[bytes]) -> None:
        """Answer libzmq's question (RFC 27): version, request, domain, address, identity, mechanism, credentials."""
        assert self._zap is not None
        status, public = b"400", b""
        try:
            public = z85.encode(frames[6])
            if frames[5] == b"CURVE" and self._allowed is not None and self._allowed.accepts(public):
                status = b"200"
            else:
                assert self._keys is not None
                self._reject(
                    frames[3].decode(),
                    f"its client key {public.decode()} is not accepted here: "
                    f"copy its client.pub to {self._keys.directory / 'allowed'}",
                )
        except Exception:  # a question without an answer would end all authentication
            logger.exception("side channel: authentication handler failed, client refused")
        user = public if status == b"200" else b""
        self._zap.socket.send_multipart([b"1.0", frames[1], status, b"", user, b""], zmq.DONTWAIT)

    def _on_event(self, event: int, value: int) -> None:
        if event == zmq.EVENT_ACCEPTED:
            self._addresses[value] = peer_address(value)
        elif event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            self._failure = {
                _CRYPTOGRAPHIC: "it expects another server key: give it this node's server.pub",
                _MECHANISM_MISMATCH: "only one end uses keys: set side_channel.keys_dir on both, or on none",
            }.get(value)
            if self._failure is None:
                self.counters["handshake_failed"] += 1
        elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            self.counters["handshake_failed"] += 1  # port scans, health checks, half-open connections
        elif event == zmq.EVENT_DISCONNECTED:
            address = self._addresses.pop(value, "an unknown address")
            failure, self._failure = self._failure, None
            if failure is not None:
                self._reject(address, failure)

    def _reject(self, address: str, reason: str) -> None:
        self.counters["rejected_auth"] += 1
        if self._may_log(address):
            logger.warning("side channel: authentication of %s failed: %s", address, reason)


class SideChannelClient:
    """One server's client; connects, and connects again, by itself.

    Args:
        host: Name or address; names are resolved anew for every attempt.
        identity: How the server knows this client; a newer connection with the same identity replaces the older.
        on_message: Called on the loop with each message.
        on_state: Called on the loop with (state, reason) when either changes; may ``send`` at once when UP.
        context: Shared if given, and not closed.

    What the callbacks raise is logged, counted and forgotten.

    Raises:
        ValueError: ZeroMQ cannot take the identity.
    """

    def __init__(
        self,
        *,
        host: str,
        port: int,
        keys: KeyRing | None,
        identity: bytes,
        on_message: Callable[[AnyMessage], None],
        on_state: Callable[[ChannelState, str], None],
        context: "zmq.Context[Any] | None" = None,
    ) -> None:
        self.counters = dict.fromkeys((*_COUNTERS, "connects", "auth_failures"), 0)
        self.state = ChannelState.CONNECTING
        self.reason = ""
        if not 1 <= len(identity) <= 255 or identity[0] == 0:
            raise ValueError(f"an identity has 1 to 255 bytes, the first not zero: {identity!r}")
        self._host, self._port, self._keys, self._identity = host, port, keys, identity
        self._on_message = Guarded(on_message, self.counters)
        self._on_state = Guarded(on_state, self.counters)
        self._owns_context = context is None
        self._context: zmq.Context[Any] = zmq.Context(io_threads=1) if context is None else context
        self._task: asyncio.Task[None] | None = None
        self._live: Reader | None = None  # the socket while UP
        self._candidate = 0  # of the known server keys, the one to try
        self._may_log = RateLimit(LOG_AGAIN_S)

    async def start(self) -> None:
        """Begin to connect; returns at once, ``on_state`` tells the rest."""
        self._task = asyncio.create_task(self._run(), name=f"side channel to {self._host}:{self._port}")

    def send(self, message: AnyMessage) -> bool:
        """Hand a message over; never blocks. False: not UP or the server reads too slowly, counted as ``dropped``.

        Raises:
            PeerError: The message is larger than ``MAX_MESSAGE_BYTES``; nothing was sent.
        """
        return hand_over(self._live, [encode(message, self.counters)], self.counters)

    async def close(self) -> None:
        """Disconnect and release every socket; idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None
        if self._owns_context:
            self._context.destroy(linger=0)

    async def _run(self) -> None:
        """Connect for ever, one socket per attempt, with growing pauses while it fails."""
        failures, closed_handshakes, pause_s = 0, 0, RETRY_MIN_S
        while True:
            candidates: tuple[bytes | None, ...] = self._keys.server_keys(self._host) if self._keys else (None,)
            self._candidate %= max(1, len(candidates))
            if candidates:
                ended = await self._connection(candidates[self._candidate])
            else:
                ended = _Ended(_End.REFUSED, f"no server key for {self._host}: copy its server.pub to servers/")
            closed_handshakes = closed_handshakes + 1 if ended.end is _End.HANDSHAKE_CLOSED else 0
            failures = 0 if ended.end is _End.LOST else failures + 1
            if ended.end in (_End.LOST, _End.UNREACHABLE):
                self._enter(ChannelState.DOWN, ended.reason)
            elif ended.end is _End.REFUSED:
                self._authentication_failed(ended.reason, certain=True)
            else:
                self._candidate += 1  # the next known server key: one of a rotation, or of another node
                if closed_handshakes >= max(2, len(candidates)):
                    self._authentication_failed(ended.reason, certain=False)
            pause_s = RETRY_MIN_S if failures <= RETRY_QUICKLY else min(2 * pause_s, RETRY_MAX_S)
            await asyncio.sleep(pause_s * random.uniform(0.75, 1.25))  # many clients, one restarted server

    async def _connection(self, server_key: bytes | None) -> "_Ended":
        """One attempt and, if it succeeds, the whole life of that connection."""
        ended: asyncio.Future[_Ended] = asyncio.get_running_loop().create_future()
        readers: list[Reader] = []
        began = time.monotonic()

        def end(end: _End, reason: str) -> None:
            if not ended.done():
                ended.set_result(_Ended(end, reason))

        def on_event(event: int, value: int) -> None:
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                timer.cancel()
                self._live = readers[0]
                self.counters["connects"] += 1
                self._enter(ChannelState.UP, "connected")
            elif event == zmq.EVENT_DISCONNECTED and self._live is not None:
                end(_End.LOST, f"connection to {self._name()} lost")
            else:
                end(*self._failure(event, value, time.monotonic() - began))

        timer = asyncio.get_running_loop().call_later(
            CONNECT_S + HANDSHAKE_S + 1, end, _End.UNREACHABLE, f"no answer from {self._name()}"
        )
        try:
            dealer = new_socket(self._context, zmq.DEALER)
            readers.append(Reader(dealer, self._on_frames))
            self._set_options(dealer, server_key)
            events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
            events |= zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            events |= zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            readers.append(monitor(dealer, events, on_event))
            dealer.connect(endpoint(await resolve(self._host, dealer), self._port))
            return await ended
        except (zmq.ZMQError, OSError, DisaggError) as error:
            return _Ended(_End.UNREACHABLE, f"{self._name()}: {error}")
        except Exception as error:  # an attempt is repeated for ever: nothing unforeseen may end that
            if self._may_log(repr(error)):
                logger.exception("side channel: attempt to connect to %s failed, will be repeated", self._name())
            return _Ended(_End.UNREACHABLE, f"{self._name()}: {error!r}")
        finally:
            self._live = None
            timer.cancel()
            for reader in readers:
                reader.close()

    def _failure(self, event: int, value: int, elapsed_s: float) -> "tuple[_End, str]":
        """What an event before HANDSHAKE_SUCCEEDED means."""
        name = self._name()
        if event == zmq.EVENT_CLOSED:
            why = "no answer" if elapsed_s > 0.9 * CONNECT_S else "connection refused"
            return _End.UNREACHABLE, f"{why} at {name}: is the engine running, are side_channel.host and port right?"
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            return _End.REFUSED, f"{name} does not accept our client key: copy our client.pub to its allowed/"
        if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and value == _MECHANISM_MISMATCH:
            return _End.REFUSED, f"only one of us and {name} uses keys: set side_channel.keys_dir on both, or on none"
        if event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL and elapsed_s > 0.9 * HANDSHAKE_S:
            return _End.UNREACHABLE, f"{name} accepts connections but does not answer the handshake"
        check = "is its server.pub in our servers/?" if self._keys else "does it need side_channel.keys_dir?"
        return _End.HANDSHAKE_CLOSED, f"{name} closed the connection during the handshake: {check}"

    def _set_options(self, dealer: "zmq.Socket[bytes]", server_key: bytes | None) -> None:
        set_transport_options(dealer)
        dealer.setsockopt(zmq.ROUTING_ID, self._identity)
        dealer.setsockopt(zmq.RECONNECT_IVL, -1)
        dealer.setsockopt(zmq.CONNECT_TIMEOUT, int(CONNECT_S * 1000))
        if self._keys is not None and server_key is not None:
            dealer.setsockopt(zmq.CURVE_SERVERKEY, server_key)
            dealer.setsockopt(zmq.CURVE_PUBLICKEY, self._keys.client.public)
            dealer.setsockopt(zmq.CURVE_SECRETKEY, self._keys.client.secret)

    def _on_frames(self, frames: list[bytes]) -> None:
        message = decode(frames[0], self.counters) if len(frames) == 1 else None
        if len(frames) != 1:
            self.counters["malformed"] += 1
        elif message is not None:
            self._on_message(message)

    def _authentication_failed(self, reason: str, *, certain: bool) -> None:
        self.counters["auth_failures"] += 1
        if self.state is ChannelState.AUTHENTICATION_FAILED and not certain:
            return  # a reason that is known for certain stands: who hangs up first is a race
        if self._may_log(reason):
            logger.warning("side channel: authentication failed: %s", reason)
        self._enter(ChannelState.AUTHENTICATION_FAILED, reason)

    def _enter(self, state: ChannelState, reason: str) -> None:
        if (state, reason) != (self.state, self.reason):
            self.state, self.reason = state, reason
            self._on_state(state, reason)

    def _name(self) -> str:
        return f"{self._host}:{self._port}"


class _End(StrEnum):
    """How an attempt or a connection ended."""

    UNREACHABLE = "unreachable"
    REFUSED = "refused"  # certainly the keys
    HANDSHAKE_CLOSED = "handshake closed"  # probably the keys
    LOST = "lost"  # after it was up


@dataclass(frozen=True, slots=True)
class _Ended:
    end: _End
    reason: str
