"""A digest arrives whole, in small parts, and a part that is lost is noticed and made good."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_plugin.control import digest_stream
from disagg_plugin.control.digest_stream import DigestFollower, DigestSender, pack, unpack
from disagg_plugin.control.messages import MAX_MESSAGE_BYTES, DigestPart, LoadReport
from disagg_plugin.control.prefix_digest import PrefixDigest
from disagg_plugin.control.sockets import encode
from disagg_plugin.serving.prefix_index import MAX_CHUNKS

HASHES = st.lists(st.integers(0, 2**64 - 1), max_size=20)


@given(HASHES)
def test_hashes_survive_packing_at_eight_bytes_each(hashes: list[int]) -> None:
    assert unpack(pack(hashes)) == hashes
    assert len(pack(hashes)) == 8 * len(hashes)


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 30), max_size=8), st.booleans(), st.booleans()), max_size=40),
    st.integers(1, 3),
)
def test_whatever_is_lost_the_follower_knows_all_once_everything_gets_through(
    steps: list[tuple[list[int], bool, bool]], part_chunks: int
) -> None:
    """Each step touches some chunks, or empties the cache; some parts are lost, with or without the sender knowing."""
    digest, sender, follower = PrefixDigest(12), DigestSender(), DigestFollower()
    known: set[int] = set()

    def publish(*, lost: bool, noticed: bool) -> None:
        for part in sender.parts(digest.take_delta(), digest.full):
            if lost:
                if noticed:
                    sender.start_over()
                    return
                continue
            change = follower.take(part)
            if change is None:
                sender.start_over()  # a DigestRequest
            else:
                base = set() if change.full else known - set(change.removed)
                known.clear()
                known.update(base | set(change.added))

    before, digest_stream.PART_CHUNKS = digest_stream.PART_CHUNKS, part_chunks
    try:
        for chunks, lost, noticed in steps:
            if not chunks and lost:
                digest.clear()
            digest.touch(chunks)
            publish(lost=lost, noticed=noticed)
        digest.touch([99])  # a follower notices a gap when the next part comes
        publish(lost=False, noticed=True)
        publish(lost=False, noticed=True)
    finally:
        digest_stream.PART_CHUNKS = before
    assert follower.synced
    assert known == set(digest.full().added)


def test_a_full_digest_of_the_largest_size_stays_far_below_a_messages_limit() -> None:
    digest = PrefixDigest(MAX_CHUNKS)
    digest.touch(range(2**63, 2**63 + MAX_CHUNKS))
    parts = list(DigestSender().parts(digest.take_delta(), digest.full))
    assert sum(len(part.added) for part in parts) == 8 * MAX_CHUNKS
    assert [part.full for part in parts] == [True] + [False] * (len(parts) - 1)
    largest = max(len(encode(LoadReport(1, 0, 0, 0, 0.0, 1.0, digest=part), {})) for part in parts)
    assert largest < MAX_MESSAGE_BYTES / 16


@pytest.mark.parametrize(
    "part",
    [
        pytest.param(DigestPart(9, False, b"", b""), id="a gap"),
        pytest.param(DigestPart(3, False, b"12345", b""), id="half a hash"),
        pytest.param(DigestPart(3, True, b"12345", b""), id="half a hash in a full part"),
    ],
)
def test_after_a_part_that_does_not_fit_nothing_is_believed_until_a_full_one(part: DigestPart) -> None:
    follower = DigestFollower()
    assert follower.take(DigestPart(1, False, b"", b"")) is None, "nothing was full yet"
    assert follower.take(DigestPart(2, True, pack([1]), b"")) is not None
    assert follower.take(part) is None
    assert follower.take(DigestPart(part.sequence + 1, False, b"", b"")) is None
    assert not follower.synced
    assert follower.take(DigestPart(20, True, b"", b"")) is not None
    assert follower.gaps == 3
