"""The index finds for each worker the leading chunks that it holds, whatever came and went."""

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from disagg_plugin.serving.prefix_index import PrefixIndex


def test_a_prefix_ends_at_the_first_chunk_that_a_worker_lacks() -> None:
    index = PrefixIndex()
    index.update("all", added=[1, 2, 3, 4])
    index.update("two", added=[1, 2, 4])
    index.update("tail only", added=[2, 3, 4])
    assert index.overlap([1, 2, 3, 4, 5]) == {"all": 4, "two": 2}
    assert index.overlap([1, 2, 3]) == {"all": 3, "two": 2}
    assert index.overlap([9]) == index.overlap([]) == {}


def test_tokens_come_in_the_order_that_was_asked_for() -> None:
    index = PrefixIndex()
    index.update("a", added=[1])
    index.update("b", added=[1, 2])
    assert index.overlap_tokens([1, 2], ["b", "never reported", "a"], chunk_tokens=64) == (128, 0, 64)
    assert index.overlap_tokens([7], ["b", "a"], chunk_tokens=64) == (0, 0)
    assert index.overlap_tokens([7], [], chunk_tokens=64) == ()


def test_a_full_digest_replaces_what_was_known() -> None:
    index = PrefixIndex()
    index.update("a", added=[1, 2])
    index.replace("a", [2, 3])
    assert index.overlap([1]) == {}
    assert index.overlap([2, 3]) == {"a": 2}


def test_a_new_worker_inherits_nothing_from_one_that_left() -> None:
    index = PrefixIndex()
    index.update("a", added=[1])
    index.update("b", added=[1])
    index.forget("a")
    index.update("c", added=[2])
    assert index.overlap([1]) == {"b": 1}
    assert index.overlap([2]) == {"c": 1}


def test_what_nobody_holds_takes_no_memory() -> None:
    index = PrefixIndex()
    index.update("a", added=[1, 2])
    index.update("a", removed=[1, 2, 3])
    assert len(index) == index.chunks("a") == 0


def test_a_worker_that_claims_too_much_is_cut_off() -> None:
    index = PrefixIndex(max_chunks=3)
    index.update("liar", added=range(10))
    assert (index.chunks("liar"), len(index), index.ignored) == (3, 3, 7)
    index.update("liar", removed=[0], added=[8])
    assert index.overlap([8]) == {"liar": 1}


@given(st.integers(65, 130))
def test_more_workers_than_a_machine_word_has_bits(count: int) -> None:
    index = PrefixIndex()
    names = [f"p{i}" for i in range(count)]
    for i, name in enumerate(names):
        index.update(name, added=range(i))
    assert index.overlap_tokens(range(count), names, chunk_tokens=1) == tuple(range(count))


class AgainstAPlainModel(RuleBasedStateMachine):
    """Deltas, digests and departures in any order, against a dict of sets."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.model: dict[str, set[int]] = {}

    workers = st.sampled_from(["a", "b", "c", "d"])
    chunks = st.lists(st.integers(0, 7))

    @rule(worker=workers, added=chunks, removed=chunks)
    def update(self, worker: str, added: list[int], removed: list[int]) -> None:
        self.index.update(worker, added=added, removed=removed)
        self.model[worker] = self.model.get(worker, set()) - set(removed) | set(added)

    @rule(worker=workers, chunks=chunks)
    def replace(self, worker: str, chunks: list[int]) -> None:
        self.index.replace(worker, chunks)
        self.model[worker] = set(chunks)

    @rule(worker=workers)
    def forget(self, worker: str) -> None:
        self.index.forget(worker)
        self.model.pop(worker, None)

    @rule(prompt=st.lists(st.integers(0, 7), unique=True))
    def look_up(self, prompt: list[int]) -> None:
        expected = {}
        for worker, held in self.model.items():
            if count := next((i for i, chunk in enumerate(prompt) if chunk not in held), len(prompt)):
                expected[worker] = count
        assert self.index.overlap(prompt) == expected

    @invariant()
    def nothing_is_left_over(self) -> None:
        assert len(self.index) == len(set().union(*self.model.values()))
        assert {w: self.index.chunks(w) for w in self.model} == {w: len(held) for w, held in self.model.items()}


TestAgainstAPlainModel = AgainstAPlainModel.TestCase
