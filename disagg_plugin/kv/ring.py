"""Slots: registered memory cut into equal pieces, and who may use which.

``SlotArena`` is one uint8 buffer, reserved once and never given back while the process lives: writes of peers that
were given up may still land in it (slots cannot be fenced). Pages that no slot used are never touched, so an arena
costs address space, not memory. Three are made per worker rank:

    landing   registered; peers write to it; each peer to its own region, which its scheduler was told
    staging   registered; chunks on their way out; one region per peer, mirroring the region on the other side
    private   not registered; verified copies, waiting for the engine's thread to decode them

``take`` and ``give`` of a :class:`SlotPool` may be called from different threads: it is one deque.
"""

from collections import deque
from dataclasses import dataclass

import torch

from disagg_plugin.errors import ConfigError
from disagg_plugin.kv.wire import Bytes

PAGE_BYTES = 4096
SLOT_ALIGNMENT = 64  # of slot_bytes: sections stay aligned, and no two slots share a cache line


@dataclass(frozen=True, slots=True)
class Region:
    """Slots ``[first_slot, first_slot + slots)`` of an arena."""

    first_slot: int
    slots: int

    def slot(self, index: int) -> int:
        """Arena index of the region's slot ``index``.

        Raises:
            IndexError: Outside the region; it comes from a peer, so always check.
        """
        if not 0 <= index < self.slots:
            raise IndexError(f"slot {index} of a region of {self.slots}")
        return self.first_slot + index


class SlotArena:
    """``slots`` pieces of ``slot_bytes`` each, in host memory.

    Attributes:
        buffer: ``[slots * slot_bytes]`` uint8, page-aligned; register this.
    """

    def __init__(self, *, slots: int, slot_bytes: int) -> None:
        self.slots = slots
        self.slot_bytes = slot_bytes
        reserved = torch.empty(slots * slot_bytes + PAGE_BYTES, dtype=torch.uint8)  # pages stay untouched
        skip = -reserved.data_ptr() % PAGE_BYTES
        self.buffer = reserved[skip : skip + slots * slot_bytes]
        self._bytes: Bytes = self.buffer.numpy()

    @property
    def address(self) -> int:
        """Of the first slot's first byte."""
        return int(self.buffer.data_ptr())

    def slot_address(self, slot: int) -> int:
        return self.address + slot * self.slot_bytes

    def tensor(self, slot: int) -> torch.Tensor:
        """The slot as uint8 tensor, for the engine's thread."""
        return self.buffer[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]

    def array(self, slot: int) -> Bytes:
        """The slot as numpy array, for the data-plane thread: no torch there."""
        return self._bytes[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]


class SlotPool:
    """Free slots of a set that several users share."""

    def __init__(self, slots: range) -> None:
        self.capacity = len(slots)
        self._free = deque(slots)

    def take(self) -> int | None:
        """A free slot, or ``None``: wait, and do so without holding anything."""
        try:
            return self._free.popleft()
        except IndexError:
            return None

    def give(self, slot: int) -> None:
        self._free.append(slot)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def in_use(self) -> int:
        return self.capacity - len(self._free)


class RegionTable:
    """Which part of the staging arena belongs to which peer; a peer keeps its region over restarts."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._next = 0
        self._regions: dict[str, Region] = {}

    def region_for(self, peer: str, slots: int) -> Region:
        """The peer's region of ``slots`` slots; one that grew gets a new one, the old one is never reused.

        Raises:
            ConfigError: The arena is full.
        """
        known = self._regions.get(peer)
        if known is not None and known.slots >= slots:
            return Region(known.first_slot, slots)
        if self._next + slots > self._slots:
            raise ConfigError(
                f"no staging room for peer {peer}: {slots} slots wanted, {self._slots - self._next} of {self._slots} "
                "left; raise transfer.ring_max_bytes or lower region_slots"
            )
        region = Region(self._next, slots)
        self._next += slots
        self._regions[peer] = region
        return region


@dataclass(frozen=True, slots=True)
class SlotMemory:
    """All slots of one worker rank: three arenas, and the pool of private buffers."""

    ring: SlotArena
    staging: SlotArena
    private: SlotArena
    buffers: SlotPool

    @staticmethod
    def reserve(*, ring_max_bytes: int, slot_bytes: int, private_buffers: int) -> "SlotMemory":
        """Address space for ring and staging, ``ring_max_bytes`` each, and for the private buffers.

        Raises:
            ConfigError: Not even one slot fits ``ring_max_bytes``.
        """
        slot_bytes = slot_bytes // SLOT_ALIGNMENT * SLOT_ALIGNMENT
        slots = ring_max_bytes // slot_bytes
        if slots == 0:
            raise ConfigError(f"transfer.ring_max_bytes {ring_max_bytes} is less than one slot of {slot_bytes} bytes")
        return SlotMemory(
            ring=SlotArena(slots=slots, slot_bytes=slot_bytes),
            staging=SlotArena(slots=slots, slot_bytes=slot_bytes),
            private=SlotArena(slots=private_buffers, slot_bytes=slot_bytes),
            buffers=SlotPool(range(private_buffers)),
        )
