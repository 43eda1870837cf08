"""Other people's policies decide while they behave; a request never pays for one that does not."""

import logging
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from unit.plugins.situations import BUSY, CHOICES, PROMPT, WORKERS, decider

from disagg_plugin.hookspecs import PolicyParameters, hookimpl
from disagg_plugin.plugins import PolicySettings, choose, load_plugins
from disagg_plugin.serving.decision_record import replay
from disagg_plugin.serving.decisions import MAX_REASONS, RECENT_DECISIONS, Decider
from disagg_policies.snapshots import Codec, CodecChoices, Local, Offload, Placement, Snapshot

SLACK_S = 1.0  # a busy machine may wake us late; a hook that were waited for would cost 10 s


class Answers:
    """An offload policy that gives one answer, or raises it."""

    def __init__(self, *answers: object) -> None:
        self.answers = list(answers)
        self.asked = 0

    @hookimpl
    def disagg_decide_offload(self, snapshot: Snapshot) -> object:
        self.asked += 1
        answer = self.answers[min(self.asked, len(self.answers)) - 1]
        if isinstance(answer, BaseException):
            raise answer
        return answer


class Waits:
    """An offload policy that answers when the event is set, or after ten seconds."""

    def __init__(self, event: threading.Event, timeout_s: float | None = 10.0) -> None:
        self.event, self.timeout_s = event, timeout_s

    @hookimpl
    def disagg_decide_offload(self, snapshot: Snapshot) -> Local:
        self.event.wait(self.timeout_s)
        return Local("too_late")


class Places:
    def __init__(self, answer: object) -> None:
        self.answer = answer

    @hookimpl
    def disagg_place_prefill(self, snapshot: Snapshot, parameters: PolicyParameters) -> object:
        return self.answer


class Codes:
    def __init__(self, answer: object) -> None:
        self.answer = answer

    @hookimpl
    def disagg_choose_codec(self, choices: CodecChoices) -> object:
        return self.answer


@pytest.fixture
def never() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()  # lets stuck threads end


def test_built_ins_decide_without_a_thread() -> None:
    before = threading.active_count()
    record = decider().decide(PROMPT, BUSY, WORKERS)
    assert (record.decided_by, record.placed_by, record.problems) == ("latency", "score", ())
    assert record.decision == Offload(("p-0", "p-1"), "remote_faster", *estimates(record.decision))
    assert threading.active_count() == before


def estimates(decision: Local | Offload) -> tuple[float | None, float | None, float | None]:
    return decision.local_ttft_s, decision.remote_ttft_s, decision.harm_s


def test_an_own_offload_policy_decides() -> None:
    record = decider(Answers(Local("my_reason"))).decide(PROMPT, BUSY, WORKERS)
    assert (record.decision, record.decided_by) == (Local("my_reason"), "own_0")


def test_an_own_placement_reaches_the_offload_policy() -> None:
    record = decider(Places(Placement(("p-1",), "my_rack"))).decide(PROMPT, BUSY, WORKERS)
    assert record.placed_by == "own_0"
    assert isinstance(record.decision, Offload)
    assert record.decision.workers == ("p-1",)


def test_an_own_placement_without_workers_keeps_the_prompt_here_for_its_reason() -> None:
    record = decider(Places(Placement((), "all_too_far"))).decide(PROMPT, BUSY, WORKERS)
    assert record.decision.reason == "all_too_far"


def test_an_own_codec_policy_chooses() -> None:
    deciding = decider(Codes(Codec("raw", "always_raw", 0.0, 0.0)))
    assert deciding.choose_codec("p-0", CHOICES).reason == "always_raw"
    assert decider().choose_codec("p-0", CHOICES).name == "int8"


