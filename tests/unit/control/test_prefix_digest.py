"""A digest's deltas, applied in order, always give the digest."""

from hypothesis import given
from hypothesis import strategies as st

from disagg_plugin.control.prefix_digest import DigestDelta, PrefixDigest


def apply(known: set[int], delta: DigestDelta) -> set[int]:
    base = set() if delta.full else known
    return (base - set(delta.removed)) | set(delta.added)


@given(st.lists(st.tuples(st.lists(st.integers(0, 20), max_size=6), st.booleans()), max_size=30))
def test_a_follower_that_hears_every_delta_knows_what_the_digest_knows(steps: list[tuple[list[int], bool]]) -> None:
    digest = PrefixDigest(capacity_chunks=8)
    known = apply(set(), digest.full())
    for hashes, publish in [*steps, ([], True)]:
        digest.touch(hashes)
        assert len(digest) <= 8
        if publish and (delta := digest.take_delta()) is not None:
            known = apply(known, delta)
    assert known == set(digest.full().added)


def test_the_least_recently_used_chunks_go_first() -> None:
    digest = PrefixDigest(capacity_chunks=2)
    digest.touch([1, 2])
    digest.touch([1])
    digest.touch([3])
    assert set(digest.full().added) == {1, 3}


def test_an_engine_that_empties_its_cache_makes_its_followers_forget() -> None:
    digest = PrefixDigest(capacity_chunks=8)
    digest.touch([1, 2])
    digest.take_delta()
    digest.clear()
    digest.touch([3])
    delta = digest.take_delta()
    assert delta == DigestDelta(True, (3,), ())
    assert digest.take_delta() is None
