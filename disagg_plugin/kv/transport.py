"""One-sided writes with a notification, and short messages: the seam to NIXL, and the only file that imports it.

All calls of one transport come from one thread, the data-plane thread, once its constructor and ``register`` are done.
``disagg_plugin.testing`` has the in-memory double.

What NIXL 1.5.1 does, and this file relies on:

* Without its progress thread nothing moves unless somebody calls it. In particular the notification of a write
  leaves the writer only when the writer asks for the state of its handle: **poll every pending handle**.
* Releasing a pending handle returns at once and does not stop the write. Nothing on the target stops it either.
* A target that was killed raises within 50 ms; one that is stopped keeps handles pending for ever.
"""

import importlib
import os
from enum import Enum
from typing import Any, Protocol

import torch

from disagg_plugin.errors import ConfigError, PeerLost, TransportError


class WriteState(Enum):
    """Of one posted write, as its poster sees it."""

    PENDING = "pending"
    DONE = "done"
    FAILED = "failed"


class WriteHandle(Protocol):
    """One posted write."""

    def state(self) -> WriteState:
        """Where the write is; never raises. Also drives it forward, so call it until it is not PENDING."""
        ...

    def release(self) -> None:
        """Give up the handle, once; a pending write may still land afterwards. Never raises."""
        ...


class Transport(Protocol):
    """What the data plane needs of a network."""

    @property
    def agent_name(self) -> str: ...

    def register(self, buffer: torch.Tensor) -> None:
        """Make a contiguous host tensor readable and writable for peers, for the rest of the process's life."""
        ...

    def metadata(self) -> bytes:
        """What a peer passes to ``add_peer``; complete once everything is registered."""
        ...

    def add_peer(self, metadata: bytes) -> str:
        """Get ready to write to a peer. Names must not be known twice: ``remove_peer`` first.

        Returns:
            Its agent name.

        Raises:
            TransportError: The metadata are refused.
        """
        ...

    def remove_peer(self, peer: str) -> None:
        """Forget a peer; unknown names are ignored. Does not stop writes under way, in either direction."""
        ...

    def write(
        self, peer: str, *, local_address: int, remote_address: int, nbytes: int, notification: bytes
    ) -> WriteHandle:
        """Begin to copy registered memory to a peer's; the notification reaches it after the data.

        Raises:
            PeerLost: The peer is gone.
            TransportError: Anything else.
        """
        ...

    def notify(self, peer: str, message: bytes) -> None:
        """Send a short message without data; raises as ``write`` does."""
        ...

    def poll(self) -> list[tuple[str, bytes]]:
        """New ``(agent name, notification)`` pairs; drives incoming traffic.

        Raises:
            TransportError: The transport is broken as a whole.
        """
        ...

    def close(self) -> None:
        """Release everything; the memory must outlive the process's network activity."""
        ...


def nixl_errors() -> tuple[type[Exception], ...]:
    """What NIXL's calls raise: its own kinds have no base in common, and pybind11 adds Python's.

    Raises:
        ImportError: NIXL is not installed.
    """
    bindings = importlib.import_module("nixl._bindings")
    own = [getattr(bindings, name) for name in dir(bindings) if name.startswith("nixl") and name.endswith("Error")]
    return (*own, KeyError, ValueError, RuntimeError)


