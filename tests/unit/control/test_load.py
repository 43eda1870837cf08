"""What an engine learns of its own steps, and what it counts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_plugin.control.load import LoadTracker
from disagg_plugin.control.step_times import PromptWork, StepTimes, StepWork
from disagg_plugin.serving.latency import HERE, LatencyModel


class Steps:
    """An engine whose steps take what a test says."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.number = 0
        self.seen: list[tuple[object, ...]] = []
        self.model = Recorder(self.seen, lambda: self.now_s)
        self.times = StepTimes(self.model, lambda: self.now_s)

    def step(self, *prompts: PromptWork, seconds: float, decodes: int = 0, context: int = 0) -> None:
        self.number += 1
        self.times.built(self.number, StepWork(prompts, decodes, context))
        self.now_s += seconds
        self.times.ended(self.number)


class Recorder(LatencyModel):
    """Also writes down what it is told."""

    def __init__(self, seen: list[tuple[object, ...]], clock: object) -> None:
        assert callable(clock)
        super().__init__(clock)
        self.seen = seen

    def saw_prefill(self, worker: str, *, new_tokens: int, cached_tokens: int, seconds: float) -> None:
        self.seen.append(("prompt", new_tokens, cached_tokens, round(seconds, 6)))
        super().saw_prefill(worker, new_tokens=new_tokens, cached_tokens=cached_tokens, seconds=seconds)

    def saw_prefill_step(self, worker: str, *, new_tokens: int, pairs: float, seconds: float) -> None:
        self.seen.append(("step", new_tokens, pairs, round(seconds, 6)))
        super().saw_prefill_step(worker, new_tokens=new_tokens, pairs=pairs, seconds=seconds)

    def saw_decode_step(self, *, batch: int, context_tokens: int, seconds: float) -> None:
        self.seen.append(("decode", batch, context_tokens, round(seconds, 6)))
        super().saw_decode_step(batch=batch, context_tokens=context_tokens, seconds=seconds)

    def kinds(self) -> list[object]:
        return [what[0] for what in self.seen]


def test_a_prompt_in_three_chunks_is_one_prefill() -> None:
    steps = Steps()
    steps.step(PromptWork("a", 2_000, 500, done=False), seconds=0.2)
    steps.step(PromptWork("a", 2_000, 2_500, done=False), seconds=0.3)
    steps.step(PromptWork("a", 100, 4_500, done=True), seconds=0.1)
    assert ("prompt", 4_100, 500, 0.6) in steps.seen
    assert steps.model.kinds().count("prompt") == 1


def test_a_step_of_two_prompts_is_one_sample_of_their_sums() -> None:
    steps = Steps()
    steps.step(PromptWork("a", 2_000, 0, done=False), seconds=0.2)
    steps.step(PromptWork("a", 100, 2_000, done=True), PromptWork("b", 200, 0, done=True), seconds=0.1)
    assert steps.seen[0] == ("prompt", 2_000, 0, 0.2), "what the first had done alone counts on its own"
    assert steps.seen[-1] == ("step", 300, 100 * 2_050 + 200 * 100.0, 0.1)


def test_decodes_beside_a_prompt_are_taken_off() -> None:
    steps = Steps()
    model = steps.model.decode()
    steps.step(PromptWork("a", 2_000, 0, done=True), seconds=0.5, decodes=10, context=10_000)
    added_s = 10 * model.per_request_s + 10_000 * model.per_context_token_s
    assert steps.seen[0] == ("prompt", 2_000, 0, round(0.5 - added_s, 6))


def test_a_step_that_mostly_decodes_says_nothing_about_prefills() -> None:
    steps = Steps()
    steps.step(PromptWork("a", 10, 0, done=True), seconds=0.02, decodes=150, context=1_000)
    assert steps.seen == []
    steps.step(seconds=0.02, decodes=150, context=1_000)
    assert steps.seen == [("decode", 150, 1_000, 0.02)]


