"""Plain ZeroMQ sockets on an asyncio loop: what both ends of the side channel share."""

import asyncio
import errno
import ipaddress
import itertools
import logging
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from disagg_plugin.control.messages import MAX_MESSAGE_BYTES, AnyMessage
from disagg_plugin.errors import ConfigError, PeerError

HANDSHAKE_S = 3.0  # a connection that is not authenticated by then is closed
HIGH_WATER_MESSAGES = 512  # per peer and direction; beyond, messages are dropped and counted
FRAME_OVERHEAD_BYTES = 1024  # what CURVE adds counts for libzmq's limit
DEAD_PEER_MS = 6000  # unacknowledged bytes for this long close the connection
DRAIN_BATCH = 64  # messages handled before the loop gets a turn

logger = logging.getLogger(__name__)
_monitor_names = itertools.count()
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


class Reader:
    """Calls ``handle(frames)`` for each message of a socket, from the loop: bytes, or ``zmq.Frame`` if ``whole``.

    The descriptor is edge-triggered: it tells that *something* happened once, and any call on the socket may consume
    that. Hence: drain until empty, and look again after each send.
    """

    def __init__(
        self, zmq_socket: "zmq.Socket[bytes]", handle: Callable[[list[Any]], None], *, whole: bool = False
    ) -> None:
        self.socket = zmq_socket
        self._handle = handle
        self._copy = not whole
        self._loop = asyncio.get_running_loop()
        self._descriptor = int(zmq_socket.getsockopt(zmq.FD))
        self._scheduled = False
        self._loop.add_reader(self._descriptor, self._drain)
        self.look_again()

    def look_again(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._drain)

    def close(self) -> None:
        if not self.socket.closed:
            self._loop.remove_reader(self._descriptor)
            if self.socket.type in (zmq.ROUTER, zmq.DEALER):
                self.socket.monitor(None, 0)
            self.socket.close(linger=0)

    def _drain(self) -> None:
        self._scheduled = False
        for _ in range(DRAIN_BATCH):
            if self.socket.closed:
                return
            try:
                frames = self.socket.recv_multipart(zmq.DONTWAIT, copy=self._copy)
            except zmq.Again:
                return
            self._handle(frames)
        self.look_again()


class Guarded:
    """A callback whose exceptions end here: logged once per kind, counted."""

    def __init__(self, callback: Callable[..., None], counters: dict[str, int]) -> None:
        self._callback = callback
        self._counters = counters
        self._logged: set[type[Exception]] = set()

    def __call__(self, *arguments: object) -> None:
        try:
            self._callback(*arguments)
        except Exception as error:  # the reader survives its callbacks
            self._counters["callback_errors"] += 1
            if type(error) not in self._logged:
                self._logged.add(type(error))
                logger.exception("side channel: %s raised; logged once per kind", self._callback)


class RateLimit:
    """True at most once per key and interval."""

    def __init__(self, interval_s: float, keys_max: int = 1024) -> None:
        self._interval_s = interval_s
        self._keys_max = keys_max
        self._last: dict[str, float] = {}

    def __call__(self, key: str) -> bool:
        now = time.monotonic()
        if now - self._last.get(key, -self._interval_s) < self._interval_s:
            return False
        if len(self._last) >= self._keys_max:
            self._last.pop(next(iter(self._last)))
        self._last[key] = now
        return True


def encode(message: AnyMessage, counters: dict[str, int]) -> bytes:
    payload = _encoder.encode(message)
    if len(payload) > MAX_MESSAGE_BYTES:
        counters["oversized"] += 1
        raise PeerError(
            f"side channel: a {type(message).__name__} of {len(payload)} bytes is over the limit of {MAX_MESSAGE_BYTES}"
        )
    return payload


def decode(payload: bytes, counters: dict[str, int]) -> AnyMessage | None:
    if len(payload) > MAX_MESSAGE_BYTES:
        counters["oversized"] += 1
        return None
    try:
        message = _decoder.decode(payload)
    except (ValueError, RecursionError):  # msgspec's errors and UnicodeDecodeError are ValueErrors
        counters["malformed"] += 1
        return None
    counters["messages_in"] += 1
    return message


def hand_over(reader: Reader | None, frames: list[bytes], counters: dict[str, int]) -> bool:
    if reader is not None and not reader.socket.closed:
        try:
            reader.socket.send_multipart(frames, zmq.DONTWAIT)
        except zmq.ZMQError as error:
            if error.errno not in (errno.EAGAIN, errno.EHOSTUNREACH):
                raise
        else:
            counters["messages_out"] += 1
            reader.look_again()
            return True
        reader.look_again()
    counters["dropped"] += 1
    return False


def new_socket(context: "zmq.Context[Any]", kind: int) -> "zmq.Socket[bytes]":
    made: zmq.Socket[bytes] = context.socket(kind, socket_class=zmq.Socket)  # plain, also from an asyncio context
    made.setsockopt(zmq.LINGER, 0)
    return made


def set_transport_options(made: "zmq.Socket[bytes]") -> None:
    for option, value in (
        (zmq.SNDHWM, HIGH_WATER_MESSAGES),
        (zmq.RCVHWM, HIGH_WATER_MESSAGES),
        (zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES + FRAME_OVERHEAD_BYTES),
        (zmq.HANDSHAKE_IVL, int(HANDSHAKE_S * 1000)),
        (zmq.TCP_KEEPALIVE, 1),
        (zmq.TCP_KEEPALIVE_IDLE, 5),
        (zmq.TCP_KEEPALIVE_INTVL, 2),
        (zmq.TCP_KEEPALIVE_CNT, 3),
        (zmq.TCP_MAXRT, DEAD_PEER_MS),
    ):
        made.setsockopt(option, value)


def monitor(watched: "zmq.Socket[bytes]", events: int, handle: Callable[[int, int], None]) -> Reader:
    """Calls ``handle(event, value)`` for the socket's own events."""
    address = f"inproc://disagg-monitor-{next(_monitor_names)}"
    watched.monitor(address, events)
    pair = new_socket(watched.context, zmq.PAIR)
    pair.setsockopt(zmq.RCVHWM, 0)  # a full monitor would block libzmq's I/O thread
    pair.connect(address)
    return Reader(pair, lambda frames: handle(*struct.unpack("=HI", frames[0])))


async def resolve(host: str, made: "zmq.Socket[bytes]") -> str:
    """The numeric address; libzmq would look a name up in its I/O thread, where every connection waits for it."""
    try:
        ipaddress.ip_address(host)
        address = host
    except ValueError:
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except OSError as error:
            raise ConfigError(f"side channel: cannot resolve {host!r} ({error.strerror})") from None
        address = str(found[0][4][0])
    made.setsockopt(zmq.IPV6, int(":" in address))
    return address


def endpoint(address: str, port: int) -> str:
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"


def bind_problem(error: zmq.ZMQError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use: set side_channel.port"
    if error.errno in (errno.EADDRNOTAVAIL, errno.ENODEV):
        return f"{host} is not an address of this machine: set side_channel.host"
    return f"cannot bind port {port} on {host} ({error.strerror}): set side_channel.host and side_channel.port"


def peer_address(descriptor: int) -> str:
    """Who is at the other end of libzmq's connection, if it still stands; the descriptor stays libzmq's."""
    looking: socket.socket | None = None
    try:
        looking = socket.socket(fileno=descriptor)
        return str(looking.getpeername()[0])
    except OSError:
        return "an unknown address"
    finally:
        if looking is not None:
            looking.detach()
