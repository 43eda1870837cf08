"""Doubles for tests of the data plane: a network in memory, and a paged KV cache of plain tensors.

>>> network = MemoryNetwork()
>>> sender, receiver = network.transport("p-0-1"), network.transport("d-0-1")

Writes land at once. With ``network.manual = True`` they queue in ``network.pending`` until the test delivers them, in
whatever order, damaged, twice, or not at all.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from disagg_plugin.errors import PeerLost, TransportError
from disagg_plugin.kv.geometry import HeadRange, KVGeometry
from disagg_plugin.kv.transport import WriteState


@dataclass(slots=True, eq=False)
class PendingWrite:
    """One write under way; also the writer's handle of it.

    Attributes:
        payload: Copied when it is delivered, as RDMA would; ``None`` until then.
    """

    network: "MemoryNetwork"
    source: str
    target: str
    local_address: int
    remote_address: int
    nbytes: int
    notification: bytes
    outcome: WriteState = WriteState.PENDING
    released: bool = False

    def state(self) -> WriteState:
        if self.released:
            raise AssertionError("the state of a released handle")
        return self.outcome

    def release(self) -> None:
        if self.released:
            raise AssertionError("a handle released twice")
        self.released = True
        self.network.open_handles -= 1


@dataclass(slots=True, eq=False)
class MemoryTransport:
    """One agent of a :class:`MemoryNetwork`; see ``kv/transport.py`` for the methods."""

    network: "MemoryNetwork"
    agent_name: str
    buffers: list[torch.Tensor] = field(default_factory=list)
    peers: set[str] = field(default_factory=set)
    notifications: deque[tuple[str, bytes]] = field(default_factory=deque)

    def register(self, buffer: torch.Tensor) -> None:
        self.buffers.append(buffer)

    def metadata(self) -> bytes:
        return self.agent_name.encode()

    def add_peer(self, metadata: bytes) -> str:
        name = metadata.decode()
        if name in self.peers or name not in self.network.agents:
            raise TransportError(f"{name} is known already, or unknown to the network")
        self.peers.add(name)
        self.network.broken[self.agent_name, name] = self.network.broken.get((self.agent_name, name), 0) - 1
        return name

    def remove_peer(self, peer: str) -> None:
        self.peers.discard(peer)

    def write(
        self, peer: str, *, local_address: int, remote_address: int, nbytes: int, notification: bytes
    ) -> PendingWrite:
        self._require(peer)
        self.memory(local_address, nbytes)
        write = PendingWrite(self.network, self.agent_name, peer, local_address, remote_address, nbytes, notification)
        self.network.open_handles += 1
        self.network.pending.append(write)
        if not self.network.manual:
            self.network.deliver(write)
        return write

    def notify(self, peer: str, message: bytes) -> None:
        self._require(peer)
        self.network.agents[peer].notifications.append((self.agent_name, message))

    def poll(self) -> list[tuple[str, bytes]]:
        arrived = list(self.notifications)
        self.notifications.clear()
        return arrived

    def close(self) -> None:
        self.network.agents.pop(self.agent_name, None)

    def memory(self, address: int, nbytes: int) -> torch.Tensor:
        """Registered memory by address.

        Raises:
            TransportError: Not registered; NIXL would refuse it.
        """
        for buffer in self.buffers:
            offset = address - buffer.data_ptr()
            if offset >= 0 and offset + nbytes <= buffer.numel():
                return buffer[offset : offset + nbytes]
        raise TransportError(f"{nbytes} bytes at {address:#x} are not registered by {self.agent_name}")

    def _require(self, peer: str) -> None:
        if peer not in self.peers:
            raise TransportError(f"{peer} was never added to {self.agent_name}")
        if peer not in self.network.agents or self.network.broken.get((self.agent_name, peer), 0) > 0:
            raise PeerLost(f"{peer} is gone")


class MemoryNetwork:
    """Connects :class:`MemoryTransport` agents by name.

    Attributes:
        manual: Keep writes pending until :meth:`deliver`.
        open_handles: Handles that nobody released yet: zero at the end, or something leaks.
        broken: By ``(from, to)``: how often the one must add the other again before that connection works.
    """

    def __init__(self, *, manual: bool = False) -> None:
        self.manual = manual
        self.agents: dict[str, MemoryTransport] = {}
        self.pending: list[PendingWrite] = []
        self.open_handles = 0
        self.broken: dict[tuple[str, str], float] = {}

    def transport(self, agent_name: str) -> MemoryTransport:
        """A new agent; a name that died may live again."""
        self.agents[agent_name] = MemoryTransport(self, agent_name)
        return self.agents[agent_name]

    def deliver(self, write: PendingWrite, *, flip_byte: int | None = None, notify: bool = True) -> None:
        """Let a write land; one that was given up by its writer lands all the same, without notification.

        Args:
            flip_byte: Damage this byte on the way.
            notify: ``False`` loses the notification.
        """
        if write in self.pending:
            self.pending.remove(write)
        target, source = self.agents.get(write.target), self.agents.get(write.source)
        if target is None or source is None:
            write.outcome = WriteState.FAILED
            return
        payload = source.memory(write.local_address, write.nbytes).clone()
        if flip_byte is not None:
            payload[flip_byte % write.nbytes] ^= 0x10
        target.memory(write.remote_address, write.nbytes).copy_(payload)
        if notify and not write.released:
            target.notifications.append((write.source, write.notification))
        write.outcome = WriteState.DONE

    def fail(self, write: PendingWrite) -> None:
        """Let a write end in an error, without a byte landing."""
        self.pending.remove(write)
        write.outcome = WriteState.FAILED


class DenseView:
    """A paged KV cache ``[blocks, layers, sides, heads, block_size, head_dim]``: a ``KVCacheView`` for tests."""

    def __init__(self, geometry: KVGeometry, *, blocks: int, block_size: int, heads: HeadRange | None = None) -> None:
        self.geometry = geometry
        self.heads = heads or HeadRange(0, geometry.kv_heads)
        self.block_size = block_size
        shape = (blocks, geometry.layers, geometry.sides, self.heads.count, block_size, geometry.head_dim)
        self.cache = torch.zeros(shape, dtype=getattr(torch, geometry.dtype))

    def gather(self, layer: int, side: int, block_ids: Sequence[int], start: int, end: int) -> torch.Tensor:
        first, last = start // self.block_size, -(-end // self.block_size)
        blocks = self.cache[list(block_ids[first:last]), layer, side]  # [blocks, heads, block_size, head_dim]
        tokens = blocks.transpose(0, 1).flatten(1, 2)
        skip = start - first * self.block_size
        return tokens[:, skip : skip + end - start].contiguous()

    def scatter(self, layer: int, side: int, block_ids: Sequence[int], start: int, end: int, kv: torch.Tensor) -> None:
        while start < end:
            block, offset = divmod(start, self.block_size)
            count = min(end - start, self.block_size - offset)
            self.cache[block_ids[block], layer, side, :, offset : offset + count] = kv[:, :count]
            kv = kv[:, count:]
            start += count

    def fill(self, block_ids: Sequence[int], seed: int, *, tokens: int) -> None:
        """Reproducible noise in the first ``tokens`` tokens of a request: the same for every block numbering."""
        canonical = canonical_noise(self.geometry, self.heads, seed, tokens)
        for layer in range(self.geometry.layers):
            for side in range(self.geometry.sides):
                self.scatter(layer, side, block_ids, 0, tokens, canonical[layer, side])

    def read(self, block_ids: Sequence[int], start: int, end: int) -> torch.Tensor:
        """``[layers, sides, heads, tokens, head_dim]`` of a request's tokens."""
        geometry = self.geometry
        sections = [
            self.gather(layer, side, block_ids, start, end)
            for layer in range(geometry.layers)
            for side in range(geometry.sides)
        ]
        return torch.stack(sections).unflatten(0, (geometry.layers, geometry.sides))


def canonical_noise(geometry: KVGeometry, heads: HeadRange, seed: int, tokens: int) -> torch.Tensor:
    """``[layers, sides, heads, tokens, head_dim]``, the same in every process.

    A token's values do not depend on ``tokens``, as long as its numbers in all layers are a multiple of 16.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (tokens, geometry.layers, geometry.sides, heads.count, geometry.head_dim)
    noise = torch.randn(shape, generator=generator)
    return noise.permute(1, 2, 3, 0, 4).to(getattr(torch, geometry.dtype)).contiguous()