def test_overlapping_steps_do_not_count_twice() -> None:
    """Step 2 is built while step 1 runs: it takes from the end of step 1."""
    steps = Steps()
    steps.times.built(1, StepWork((PromptWork("a", 1_000, 0, done=True),)))
    steps.now_s += 0.1
    steps.times.built(2, StepWork((PromptWork("b", 1_000, 0, done=True),)))
    steps.times.built(3, StepWork())
    steps.now_s += 0.2
    steps.times.ended(1)
    steps.now_s += 0.3
    steps.times.ended(3)  # nobody told of 2's end: it teaches nothing
    assert [s for s in steps.seen if s[0] == "prompt"] == [("prompt", 1_000, 0, 0.3)]
    steps.times.ended(2)
    assert len([s for s in steps.seen if s[0] == "prompt"]) == 1


def test_neither_a_cold_first_step_nor_small_ones_make_an_engine_look_slow() -> None:
    steps = Steps()
    steps.step(PromptWork("cold", 2_000, 0, done=True), seconds=5.0)
    assert steps.times.tokens_per_s == pytest.approx(400)
    for _ in range(2):
        steps.step(PromptWork("a", 2_000, 0, done=True), seconds=0.2)
    for _ in range(20):
        steps.step(PromptWork("b", 5, 995, done=True), seconds=0.01)
    assert steps.times.tokens_per_s == pytest.approx(10_000)


def test_an_engine_learns_its_own_speed() -> None:
    steps = Steps()
    for n in (200, 500, 1_000, 2_000) * 5:
        steps.step(PromptWork("a", n, 0, done=True), seconds=0.01 + n * 5e-5)
    model = steps.model.prefill(HERE)
    assert abs(model.seconds(1_500, 0) - 0.085) < 0.01
    assert model.samples == 20


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["arrive", "compute", "finish", "preempt"]))))
def test_the_queue_by_priority_adds_up_to_the_queue(events: list[tuple[str, str]]) -> None:
    tracker = LoadTracker(by_priority=True)
    done = dict.fromkeys("abcd", 0)
    for name, event in events:
        match event:
            case "arrive":
                tracker.arrived(name, 1_000, priority=ord(name) % 3 - 1)
            case "compute":
                tracker.computes(name, done[name], done[name] + 400)
                done[name] += 400
            case "finish":
                tracker.finished(name)
            case "preempt":
                tracker.preempted(name)
        if event != "compute":
            done[name] = 0
        load = tracker.load()
        assert sum(tokens for _, tokens in load.by_priority) == load.queued_prefill_tokens
        assert all(tokens > 0 for _, tokens in load.by_priority)


def test_prompts_in_a_step_stall_its_decodes() -> None:
    steps = Steps()
    for _ in range(20):
        steps.step(seconds=0.01, decodes=4, context=4_000)
    assert steps.times.stall_s == 0.0
    for _ in range(20):
        steps.step(PromptWork("a", 500, 0, done=True), seconds=0.05, decodes=4, context=4_000)
    assert steps.times.stall_s == pytest.approx(0.02, rel=0.1), "half of the steps, 40 ms each"
    steps.now_s += 10.0
    assert steps.times.stall_s == 0.0


def test_queued_tokens_are_what_is_left_of_every_prompt() -> None:
    tracker = LoadTracker()
    tracker.arrived("a", 3_000)
    tracker.arrived("b", 1_000)
    assert tracker.computes("a", 500, 2_548) == PromptWork("a", 2_048, 500, done=False)
    load = tracker.load()
    assert (load.queued_requests, load.running_requests, load.queued_prefill_tokens) == (1, 1, 452 + 1_000)
    assert tracker.computes("a", 2_548, 3_000) == PromptWork("a", 452, 2_548, done=True)
    assert tracker.computes("a", 3_000, 3_001) is None, "a decode"
    tracker.finished("a")
    tracker.preempted("b")
    load = tracker.load()
    assert (load.queued_requests, load.running_requests, load.queued_prefill_tokens) == (1, 0, 1_000)
    tracker.finished("b")
    assert tracker.load().queued_prefill_tokens == 0
    assert tracker.computes("never arrived", 0, 10) is None
