"""A cache of token slots, read and written as canonical KV: against a plain reference."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from disagg_plugin.kv.geometry import KVGeometry
from disagg_plugin.kv.slot_view import SlotView
from disagg_plugin.testing import DenseView

GEOMETRY = KVGeometry(layers=2, kv_heads=3, head_dim=8, dtype="float32")
PAGES = 12


def new_view(page_size: int) -> SlotView:
    shape = (PAGES * page_size, GEOMETRY.kv_heads, GEOMETRY.head_dim)
    sides = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(GEOMETRY.layers)]
    return SlotView(sides, geometry=GEOMETRY, page_size=page_size)


@given(st.data(), st.sampled_from([1, 4, 16]))
def test_what_is_scattered_is_gathered_and_nothing_else_changes(data: st.DataObject, page_size: int) -> None:
    view, plain = new_view(page_size), DenseView(GEOMETRY, blocks=PAGES, block_size=page_size)
    pages = data.draw(st.permutations(range(1, PAGES)))[: data.draw(st.integers(1, PAGES - 1))]
    start = data.draw(st.integers(0, len(pages) * page_size - 1))
    end = data.draw(st.integers(start + 1, len(pages) * page_size))
    kv = torch.randn(GEOMETRY.kv_heads, end - start, GEOMETRY.head_dim)
    layer, side = data.draw(st.integers(0, 1)), data.draw(st.integers(0, 1))
    for either in (view, plain):
        either.scatter(layer, side, pages, start, end, kv)
    assert torch.equal(view.gather(layer, side, pages, start, end), kv)
    everything = range(PAGES)
    for at in range(GEOMETRY.layers):
        for which in range(2):
            ours = view.gather(at, which, everything, 0, PAGES * page_size)
            assert torch.equal(ours, plain.gather(at, which, everything, 0, PAGES * page_size))


def test_another_dtype_is_converted_on_the_way_in() -> None:
    view = new_view(4)
    kv = torch.randn(GEOMETRY.kv_heads, 3, GEOMETRY.head_dim, dtype=torch.bfloat16)
    view.scatter(0, 0, [5], 1, 4, kv)
    assert torch.equal(view.gather(0, 0, [5], 1, 4), kv.float())


@pytest.mark.parametrize(("start", "end"), [(0, 9), (3, 3), (-1, 2), (4, 2)])
def test_a_range_outside_the_pages_is_refused(start: int, end: int) -> None:
    with pytest.raises(ValueError, match="do not lie"):
        new_view(4).gather(0, 0, [1, 2], start, end)
