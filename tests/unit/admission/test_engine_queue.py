"""What a scheduler process counts for admission: a prompt is in exactly one place, and nothing of it is left behind."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from disagg_plugin.admission.engine_queue import EngineQueue
from disagg_plugin.admission.engine_state import EngineState, from_plain, request_mark, to_plain
from disagg_policies.admission_snapshots import QueuedWork
from disagg_policies.snapshots import DecodeState, Link, PrefillModel, WorkerState


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_prompt_is_queued_then_decodes_then_is_gone() -> None:
    clock = Clock()
    queue = EngineQueue(clock)
    queue.arrived("a", 1_000, priority=1)
    queue.arrived("b", 300, priority=-1)
    queue.cached("a", 400)
    assert queue.state().queued == (QueuedWork(-1, 1, 300), QueuedWork(1, 1, 600))
    queue.computed("a", 900)
    assert queue.state().queued[1] == QueuedWork(1, 1, 100)
    queue.computed("a", 1_000)
    seen = queue.state()
    assert seen.queued == (QueuedWork(-1, 1, 300),)
    assert (seen.decode.running_decodes, seen.decode.decode_context_tokens) == (1, 1_000)
    assert (seen.decode.queued_requests, seen.decode.queued_prefill_tokens) == (1, 300)
    clock.now_s = 7.0
    queue.finished("a")
    assert queue.state().decode.running_decodes == 0
    assert queue.state().decode_lasts_s == 7.0


def test_a_prompt_that_is_prefilled_elsewhere_waits_for_no_local_prefill() -> None:
    queue = EngineQueue()
    queue.arrived("a", 1_000)
    queue.landing("a")
    seen = queue.state()
    assert (seen.queued, seen.landing) == ((), (QueuedWork(0, 1, 1_000),))
    queue.landing("a", False)
    assert queue.state().queued == (QueuedWork(0, 1, 1_000),)


def test_a_preempted_request_is_queued_again() -> None:
    queue = EngineQueue()
    queue.arrived("a", 1_000)
    queue.computed("a", 1_000)
    queue.preempted("a")
    assert queue.state().queued == (QueuedWork(0, 1, 1_000),)


def test_the_drain_rate_is_what_was_computed_while_others_waited() -> None:
    clock = Clock()
    queue = EngineQueue(clock)
    assert queue.state().drain_tokens_per_s is None
    queue.arrived("a", 10_000)
    for second in range(1, 9):
        clock.now_s = float(second)
        queue.computed("a", 500 * second)
    assert queue.state().drain_tokens_per_s == pytest.approx(600.0)  # six steps in the window of five seconds
    queue.finished("a")
    clock.now_s = 100.0
    queue.arrived("b", 10)
    assert queue.state().drain_tokens_per_s is None


def test_only_the_best_healthy_workers_are_reported() -> None:
    link = Link(1e8, samples=3)
    workers = [
        WorkerState(f"p{at}", at != 2, 0, 1_000, queued_prefill_tokens=1_000 * (7 - at), link=link) for at in range(7)
    ]
    seen = EngineQueue().state(workers=workers)
    assert [worker.worker for worker in seen.workers] == ["p6", "p5"]


def test_the_state_survives_a_channel_of_plain_values() -> None:
    queue = EngineQueue()
    queue.arrived("a", 1_000, priority=3)
    worker = WorkerState("p", True, 1, 9_000, prefill=PrefillModel(0.1, 0.2, 0.3, 4, 0.5))
    seen = queue.state(DecodeState("d", kv_usage=0.5), [worker], reorders=True, kv_capacity_tokens=10, max_running=4)
    assert from_plain(to_plain(seen)) == seen
    assert seen.recent == (request_mark("a"),)
    assert from_plain({}) == EngineState()
    with pytest.raises(ValueError, match="not an EngineState"):
        from_plain({"queued": "many"})


class Lives(RuleBasedStateMachine):
    """Calls in any order, for requests known or not."""

    ids = st.sampled_from("abcd")

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.queue = EngineQueue(self.clock)
        self.alive: dict[str, int] = {}

    @rule(request_id=ids, tokens=st.integers(1, 100), priority=st.integers(-1, 1))
    def arrive(self, request_id: str, tokens: int, priority: int) -> None:
        self.queue.arrived(request_id, tokens, priority)
        self.alive[request_id] = tokens

    @rule(request_id=ids, tokens=st.integers(0, 200))
    def cache(self, request_id: str, tokens: int) -> None:
        self.queue.cached(request_id, tokens)

    @rule(request_id=ids, tokens=st.integers(0, 200))
    def compute(self, request_id: str, tokens: int) -> None:
        self.clock.now_s += 0.1
        self.queue.computed(request_id, tokens)

    @rule(request_id=ids, landing=st.booleans())
    def land(self, request_id: str, landing: bool) -> None:
        self.queue.landing(request_id, landing)

    @rule(request_id=ids)
    def preempt(self, request_id: str) -> None:
        self.queue.preempted(request_id)

    @rule(request_id=ids)
    def finish(self, request_id: str) -> None:
        self.queue.finished(request_id)
        self.alive.pop(request_id, None)

    @invariant()
    def everybody_is_counted_once(self) -> None:
        seen = self.queue.state()
        landing = sum(work.requests for work in seen.landing)
        counted = seen.decode.queued_requests + landing + seen.decode.running_decodes
        assert counted == len(self.alive)
        assert all(0 <= work.tokens <= sum(self.alive.values()) for work in seen.queued)
        if not self.alive:
            assert seen.drain_tokens_per_s is None


TestLives = Lives.TestCase
TestLives.settings = settings(deadline=None, max_examples=60)
