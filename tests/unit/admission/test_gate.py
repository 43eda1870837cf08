"""The gate knows what it let in before any engine does, and believes no engine longer than it should."""

from dataclasses import replace
from typing import Any, ClassVar

import pytest
from unit.admission.gates import SECOND_PER_1000, Clock, gate, report

from disagg_plugin.admission.body import BodyFacts
from disagg_plugin.admission.classes import UnknownClass
from disagg_plugin.admission.engine_state import request_mark
from disagg_plugin.admission.gate import Gate, Refusal, Ticket
from disagg_plugin.qos_settings import key_digest
from disagg_policies.admission_snapshots import QueuedWork
from disagg_policies.snapshots import DecodeModel

PATH = "/v1/completions"


def enter(to: Gate, tokens: int = 1_000, headers: dict[bytes, bytes] | None = None, **facts: Any) -> Ticket | Refusal:
    return to.enter(PATH, headers or {}, BodyFacts(**{"prompt_tokens": tokens, **facts}))


def reason(entered: Ticket | Refusal) -> str:
    return entered.answer.reason if isinstance(entered, Refusal) else "admitted"


def ticket(entered: Ticket | Refusal) -> Ticket:
    assert isinstance(entered, Ticket)
    return entered


def test_without_any_report_everybody_is_admitted() -> None:
    asked = gate()
    assert [reason(enter(asked, 50_000)) for _ in range(3)] == ["admitted"] * 3
    assert asked.outcomes["normal", "early", "admitted", "unknown_load"] == 3


def test_a_burst_between_two_reports_is_counted() -> None:
    """Each takes a second; low may wait four, normal two, high one."""
    asked = gate()
    asked.update(report(1))
    assert [reason(enter(asked, priority=1)) for _ in range(6)] == ["admitted"] * 4 + ["ttft"] * 2
    assert reason(enter(asked)) == "admitted"  # overtakes low
    assert reason(enter(asked, priority=-1)) == "admitted"
    assert asked.reservations() == [QueuedWork(1, 4, 4_000), QueuedWork(0, 1, 1_000), QueuedWork(-1, 1, 1_000)]


def test_what_a_report_counts_is_not_counted_twice() -> None:
    asked = gate()
    asked.update(report(1))
    first, second = (ticket(enter(asked, priority=1)) for _ in range(2))
    for number, one in enumerate((first, second)):
        assert asked.exact(one, f"id-{number}", 1_000) is None
    asked.update(report(2, (1, 1_000), recent=(request_mark("id-0"),)))
    assert asked.reservations() == [QueuedWork(1, 1, 1_000)]
    asked.left(second)
    assert asked.reservations() == []
    asked.left(second)
    asked.left(first)
    assert asked.reservations() == []


def test_the_exact_check_refuses_what_turned_out_longer() -> None:
    asked = gate()
    asked.update(report(1, (0, 500)))
    short = ticket(asked.enter(PATH, {}, BodyFacts(text_bytes=400)))  # 100 tokens, it seems
    refusal = asked.exact(short, "id", 3_800, cached_tokens=0)
    assert isinstance(refusal, Refusal)  # 4.3 s: late even as low
    assert short.refusal is refusal
    assert asked.reservations() == []
    assert asked.outcomes["normal", "exact", "refused", "ttft"] == 1


def test_the_exact_check_does_not_let_a_request_wait_for_itself() -> None:
    asked = gate()
    asked.update(report(1, (-1, 100)))
    own = ticket(enter(asked, 1_800, priority=-1))
    assert asked.exact(own, "id", 1_800) is None


def test_a_conversation_continued_is_let_in_by_what_its_route_learned() -> None:
    """29k of 30k are usually cached on this route; with the exact prefix it is certain."""
    asked = gate()
    asked.update(report(1, (0, 500)))
    asked.left(ticket(enter(asked, 30_000)))  # late by its own length alone: admitted
    asked.update(report(2, (0, 3_500), (-1, 4_000)))
    assert reason(enter(asked, 30_000)) == "ttft"
    asked.update(report(3))
    for _ in range(20):
        talk = ticket(enter(asked, 30_000))
        asked.used(talk, 30_000, 29_000, 100)
        asked.left(talk)
    asked.update(report(4, (0, 500)))
    continued = ticket(enter(asked, 30_000))
    assert continued.ttft_s == pytest.approx(1.5, abs=0.1)
    assert asked.exact(continued, "id", 30_000, cached_tokens=29_000) is None
    assert asked.reservations() == [QueuedWork(0, 1, 1_000)]


def test_an_older_report_is_ignored_and_a_new_process_is_not() -> None:
    asked = gate()
    asked.update(report(5_000, (0, 9_000)))
    asked.update(report(4_999))
    assert reason(enter(asked)) == "ttft"
    asked.update(report(1))
    assert reason(enter(asked)) == "admitted"


def test_a_report_grows_old_unless_it_says_that_nothing_happens() -> None:
    clock = Clock()
    asked = gate(clock)
    asked.update(report(1, (0, 90_000)))
    assert reason(enter(asked)) == "ttft"
    clock.now_s += 31.0
    assert ticket(enter(asked)).ttft_s is None
    asked.update(report(2))
    clock.now_s += 1_000.0
    assert ticket(enter(asked)).ttft_s is not None