def test_none_leaves_it_to_the_next_and_is_no_failure() -> None:
    deciding = decider(Answers(None), Answers(Local("second")))
    for _ in range(5):
        assert deciding.decide(PROMPT, BUSY, WORKERS).decided_by == "own_1"
    assert deciding.status()["disabled"] == []


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(ValueError("no"), id="an exception"),
        pytest.param(SystemExit(1), id="an exit"),
        pytest.param(True, id="another type"),
        pytest.param(Offload(("p-9",), "mine"), id="an unknown worker"),
        pytest.param(Offload(("p-2",), "mine"), id="a worker that is not healthy"),
        pytest.param(Offload(("p-0", "p-0"), "mine"), id="a worker twice"),
        pytest.param(Offload((), "mine"), id="no worker"),
        pytest.param(Offload(["p-0"], "mine"), id="a list of workers"),  # type: ignore[arg-type]
        pytest.param(Offload(([],), "mine"), id="a worker that is no name"),  # type: ignore[arg-type]
        pytest.param(Local("request r-1!"), id="a reason that is no word"),
        pytest.param(Local(None), id="no reason"),  # type: ignore[arg-type]
        pytest.param(Local("mine", math.nan), id="an estimate that is no number"),
        pytest.param(Local("mine", remote_ttft_s=math.inf), id="an infinite estimate"),
    ],
)
def test_a_policy_that_fails_three_times_in_a_row_is_disabled_and_said_once(
    answer: object, caplog: pytest.LogCaptureFixture
) -> None:
    policy = Answers(answer)
    deciding = decider(policy, bound_s=5.0)
    for _ in range(10):
        record = deciding.decide(PROMPT, BUSY, WORKERS)
        assert record.decided_by == "latency"
    assert policy.asked == 3
    assert deciding.status()["disabled"] == ["offload own_0"]
    assert sum(deciding.status()["failures"]["offload own_0"].values()) == 3  # type: ignore[index]
    assert [r.levelname for r in caplog.records if "disabled until restart" in r.message] == ["ERROR"]


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(("p-0",), id="another type"),
        pytest.param(Placement(("p-9",), "mine"), id="an unknown worker"),
        pytest.param(Placement(("p-0",), "mine", (math.nan,)), id="a score that is no number"),
    ],
)
def test_a_placement_that_makes_no_sense_is_replaced_by_the_built_in(answer: object) -> None:
    record = decider(Places(answer), bound_s=5.0).decide(PROMPT, BUSY, WORKERS)
    assert record.placed_by == "score"
    assert record.problems[0].startswith("own_0 nonsense: ")


def test_a_codec_that_does_not_exist_is_replaced_by_the_built_in() -> None:
    assert decider(Codes(Codec("zip", "small", 0.0, 0.0)), bound_s=5.0).choose_codec("p-0", CHOICES).name == "int8"


def test_a_success_in_between_keeps_a_policy_in_office() -> None:
    policy = Answers(ValueError(), ValueError(), None, ValueError(), ValueError(), Local("mine"))
    deciding = decider(policy, bound_s=5.0)
    records = [deciding.decide(PROMPT, BUSY, WORKERS) for _ in range(6)]
    assert [record.decided_by for record in records] == ["latency"] * 5 + ["own_0"]


@pytest.mark.parametrize(
    "timeout_s", [pytest.param(10.0, id="sleeps ten seconds"), pytest.param(None, id="never returns")]
)
def test_a_policy_that_hangs_costs_the_bound_three_times_and_then_nothing(
    never: threading.Event, timeout_s: float | None
) -> None:
    deciding = decider(Waits(never, timeout_s), bound_s=0.005)
    started_s = time.monotonic()
    records = [deciding.decide(PROMPT, BUSY, WORKERS) for _ in range(20)]
    assert time.monotonic() - started_s < 3 * 0.005 + SLACK_S
    assert {record.decided_by for record in records} == {"latency"}
    assert [bool(record.problems) for record in records] == [True] * 3 + [False] * 17
    assert deciding.status()["failures"] == {"offload own_0": {"late": 3}}


