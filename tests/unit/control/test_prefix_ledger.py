"""What is asked of a prefix store, until when, and what it is told afterwards."""

import random
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_plugin.control.prefix_ledger import Goodbye, Phase, PrefixLedger

BLOCK, CHUNK = 32, 64
TIMEOUT_S = 2.0


class Desk:
    """A ledger with a hand-driven clock, and a store that answers what the test says."""

    def __init__(self, *, store_received: bool = True) -> None:
        self.now_s = 100.0
        self.asked = 0
        self.answer: int | None = None
        self.ledger = PrefixLedger(
            block_size=BLOCK, lookup_timeout_s=TIMEOUT_S, store_received=store_received, clock=lambda: self.now_s
        )

    def _ask(self) -> int | None:
        self.asked += 1
        return self.answer

    def look_up(self, cached: int = 0, *, answer: int | None = None) -> int | None:
        self.answer = answer
        return self.ledger.look_up("r", cached, self._ask)


def test_not_yet_is_passed_on_until_the_deadline_and_then_there_is_nothing_to_load() -> None:
    desk = Desk()
    assert desk.look_up() is None
    desk.now_s += TIMEOUT_S - 0.01
    assert desk.look_up() is None
    desk.now_s += 0.01
    assert desk.look_up() == 0
    assert desk.look_up(answer=256) == 0, "the request went on without the store"
    assert desk.ledger.totals["lookup_timeout"] == 1


def test_an_answer_is_asked_for_once_and_again_when_the_engines_own_prefix_has_grown() -> None:
    desk = Desk()
    assert desk.look_up(answer=256) == 256
    assert desk.look_up() == 256, "the engine asks at each step, also while it waits for a worker or for room"
    assert desk.asked == 1
    assert desk.look_up(cached=64, answer=192) == 192
    assert desk.asked == 2


def test_a_late_answer_only_gives_back_what_it_locked() -> None:
    desk = Desk()
    desk.look_up()
    desk.now_s += TIMEOUT_S
    desk.look_up()
    assert desk.ledger.unanswered() == ["r"]
    assert not desk.ledger.allocated("r", 0, 0), "the store is not shown blocks of a request that went on without it"
    assert desk.ledger.computed("r", 0, 100) is None
    assert not desk.ledger.answered("r"), "its request still runs"
    assert desk.ledger.finished("r") is Goodbye.END
    assert desk.ledger.tracked == 0


def in_phase(phase: str) -> Desk:
    """One request, brought so far."""
    desk = Desk()
    if phase == "never asked":
        return desk
    if phase == "nothing is looked up for it":
        desk.ledger.withdraw("r")
        return desk
    desk.look_up(answer=None if phase in ("asked", "late") else 256)
    if phase == "late":
        desk.now_s += TIMEOUT_S
        desk.look_up()
    if phase in ("loading", "served", "preempted"):
        desk.ledger.allocated("r", 256, 100)
    if phase == "served":
        desk.ledger.load_ended("r")
    if phase == "preempted":
        desk.ledger.preempted("r")
    if phase == "load failed whole":
        desk.ledger.allocated("r", 256, 100)
        desk.ledger.load_ended("r")
        assert desk.look_up(answer=256) == 0
    return desk


@pytest.mark.parametrize(
    ("phase", "goodbye"),
    [
        ("never asked", Goodbye.NOTHING),
        ("nothing is looked up for it", Goodbye.NOTHING),
        ("asked", Goodbye.WAIT),
        ("late", Goodbye.WAIT),
        ("found", Goodbye.RELEASE),
        ("loading", Goodbye.END),
        ("served", Goodbye.END_AFTER_SAVES),
        ("preempted", Goodbye.END_AFTER_SAVES),
        ("load failed whole", Goodbye.END),
    ],
)
def test_an_abort_in_any_phase_tells_the_store_what_it_needs_and_leaves_nothing(phase: str, goodbye: Goodbye) -> None:
    desk = in_phase(phase)
    assert desk.ledger.finished("r") is goodbye
    if goodbye is Goodbye.WAIT:
        assert desk.ledger.unanswered() == ["r"]
        assert desk.ledger.answered("r"), "and then the store may forget the request"
    assert desk.ledger.tracked == 0
    assert desk.ledger.finished("r") is Goodbye.NOTHING


def test_a_load_that_failed_whole_is_not_tried_again() -> None:
    desk = in_phase("served")
    assert desk.look_up(answer=256) == 0
    assert desk.asked == 1
    assert desk.ledger.knows("r") is Phase.WITHDRAWN
    assert desk.ledger.computed("r", 0, 400) is None


def test_a_preempted_request_looks_up_anew() -> None:
    desk = in_phase("served")
    desk.ledger.preempted("r")
    assert desk.ledger.computed("r", 0, 1) is None
    assert desk.look_up(answer=320) == 320
    assert desk.ledger.allocated("r", 320, 0)
    assert desk.ledger.knows("r") is Phase.LOADING
    desk.ledger.load_ended("r")
    assert desk.look_up(answer=320) == 0, "its load failed whole: a second time would fail as well"


def test_what_came_over_the_wire_counts_as_computed_unless_the_settings_say_no() -> None:
    for wanted, told in ((True, 144), (False, 1)):
        desk = Desk(store_received=wanted)
        desk.look_up(answer=256)
        assert desk.ledger.allocated("r", 256, 143)
        desk.ledger.load_ended("r")
        assert desk.ledger.allocated("r", 0, 0), "the engine tells of the blocks a second time"
        assert desk.ledger.computed("r", 399, 400) == told


@dataclass
class Books:
    """A store's books, as LMCache keeps them: it adds up what it is told."""

    believed: int

    def told(self, more: int) -> None:
        self.believed += more


@given(
    prompt=st.integers(1, 400),
    cached_blocks=st.integers(0, 12),
    hit_chunks=st.integers(0, 6),
    wire=st.booleans(),
    failed_block=st.none() | st.integers(0, 12),
    order=st.randoms(use_true_random=False),
)
def test_the_store_never_takes_for_computed_what_is_not(
    prompt: int, cached_blocks: int, hit_chunks: int, wire: bool, failed_block: int | None, order: random.Random
) -> None:
    desk = Desk()
    cached = min(cached_blocks * BLOCK, (prompt - 1) // BLOCK * BLOCK)
    hit = min(hit_chunks * CHUNK, prompt // CHUNK * CHUNK)
    load = max(0, min(hit, prompt - 1) - cached)
    assert desk.look_up(cached, answer=load) == load
    over_wire = prompt - 1 - cached - load if wire else 0
    assert desk.ledger.allocated("r", load, over_wire)
    books = Books(max(cached, hit if load else 0))
    computed = cached + load + over_wire
    if failed_block is not None and cached + BLOCK <= failed_block * BLOCK < computed:
        computed = failed_block * BLOCK  # the engine repairs from there
    desk.ledger.load_ended("r")
    while computed < prompt + 3:  # three tokens are decoded
        after = min(computed + order.randint(1, 100), prompt) if computed < prompt else computed + 1
        more = desk.ledger.computed("r", computed, after)
        assert more is not None
        books.told(more)
        assert books.believed == after
        computed = after
