"""A scheduler process's figures on their way to its API process, for engines whose own statistics cannot carry them.

    scheduler process                          API process
    ReportSender.send(Deltas) ──ipc socket──▶ ReportReceiver.run(listener)

The sender never waits: while the socket takes nothing, increments merge and go out with the next ones. The socket lies
in a folder that only this user can enter, so what arrives there is believed.
"""

from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from disagg_plugin.boundary import guarded
from disagg_plugin.observability.deltas import Deltas

UNSENT_MESSAGES = 64  # in the socket, before increments merge


def address_in(folder: Path) -> str:
    """Where the two processes meet; see ``meeting_folder``."""
    return f"ipc://{folder}/reports"


class ReportSender:
    """The scheduler's end; its own thread only."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context(io_threads=1)  # own: the engine has its
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.set(zmq.LINGER, 0)
        self._socket.set(zmq.SNDHWM, UNSENT_MESSAGES)
        self._socket.connect(address)
        self._unsent: Deltas | None = None

    def send(self, deltas: Deltas) -> None:
        """Returns at once, whoever listens."""
        if self._unsent is not None:
            self._unsent.merge(deltas)
            deltas = self._unsent
        try:
            self._socket.send(msgspec.msgpack.encode(deltas.data), zmq.NOBLOCK)
            self._unsent = None
        except zmq.Again:
            self._unsent = deltas

    def close(self) -> None:
        """Idempotent; what was not sent is lost."""
        self._socket.close()
        self._context.term()


class ReportReceiver:
    """The API process's end; its event loop only."""

    def __init__(self, address: str) -> None:
        """
        Raises:
            zmq.ZMQError: Somebody else listens there.
        """
        self._context = zmq.asyncio.Context(io_threads=1)
        self._socket = self._context.socket(zmq.PULL)
        self._socket.set(zmq.LINGER, 0)
        self._socket.bind(address)

    async def run(self, listener: Callable[[Deltas], None]) -> None:
        """Call ``listener`` with each report, until cancelled. What it raises is logged, once."""

        @guarded
        def hear(message: bytes) -> None:
            listener(Deltas(msgspec.msgpack.decode(message, type=dict)))

        try:
            while True:
                hear(await self._socket.recv())
        finally:
            self._socket.close()
            self._context.term()
