"""Slots are disjoint, cost nothing until used, and belong to one peer for ever."""

import psutil
import pytest
import torch

from disagg_plugin.errors import ConfigError
from disagg_plugin.kv.ring import Region, RegionTable, SlotArena, SlotMemory, SlotPool


def test_slots_are_disjoint_aligned_and_seen_alike_by_torch_and_numpy():
    arena = SlotArena(slots=3, slot_bytes=4096)
    for slot in range(3):
        arena.tensor(slot).fill_(slot + 1)
    assert [int(arena.array(slot)[0]) for slot in range(3)] == [1, 2, 3]
    assert arena.address % 4096 == 0
    assert arena.slot_address(2) == arena.tensor(2).data_ptr() == arena.array(2).ctypes.data
    assert arena.buffer.tolist() == torch.arange(1, 4).repeat_interleave(4096).tolist()


def test_untouched_slots_cost_no_memory():
    before = psutil.Process().memory_info().rss
    memory = SlotMemory.reserve(ring_max_bytes=1 << 30, slot_bytes=16 << 20, private_buffers=8)
    assert memory.ring.slots == 64
    assert psutil.Process().memory_info().rss - before < 16 << 20


def test_a_ring_smaller_than_a_slot_is_refused_with_both_numbers():
    with pytest.raises(ConfigError, match=r"5000 is less than one slot of 8192"):
        SlotMemory.reserve(ring_max_bytes=5000, slot_bytes=8192, private_buffers=1)


def test_a_pool_gives_every_slot_once():
    pool = SlotPool(range(2))
    assert {pool.take(), pool.take()} == {0, 1}
    assert pool.take() is None
    assert pool.in_use == 2
    pool.give(1)
    assert (pool.free, pool.take()) == (1, 1)


@pytest.mark.parametrize("index", [-1, 4, 65535])
def test_a_peer_cannot_name_a_slot_outside_its_region(index):
    with pytest.raises(IndexError):
        Region(8, 4).slot(index)


def test_a_peer_keeps_its_staging_region_over_restarts():
    table = RegionTable(slots=8)
    first = table.region_for("d1", 3)
    assert table.region_for("d2", 3) == Region(3, 3)
    assert table.region_for("d1", 3) == first
    assert table.region_for("d1", 2) == Region(first.first_slot, 2)
    with pytest.raises(ConfigError, match="3 slots wanted, 2 of 8 left"):
        table.region_for("d3", 3)
