"""Objects hold what the pages hold, bit by bit, and no two models or tenants share a name."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from disagg_lmcache.kv_chunks import (
    chunk_shape,
    fits,
    gather_steps,
    namespace_of,
    new_chunk,
    scatter_steps,
    store_salt,
)
from disagg_plugin.control.messages import ModelIdentity
from disagg_plugin.kv.geometry import KVGeometry
from disagg_plugin.testing import DenseView

GEOMETRY = KVGeometry(layers=2, kv_heads=2, head_dim=4, dtype="bfloat16")
LATENT = KVGeometry(layers=2, kv_heads=1, head_dim=12, dtype="float32", sides=1)
PAGE, PAGES, CHUNK = 4, 12, 16
MODEL = ModelIdentity("fingerprint", "weights", "a name")


@given(st.data(), st.sampled_from([GEOMETRY, LATENT]))
def test_what_is_copied_out_of_pages_comes_back_into_others_bit_by_bit(
    data: st.DataObject, geometry: KVGeometry
) -> None:
    source, target = (DenseView(geometry, blocks=PAGES, block_size=PAGE) for _ in range(2))
    out_of, into = (data.draw(st.permutations(range(1, PAGES)))[: 2 * CHUNK // PAGE] for _ in range(2))
    source.fill(out_of, 1, tokens=2 * CHUNK)
    start = data.draw(st.integers(CHUNK, 2 * CHUNK - 1))
    chunk = new_chunk(geometry, CHUNK)
    assert sum(1 for _ in gather_steps(source, out_of, CHUNK, chunk)) == geometry.layers * geometry.sides
    for _ in scatter_steps(target, into, chunk, CHUNK, start, 2 * CHUNK):
        pass
    got = target.read(into, start, 2 * CHUNK)
    assert torch.equal(got, source.read(out_of, start, 2 * CHUNK))
    assert not target.read(into, 0, start).any(), "what came before is not touched"


def test_an_object_of_another_shape_or_kind_of_number_does_not_fit() -> None:
    assert fits(new_chunk(GEOMETRY, CHUNK), GEOMETRY, CHUNK)
    assert not fits(new_chunk(GEOMETRY, CHUNK), GEOMETRY, CHUNK * 2)
    assert not fits(new_chunk(LATENT, CHUNK), GEOMETRY, CHUNK)
    assert not fits(torch.empty(chunk_shape(GEOMETRY, CHUNK)), GEOMETRY, CHUNK)


@pytest.mark.parametrize(
    ("model", "geometry"),
    [
        pytest.param(ModelIdentity("fingerprint", "others"), GEOMETRY, id="other weights"),
        pytest.param(ModelIdentity("other", "weights"), GEOMETRY, id="another rope scaling"),
        pytest.param(MODEL, KVGeometry(layers=2, kv_heads=2, head_dim=4, dtype="float16"), id="other numbers"),
        pytest.param(MODEL, KVGeometry(layers=2, kv_heads=4, head_dim=2, dtype="bfloat16"), id="other heads"),
    ],
)
def test_whatever_kv_depends_on_is_in_the_name(model: ModelIdentity, geometry: KVGeometry) -> None:
    assert namespace_of(model, geometry) != namespace_of(MODEL, GEOMETRY)


def test_what_a_model_is_called_is_not_in_the_name() -> None:
    assert namespace_of(ModelIdentity("fingerprint", "weights", "another"), GEOMETRY) == namespace_of(MODEL, GEOMETRY)


def test_no_salt_stays_none() -> None:
    assert store_salt("") == ""


@given(st.text(max_size=300), st.text(max_size=300))
def test_two_salts_are_equal_to_lmcache_only_if_they_are(one: str, other: str) -> None:
    assert (store_salt(one) == store_salt(other)) is (one == other)
    assert len(store_salt(one)) <= 128
    assert not set(store_salt(one)) & set("@/\\\x00")
    assert store_salt(store_salt(one)) != store_salt(one) or store_salt(one) == one, "nobody can ask for a hash"