def test_of_several_engines_the_least_loaded_counts() -> None:
    asked = gate()
    asked.update(report(1, (0, 90_000)), "0")
    asked.update(report(1), "1")
    assert reason(enter(asked)) == "admitted"
    asked.update(report(2, draining=True), "1")
    assert reason(enter(asked)) == "ttft"


def test_draining_refuses_with_503_but_not_what_was_prefilled_elsewhere() -> None:
    asked = gate()
    asked.draining = True
    refused = enter(asked)
    assert isinstance(refused, Refusal)
    assert refused.answer.unavailable
    assert reason(enter(asked, remote_prefill_done=True)) == "admitted"
    assert asked.reservations() == [QueuedWork(0, 1, 0)]  # it needs no prefill here


def test_other_api_servers_reservations_count() -> None:
    asked = gate()
    asked.update(report(1))
    asked.also_count(lambda: [QueuedWork(0, 9, 9_000)])
    assert reason(enter(asked)) == "ttft"


def test_one_tenants_long_prompts_do_not_take_the_others_places() -> None:
    keys = [{"service_class": "low", "tenant": name, "sha256": key_digest(name)} for name in ("heavy", "light")]
    asked = gate(api_keys=keys, fair_share_burst_tokens=1_000)
    asked.update(report(1, (1, 2_900)))
    outcomes: dict[str, list[str]] = {"heavy": [], "light": []}
    for _ in range(8):
        for name, tokens in (("heavy", 400), ("light", 50)):
            entered = enter(asked, tokens, {b"authorization": f"Bearer {name}".encode()})
            outcomes[name].append(reason(entered))
            if isinstance(entered, Ticket):
                asked.left(entered)
    assert outcomes["light"] == ["admitted"] * 8
    assert outcomes["heavy"][0] == "admitted"
    assert "fair_share" in outcomes["heavy"]


def test_of_several_prompts_the_first_decides_and_all_are_counted() -> None:
    asked = gate()
    asked.update(report(1))
    batch = ticket(enter(asked, 3_000))
    for at in range(3):
        assert asked.exact(batch, f"id-{at}", 1_000) is None
    assert asked.reservations() == [QueuedWork(0, 3, 3_000)]
    asked.left(batch)
    assert asked.reservations() == []


@pytest.mark.parametrize("has_exact", [False, True])
def test_each_request_is_told_to_the_observer_once(has_exact: bool) -> None:
    class Observer:
        told: ClassVar[list[tuple[str | None, ...]]] = []

        def admitted(self, slo_class: str | None, reason: str = "") -> None:
            self.told.append(("admitted", slo_class, reason))

        def refused(self, slo_class: str | None, reason: str) -> None:
            self.told.append(("refused", slo_class, reason))

        def degraded(self, slo_class: str | None, step: str) -> None:
            self.told.append(("degraded", slo_class, step))

    Observer.told.clear()
    asked = gate()
    asked.observer, asked.has_exact = Observer(), has_exact
    asked.update(report(1, (1, 3_200)))
    low = ticket(enter(asked, 100, priority=1))
    if has_exact:
        asked.exact(low, "id", 100)
    asked.applied(low, low.steps)
    enter(asked, 2_000, priority=1)
    assert Observer.told == [("admitted", "low", "fits"), ("degraded", "low", "max_tokens"), ("refused", "low", "ttft")]


def test_an_unknown_class_is_the_callers_to_answer() -> None:
    with pytest.raises(UnknownClass):
        enter(gate(), priority="gold")


def test_the_status_is_plain_and_complete() -> None:
    asked = gate()
    asked.update(report(1, (1, 3_200)))
    low = ticket(enter(asked, 100, priority=1))
    assert low.steps == ("max_tokens:64",)
    asked.applied(low, low.steps)
    status: Any = asked.status()
    assert status["classes"]["low"]["degradation"] == ["max_tokens:64"]
    assert status["degraded"] == [{"class": "low", "step": "max_tokens", "count": 1}]
    assert status["engines"]["0"]["queued_tokens"] == 3_200
    assert status["outcomes"] == [
        {"class": "low", "stage": "early", "outcome": "admitted", "reason": "fits", "count": 1}
    ]
    assert status["policy"]["chain"] == ["projected"]


def test_what_lands_is_as_long_as_prompts_are_cached_or_not() -> None:
    """Four at a time, of 10,000 tokens each: 40 ms on top of 10 and of this one's own."""
    asked = gate(classes={"normal": {"ttft_slo_s": 500.0, "tpot_slo_s": 0.05}})
    seen = ticket(enter(asked, 10_000))
    assert asked.exact(seen, "a conversation", 10_000, 9_900) is None  # 0.1 s of prefill
    asked.left(seen)
    decode = replace(SECOND_PER_1000, decode=DecodeModel(0.01, 0.0, 1e-6))
    asked.update(report(1, decode=decode, landing=(QueuedWork(0, 9, 90_000),), decode_lasts_s=0.4))
    refused = enter(asked, 1_000)
    assert isinstance(refused, Refusal)
    assert refused.answer.reason == "tpot"
    asked.update(report(2, decode=decode, landing=(QueuedWork(0, 9, 90_000),), decode_lasts_s=0.1))
    assert isinstance(enter(asked, 1_000), Ticket), "one at a time"
