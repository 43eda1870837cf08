"""Regions of the landing ring go to whoever comes, come back from whoever leaves, and never overlap."""

from hypothesis import given
from hypothesis import strategies as st

from disagg_plugin.control.ring_regions import RingRegions


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=60))
def test_two_workers_never_share_a_region_and_none_is_lost(steps: list[tuple[bool, int]]) -> None:
    regions = RingRegions(ring_slots=35, slots_each=8)
    held: dict[str, int] = {}
    for comes, number in steps:
        name = str(number)
        if comes:
            first = regions.take(name)
            if first is None:
                assert len(held) == 4
                assert name not in held
            else:
                assert held.get(name, first) == first
                held[name] = first
        else:
            regions.give(name)
            held.pop(name, None)
        assert len(set(held.values())) == len(held)
        assert all(first % 8 == 0 and first + 8 <= 35 for first in held.values())


def test_a_worker_that_comes_back_gets_its_former_region() -> None:
    regions = RingRegions(ring_slots=32, slots_each=8)
    for name in "abc":
        regions.take(name)
    regions.give("b")
    regions.give("a")
    assert regions.take("a") == 0
    assert regions.take("new") == 24, "the region that has been free longest"
    assert regions.take("next") == 8
