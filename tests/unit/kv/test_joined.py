"""Two loads of one request are one to the engine: reported once, after both, with the invalid blocks of both."""

import random
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from disagg_plugin.kv.joined import Join, Joined, Part

BLOCKS_EACH = 6
STORE, WIRE = Part.STORE, Part.WIRE


@dataclass(frozen=True)
class Load:
    """One request: its first ``stored`` blocks come from the store, the others over the wire."""

    number: int
    stored: int
    bad: frozenset[int]  # positions

    @property
    def request_id(self) -> str:
        return f"r{self.number}"

    @property
    def blocks(self) -> tuple[int, ...]:
        return tuple(range(100 * self.number, 100 * self.number + BLOCKS_EACH))

    @property
    def parts(self) -> frozenset[Part]:
        return frozenset([STORE] * (self.stored > 0) + [WIRE] * (self.stored < BLOCKS_EACH))

    def invalid(self, part: Part) -> set[int]:
        positions = range(self.stored) if part is STORE else range(self.stored, BLOCKS_EACH)
        return {self.blocks[at] for at in positions if at in self.bad}

    def join(self) -> Join:
        return Join(self.request_id, self.parts, self.blocks, self.blocks[: self.stored])


loads = st.lists(
    st.builds(
        lambda stored, bad: (stored, frozenset(bad)),
        st.integers(0, BLOCKS_EACH),
        st.sets(st.integers(0, BLOCKS_EACH - 1)),
    ),
    min_size=1,
    max_size=4,
).map(lambda rows: [Load(number, stored, bad) for number, (stored, bad) in enumerate(rows, 1)])


@given(loads, st.randoms(use_true_random=False))
def test_whatever_the_order_each_request_is_reported_once_after_all_its_parts_with_their_union(
    requests: list[Load], order: random.Random
) -> None:
    joined = Joined()
    events = [(load, part) for load in requests for part in load.parts]
    order.shuffle(events)
    for load in requests:
        joined.open(load.join())
    outstanding = {load.request_id: set(load.parts) for load in requests}
    reported: list[str] = []

    def report() -> None:
        complete, invalid = joined.take()
        assert all(not outstanding[r] for r in complete)
        assert invalid == {b for r in requests if r.request_id in complete for b in r.blocks if _bad(r, b)}
        reported.extend(complete)

    for load, part in events:
        tell = joined.invalid if part is WIRE else joined.store_invalid
        tell(load.invalid(part))  # an engine's child says so no later than with the end of its load
        if order.random() < 0.5:
            report()
        joined.ended(part, [load.request_id])
        outstanding[load.request_id].discard(part)
        if order.random() < 0.7:
            report()
    report()
    assert sorted(reported) == sorted(load.request_id for load in requests)
    assert joined.open_requests == joined.unexpected == 0
    assert joined.take() == ([], set())


def _bad(load: Load, block: int) -> bool:
    return load.blocks.index(block) in load.bad


@given(loads, st.randoms(use_true_random=False))
def test_a_store_that_breaks_in_the_middle_fails_its_own_parts_and_leaves_the_wire_alone(
    requests: list[Load], order: random.Random
) -> None:
    joined = Joined()
    for load in requests:
        joined.open(load.join())
    early = [load for load in requests if STORE in load.parts and order.random() < 0.5]
    joined.ended(STORE, [load.request_id for load in early])
    failed = joined.store_failed()
    assert failed == {load.request_id for load in requests if STORE in load.parts and load not in early}
    joined.ended(WIRE, [load.request_id for load in requests if WIRE in load.parts])
    complete, invalid = joined.take()
    assert sorted(complete) == sorted(load.request_id for load in requests)
    assert invalid == {b for r in requests if r.request_id in failed for b in r.blocks[: r.stored]}


@given(st.lists(st.sampled_from(["open", "store", "wire", "twice"]), max_size=20))
def test_a_report_too_many_is_dropped_and_counted(events: list[str]) -> None:
    joined = Joined()
    waits: set[Part] = set()
    complete = unexpected = 0
    for event in events:
        if event == "open":
            joined.open(Join("r", frozenset(Part)))
            unexpected += bool(waits)
            waits = waits or set(Part)
            continue
        for part in [WIRE, WIRE] if event == "twice" else [Part(event)]:
            joined.ended(part, ["r"])
            unexpected += part not in waits
            complete += waits == {part}
            waits.discard(part)
    assert (len(joined.take()[0]), joined.unexpected) == (complete, unexpected)


def test_invalid_blocks_that_belong_to_nobody_are_told_at_once() -> None:
    joined = Joined()
    joined.open(Join("r", frozenset(Part), (1, 2), (1,)))
    joined.invalid([2, 9])
    assert joined.take() == ([], {9})


def test_a_chunk_of_the_stores_that_begins_in_blocks_of_others_fails_only_the_blocks_that_it_was_to_fill() -> None:
    joined = Joined()
    joined.open(Join("a", frozenset(Part), (3, 4, 5), (3, 4), kept_block_ids=(1, 2)))
    joined.open(Join("b", frozenset(Part), (7, 8), (7,), kept_block_ids=(1, 2)))
    assert joined.store_invalid({1, 2, 3, 4}) == {"a"}
    assert joined.take() == ([], set()), "1 and 2 are valid, whatever became of the rest of their chunk"
    joined.ended(STORE, ["a"])
    joined.ended(WIRE, ["a"])
    assert joined.take() == (["a"], {3, 4})