class NixlTransport:
    """NIXL over host memory (``DRAM``)."""

    def __init__(
        self, agent_name: str, *, backend: str = "UCX", net_devices: str | None = None, progress_thread: bool = False
    ) -> None:
        """Start an agent.

        Args:
            agent_name: ``<engine>-<rank>-<epoch>``: never the same twice in the life of a peer.
            net_devices: Network devices that UCX may use and listen on; ``None`` leaves its environment alone.

        Raises:
            ConfigError: NIXL is not installed, or its backend does not start.
        """
        try:
            api = importlib.import_module("nixl._api")
            self._errors = nixl_errors()
        except ImportError as error:
            raise ConfigError(f"NIXL is not installed ({error}): pip install disagg-plugin[nixl]") from error
        if net_devices is not None:
            os.environ["UCX_NET_DEVICES"] = net_devices  # UCX reads it when the backend starts
        self._lost: type[Exception] = importlib.import_module("nixl._bindings").nixlRemoteDisconnectError
        self._name = agent_name
        self._registered: list[tuple[Any, torch.Tensor]] = []
        config = api.nixl_agent_config(enable_prog_thread=progress_thread, backends=[backend])
        try:
            self._agent: Any = api.nixl_agent(agent_name, config)
        except self._errors as error:
            raise ConfigError(f"NIXL backend {backend} does not start: {error}") from error

    @property
    def agent_name(self) -> str:
        return self._name

    def register(self, buffer: torch.Tensor) -> None:
        try:
            registration = self._agent.register_memory(buffer, backends=[])
        except self._errors as error:
            raise TransportError(f"NIXL cannot register {buffer.numel()} bytes: {error}") from error
        self._registered.append((registration, buffer))

    def metadata(self) -> bytes:
        return bytes(self._agent.get_agent_metadata())

    def add_peer(self, metadata: bytes) -> str:
        try:
            name = self._agent.add_remote_agent(metadata)
        except self._errors as error:
            raise TransportError(f"NIXL refuses a peer's metadata: {error!r}") from error
        return name.decode() if isinstance(name, bytes) else str(name)

    def remove_peer(self, peer: str) -> None:
        try:
            self._agent.remove_remote_agent(peer)
        except self._errors:
            return  # unknown, or already disconnected: either way it is gone

    def write(
        self, peer: str, *, local_address: int, remote_address: int, nbytes: int, notification: bytes
    ) -> WriteHandle:
        try:
            local = self._agent.get_xfer_descs([(local_address, nbytes, 0)], "DRAM")
            remote = self._agent.get_xfer_descs([(remote_address, nbytes, 0)], "DRAM")
            handle = self._agent.initialize_xfer("WRITE", local, remote, peer, notification, backends=[])
            write = _NixlWrite(self._agent, handle, self._errors)
        except self._errors as error:
            raise self._translated(peer, error) from error
        try:
            self._agent.transfer(handle)
        except self._errors as error:
            write.release()
            raise self._translated(peer, error) from error
        return write

    def notify(self, peer: str, message: bytes) -> None:
        try:
            self._agent.send_notif(peer, message)
        except self._errors as error:
            raise self._translated(peer, error) from error

    def poll(self) -> list[tuple[str, bytes]]:
        try:
            arrived = self._agent.get_new_notifs(backends=[])
        except self._errors as error:
            raise TransportError(f"NIXL cannot be polled: {error!r}") from error
        return [(name, message) for name, messages in arrived.items() for message in messages]

    def close(self) -> None:
        for registration, _ in self._registered:
            try:
                self._agent.deregister_memory(registration, backends=[])
            except self._errors:
                continue  # the agent's own end releases it
        self._registered.clear()
        self._agent = None

    def _translated(self, peer: str, error: Exception) -> Exception:
        if isinstance(error, self._lost):
            return PeerLost(f"{peer} is gone: {error}")
        return TransportError(f"NIXL, towards {peer}: {error!r}")


class _NixlWrite:
    """Handle of one write; released explicitly, because NIXL's finalizer keeps failed ones for ever."""

    def __init__(self, agent: Any, handle: Any, errors: tuple[type[Exception], ...]) -> None:
        self._agent = agent
        self._handle = handle
        self._errors = errors

    def state(self) -> WriteState:
        try:
            state = self._agent.check_xfer_state(self._handle)
        except self._errors:
            return WriteState.FAILED
        return {"DONE": WriteState.DONE, "PROC": WriteState.PENDING}.get(state, WriteState.FAILED)

    def release(self) -> None:
        try:
            self._handle.release()
        except self._errors:
            return  # pending: NIXL keeps it in its own list and ends it with the agent
