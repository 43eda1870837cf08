"""The real transport, and what goes wrong on the way: for the synthetic engines of this folder and ``tests/nixl``."""

import ctypes
import dataclasses
from collections import deque
from contextlib import suppress
from typing import Any

import psutil
import torch

from disagg_plugin.errors import PeerLost, TransportError
from disagg_plugin.kv.ring import SlotArena
from disagg_plugin.kv.transport import NixlTransport, Transport, WriteHandle, WriteState
from disagg_plugin.kv.wire import Kind, Notification, parse_notification


class FaultyTransport:
    """``next_faults`` names one fault per chunk to come, when it is first sent; ``all_corrupt`` damages every write.

    corrupt       one byte of the payload is flipped
    truncate      the second half of the chunk never arrives
    short         the notification announces half of the chunk
    stale         right behind the chunk, an older write lands in the same slot
    replay        its notification arrives twice
    other_slot    its notification names a slot outside the region
    foreign       a notification under another ticket arrives with it
    late          the write begins only when ``let_late_writes_go`` is called
    """

    def __init__(self, inner: Transport, slot_bytes: int) -> None:
        self._inner = inner
        self._scratch = SlotArena(slots=2, slot_bytes=slot_bytes)
        self._first_write = b""
        self._last_notification: tuple[str, bytes] | None = None
        self._extra: list[WriteHandle] = []
        self.late: list[LateWrite] = []
        self.next_faults: deque[str] = deque()
        self.all_corrupt = False
        self.to_send: deque[tuple[str, bytes]] = deque()
        inner.register(self._scratch.buffer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def poll(self) -> list[tuple[str, bytes]]:
        self._extra = [handle for handle in self._extra if handle.state() is WriteState.PENDING]
        while self.to_send:
            with suppress(PeerLost, TransportError):  # ours to say, not the product's
                self._inner.notify(*self.to_send.popleft())
        return self._inner.poll()

    def replay_last(self) -> None:
        """The newest notification once more."""
        if self._last_notification is not None:
            self.to_send.append(self._last_notification)

    def let_late_writes_go(self) -> None:
        for late in self.late:
            late.go = True
        self.late.clear()

    def write(
        self, peer: str, *, local_address: int, remote_address: int, nbytes: int, notification: bytes
    ) -> WriteHandle:
        chunk = _memory(local_address, nbytes)
        self._first_write = self._first_write or chunk
        self._last_notification = (peer, notification)
        sent, written = parse_notification(notification), nbytes
        fault = self.next_faults.popleft() if self.next_faults and sent.attempt == 0 else ""
        if fault == "corrupt" or self.all_corrupt:
            local_address = self._scratched(0, bytes([*chunk[:-5], chunk[-5] ^ 1, *chunk[-4:]]))
        elif fault == "truncate":
            written = nbytes // 2
        elif fault == "short":
            notification = dataclasses.replace(sent, nbytes=nbytes // 2).pack()
        elif fault == "other_slot":
            self.to_send.append((peer, dataclasses.replace(sent, slot=4000).pack()))
        elif fault == "replay":
            self.to_send.append((peer, notification))
        elif fault == "foreign":
            self.to_send.append((peer, dataclasses.replace(sent, nonce=sent.nonce ^ 1).pack()))
        arguments = {
            "local_address": local_address,
            "remote_address": remote_address,
            "nbytes": written,
            "notification": notification,
        }
        if fault == "late":
            late = LateWrite(self._inner, peer, arguments)
            self.late.append(late)
            return late
        handle = self._inner.write(peer, **arguments)  # type: ignore[arg-type]
        if fault == "stale":
            self._overwrite(peer, remote_address)
        return handle

    def _overwrite(self, peer: str, remote_address: int) -> None:
        """What NIXL does with a write that its poster released: it lands, later, and says nothing."""
        stale = self._first_write
        address = self._scratched(1, stale)
        unheard = Notification(Kind.ACK, 4000, 0, 0, 0, 0).pack()  # NIXL wants one; no slot 4000 is ever posted
        self._extra.append(
            self._inner.write(
                peer,
                local_address=address,
                remote_address=remote_address,
                nbytes=len(stale),
                notification=unheard,
            )
        )

    def _scratched(self, slot: int, payload: bytes) -> int:
        self._scratch.tensor(slot)[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        return self._scratch.slot_address(slot)


class LateWrite:
    """A write that stays under way until somebody lets it go."""

    def __init__(self, inner: Transport, peer: str, arguments: dict[str, Any]) -> None:
        self._inner, self._peer, self._arguments = inner, peer, arguments
        self._handle: WriteHandle | None = None
        self.go = False

    def state(self) -> WriteState:
        if self.go and self._handle is None:
            self._handle = self._inner.write(self._peer, **self._arguments)
        return self._handle.state() if self._handle is not None else WriteState.PENDING

    def release(self) -> None:
        if self._handle is not None:
            self._handle.release()


class RelayedNixl(NixlTransport):
    """NIXL over TCP whose peers reach it by way of a relay: what it says of itself names the relay's port.

    UCX listens on one TCP port, which its address holds in network byte order.
    """

    def __init__(self, agent_name: str, relay_port: int) -> None:
        self._relay_port = relay_port
        for _ in range(8):  # the port's two bytes may stand in the address by chance, too
            before = _listening()
            super().__init__(agent_name)
            (self.port,) = _listening() - before
            if super().metadata().count(self._port_bytes) == 1:
                return
            self.close()
        raise AssertionError(f"UCX's port {self.port} stands in its address more than once, every time")

    @property
    def _port_bytes(self) -> bytes:
        return self.port.to_bytes(2, "big")

    def metadata(self) -> bytes:
        return super().metadata().replace(self._port_bytes, self._relay_port.to_bytes(2, "big"))


def _listening() -> set[int]:
    connections = psutil.Process().net_connections("tcp")
    return {connection.laddr.port for connection in connections if connection.status == psutil.CONN_LISTEN}


def _memory(address: int, nbytes: int) -> bytes:
    return ctypes.string_at(address, nbytes)