def test_hooks_of_one_decision_share_the_bound() -> None:
    """The second is not asked when the first has used up the time, and is not blamed."""
    now = 0.0

    def clock() -> float:
        return now

    class Slow:
        @hookimpl
        def disagg_decide_offload(self, snapshot: Snapshot) -> None:
            nonlocal now
            now += 4.0

    second = Answers(Local("second"))
    settings = PolicySettings(offload=("slow", "second"))
    manager = load_plugins(settings, extra=[("slow", Slow()), ("second", second)])
    deciding = Decider(choose(manager, settings), bound_s=5.0, clock=clock, log_interval_s=None)
    for _ in range(4):
        record = deciding.decide(PROMPT, BUSY, WORKERS)
        assert record.problems == ("second not asked: no time left",)
    assert second.asked == 0
    assert deciding.status()["disabled"] == []


def test_a_built_in_that_raises_keeps_the_prompt_here_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    deciding = decider()
    broken = replace(PROMPT, prompt_tokens=None)  # type: ignore[arg-type]
    for _ in range(3):
        assert deciding.decide(broken, BUSY, WORKERS).decision == Local("policy_error")
    assert len([r for r in caplog.records if "a built-in policy raised" in r.message]) == 1


def test_decisions_are_counted_by_reason() -> None:
    deciding = decider()
    deciding.decide(PROMPT, BUSY, WORKERS)
    deciding.decide(replace(PROMPT, prompt_tokens=10), BUSY, WORKERS)
    deciding.decide(PROMPT, BUSY, ())
    assert deciding.reasons == {"remote_faster": 1, "short_prompt": 1, "no_workers": 1}


def test_a_policy_that_invents_reasons_does_not_fill_the_memory() -> None:
    deciding = decider(Answers(*[Local(f"reason_{number}") for number in range(3 * MAX_REASONS)]), bound_s=5.0)
    for _ in range(3 * MAX_REASONS):
        deciding.decide(PROMPT, BUSY, WORKERS)
    assert len(deciding.reasons) == MAX_REASONS + 1
    assert deciding.reasons["other"] == 2 * MAX_REASONS


def test_the_latest_decisions_are_kept_the_oldest_first() -> None:
    deciding = decider()
    for number in range(RECENT_DECISIONS + 5):
        deciding.decide(replace(PROMPT, request_id=f"r-{number}"), BUSY, WORKERS)
    assert [row["request_id"] for row in deciding.rows(2)] == [f"r-{RECENT_DECISIONS + 3}", f"r-{RECENT_DECISIONS + 4}"]
    assert len(deciding.records()) == RECENT_DECISIONS


def test_only_offloads_take_turns() -> None:
    settings = PolicySettings(placement=("round_robin",))
    deciding = Decider(choose(load_plugins(settings), settings), clock=lambda: 0.0, log_interval_s=None)
    chosen = []
    for number in range(8):  # a short prompt stands between any two long ones
        short = number % 2 == 0
        record = deciding.decide(replace(PROMPT, prompt_tokens=10 if short else 4_000), BUSY, WORKERS)
        chosen += [record.decision.workers[0]] if isinstance(record.decision, Offload) else []
    assert chosen in (["p-0", "p-1"] * 2, ["p-1", "p-0"] * 2)


def test_one_decision_in_ten_seconds_goes_to_the_log_and_can_be_replayed(caplog: pytest.LogCaptureFixture) -> None:
    now = 100.0
    deciding = Decider(choose(load_plugins()), clock=lambda: now, log_interval_s=10.0)
    caplog.set_level(logging.INFO)
    for _ in range(25):
        deciding.decide(PROMPT, BUSY, tuple(replace(w, reported_s=now) for w in WORKERS))
        now += 1.0
    lines = [r.message for r in caplog.records if "disagg: decision" in r.message]
    assert len(lines) == 3
    assert all(replay(line).equal for line in lines)
