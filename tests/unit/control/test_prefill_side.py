"""The prefill role: it exports only what was offered, holds blocks only as long as needed, and forgets everything."""

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg_plugin.config import DisaggSettings
from disagg_plugin.control.events import (
    Held,
    Leaving,
    PeerLeft,
    PrefillEvent,
    TicketCancelled,
    TicketOffered,
    TicketReady,
)
from disagg_plugin.control.offload_call import room_of
from disagg_plugin.control.prefill_side import PrefillSide
from disagg_plugin.kv.commands import Computed, DropSend, OpenSend, RankReport, ReleaseWhenStaged, SendTiming

TID = b"t" * 16
OFFER = TicketOffered(TID, nonce=7, peer="d:1", prompt_tokens=1_000, codec="raw", deadline_s=300.0)


class FakePort:
    """The I/O thread's side, without threads or sockets."""

    def __init__(self) -> None:
        self.events: list[PrefillEvent] = []
        self.sent: list[tuple[str, str]] = []
        self.held_ids: dict[bytes, Held] = {}

    def started(self, transfer_id: bytes, peer: str) -> None:
        self.sent.append(("started", peer))

    def all_sent(self, transfer_id: bytes, peer: str, *, wire_bytes: int, wire_s: float) -> None:
        self.sent.append(("all sent", f"{wire_bytes} in {wire_s}"))

    def cancel(self, transfer_id: bytes, peer: str, reason: str) -> None:
        self.sent.append(("cancel", reason))

    def arrived(self, transfer_id: bytes) -> None:
        self.sent.append(("arrived", ""))

    def check_adapter(self, transfer_id: bytes, folder: str, digest: str) -> None:
        self.sent.append(("check adapter", f"{folder} is {digest}"))

    def held(self, transfer_id: bytes, held: Held) -> None:
        self.held_ids[transfer_id] = held

    def hold_ended(self, transfer_id: bytes) -> None:
        self.held_ids.pop(transfer_id, None)

    def drain(self) -> Iterable[PrefillEvent]:
        events, self.events = self.events, []
        return events


class Bench:
    """One prefill side with a hand-driven clock."""

    def __init__(self, *, ranks: int = 1, capacity_tokens: int = 10_000) -> None:
        self.now = 100.0
        self.port = FakePort()
        self.side = PrefillSide(
            DisaggSettings(role="prefill"),
            self.port,
            ranks=ranks,
            kv_capacity_tokens=capacity_tokens,
            clock=lambda: self.now,
        )

    def arrive(self) -> None:
        self.port.events.append(OFFER)
        assert self.side.new_request("r1", TID, 1_000)

    def ready(self, first: int = 0, end: int = 999) -> None:
        self.port.events.append(TicketReady(TID, first, end))

    def nothing_left(self) -> bool:
        view = self.side.snapshot()
        return not view["open"] and not view["held_requests"] and not self.side.needs_steps


def test_a_transfer_id_that_was_never_offered_is_an_ordinary_request() -> None:
    bench = Bench()
    assert not bench.side.new_request("r1", b"x" * 16, 1_000)
    bench.side.scheduled("r1", 512, [1, 2])
    assert bench.side.step() == []
    assert not bench.side.finished("r1", completed=True)


def test_a_prompt_of_another_length_than_offered_is_not_exported() -> None:
    bench = Bench()
    bench.port.events.append(OFFER)
    assert not bench.side.new_request("r1", TID, 999)
    assert ("cancel", "prompt_differs") in bench.port.sent


def test_each_step_exports_what_it_computes_and_the_first_one_says_started() -> None:
    bench = Bench()
    bench.arrive()
    bench.side.scheduled("r1", 512, [1, 2])
    assert bench.port.sent[-1] == ("started", "d:1")
    assert bench.side.step() == [Computed(TID, 512, (1, 2))]
    bench.ready(64, 999)
    bench.side.scheduled("r1", 1_024, [1, 2, 3])
    assert bench.side.step() == [Computed(TID, 1_000, (1, 2, 3)), OpenSend(TID, 7, "d:1", 64, 999, "raw")]
    assert bench.port.sent.count(("started", "d:1")) == 1


def test_when_the_prefill_started_is_recorded_also_if_ready_came_before() -> None:
    bench = Bench()
    bench.arrive()
    bench.ready()
    bench.now += 0.5
    bench.side.step()
    bench.side.scheduled("r1", 512, [1, 2])
    (open_,) = bench.side.snapshot()["open"]  # type: ignore[misc]
    assert open_["started_s"] == bench.now


def test_an_ended_request_keeps_its_blocks_until_the_ranks_release_them() -> None:
    bench = Bench()
    bench.arrive()
    bench.ready()
    bench.side.scheduled("r1", 1_000, [1])
    bench.side.step()
    assert bench.side.finished("r1", completed=True)
    assert bench.side.holds_blocks
    assert bench.side.step() == [ReleaseWhenStaged(TID, "r1")]
    bench.side.reports([RankReport(0, staged=(TID,), sent=(TID,))])
    assert bench.side.needs_steps
    bench.side.released("r1")
    assert bench.nothing_left()


def test_a_prompt_that_the_engine_is_to_compute_asks_for_no_steps() -> None:
    """It steps for it anyway; and an engine that was paused in the middle of it must come to rest."""
    bench = Bench()
    bench.arrive()
    bench.ready()
    bench.side.scheduled("r1", 512, [1, 2])
    bench.side.step()
    bench.side.reports([RankReport(0, busy=True)])
    assert bench.side.needs_steps, "what is computed is still to be sent"
    bench.side.reports([RankReport(0)])
    assert not bench.side.needs_steps
    bench.side.scheduled("r1", 1_000, [1, 2])
    bench.side.step()
    assert bench.side.finished("r1", completed=True)
    assert bench.side.needs_steps


def test_what_was_announced_and_has_not_come_is_heard_of_by_an_idle_engine() -> None:
    bench = Bench()
    bench.port.events.append(OFFER)
    bench.ready()
    bench.side.step()
    bench.side.step()
    assert bench.side.needs_steps
    bench.port.events.append(TicketCancelled(TID, "http_unreachable"))
    bench.side.step()
    bench.side.step()
    assert bench.nothing_left()


def test_who_is_to_leave_hands_back_what_it_has_not_begun_and_ends_the_rest() -> None:
    bench = Bench()
    bench.side.hold("routed", Held((1, 2, 3)))
    bench.arrive()
    bench.side.scheduled("r1", 512, [1])
    waiting, coming, ready = (bytes([number]) * 16 for number in range(3))
    bench.port.events += [replace(OFFER, transfer_id=one) for one in (waiting, coming, ready)]
    assert bench.side.new_request("r2", waiting, 1_000)
    bench.port.events += [TicketReady(ready, 0, 999), Leaving()]  # D may say so before P begins
    bench.side.step()
    assert bench.side.drops == {"draining": 3}
    assert bench.port.sent.count(("cancel", "draining")) == 3
    assert not bench.side.new_request("r3", coming, 1_000), "it comes too late and is an ordinary request"
    bench.ready()
    assert [type(command) for command in bench.side.step()] == [OpenSend]
    bench.side.scheduled("r1", 1_000, [1])
    assert bench.side.finished("r1", completed=True), "what has begun is sent to its end"
    bench.side.scheduled("routed", 3, [2])
    assert bench.side.finished("routed", completed=True)
    assert bench.side.held_as("routed") is not None


def test_a_request_staged_before_its_end_holds_nothing() -> None:
    bench = Bench()
    bench.arrive()
    bench.ready()
    bench.side.scheduled("r1", 1_000, [1])
    bench.side.step()
    bench.side.reports([RankReport(0, staged=(TID,))])
    assert not bench.side.finished("r1", completed=True)
    bench.side.reports([RankReport(0, sent=(TID,))])
    assert bench.nothing_left()


def test_every_rank_must_have_sent_before_the_ticket_is_done() -> None:
    bench = Bench(ranks=2)
    bench.arrive()
    bench.ready()
    bench.side.scheduled("r1", 1_000, [1])
    bench.side.step()
    bench.side.reports([RankReport(0, staged=(TID,), sent=(TID,))])
    assert bench.side.finished("r1", completed=True)
    bench.side.reports([RankReport(1, staged=(TID,), sent=(TID,))])
    bench.side.released("r1")
    bench.side.step()
    assert bench.nothing_left()
    assert bench.side.totals["sent"] == 1


def test_an_aborted_request_is_dropped_and_told() -> None:
    bench = Bench()
    bench.arrive()
    bench.side.scheduled("r1", 512, [1])
    assert not bench.side.finished("r1", completed=False)
    assert bench.side.step()[-1] == DropSend(TID, "prefill_aborted")
    assert ("cancel", "prefill_aborted") in bench.port.sent
    assert bench.nothing_left()


def test_blocks_that_nobody_fetches_are_held_no_longer_than_hold_s() -> None:
    bench = Bench()
    bench.arrive()
    bench.side.scheduled("r1", 1_000, [1])
    assert bench.side.finished("r1", completed=True)
    bench.side.step()
    bench.now += 31.0
    assert bench.side.step() == [DropSend(TID, "hold_expired")]
    assert ("cancel", "hold_expired") in bench.port.sent
    bench.side.released("r1")
    assert bench.nothing_left()


def test_a_preemption_starts_the_export_over() -> None:
    bench = Bench()
    bench.arrive()
    bench.side.scheduled("r1", 512, [1, 2])
    bench.side.step()
    bench.side.preempted("r1")
    assert bench.side.step() == [Computed(TID, 0, ())]
    bench.side.scheduled("r1", 256, [8])
    assert bench.side.step() == [Computed(TID, 256, (8,))]


@pytest.mark.parametrize("range_", [(0, 1_001), (5, 5), (-1, 10)], ids=["beyond the prompt", "empty", "negative"])
def test_a_range_that_makes_no_sense_ends_the_transfer(range_: tuple[int, int]) -> None:
    bench = Bench()
    bench.arrive()
    bench.ready(*range_)
    assert bench.side.step() == [DropSend(TID, "bad_range")]


def test_a_lost_peer_releases_what_was_held_for_it() -> None:
    bench = Bench()
    bench.arrive()
    bench.side.scheduled("r1", 1_000, [1])
    assert bench.side.finished("r1", completed=True)
    bench.port.events.append(PeerLeft("d:1", "peer_silent"))
    assert DropSend(TID, "peer_silent") in bench.side.step()
    bench.side.released("r1")
    assert bench.nothing_left()


ACTIONS = st.sampled_from(
    [
        "offer",
        "arrive",
        "ready",
        "cancel",
        "lost",
        "compute",
        "preempt",
        "end",
        "abort",
        "step",
        "staged",
        "sent",
        "failed",
        "wait",
    ]
)


@settings(max_examples=400)
@given(st.lists(ACTIONS, min_size=4, max_size=30))
def test_in_any_order_of_events_blocks_are_released_once_and_nothing_leaks(actions: list[str]) -> None:
    bench = Bench()
    arrived = ended = offered = False
    held = released = 0
    for action in ["offer", *actions]:
        if action == "offer" and not offered:
            bench.port.events.append(OFFER)
            offered = True
        elif action == "arrive" and not arrived:
            bench.side.new_request("r1", TID, 1_000)
            arrived = True
        elif action == "ready":
            bench.ready()
        elif action == "cancel":
            bench.port.events.append(TicketCancelled(TID, "aborted"))
        elif action == "lost":
            bench.port.events.append(PeerLeft("d:1", "peer_lost"))
        elif action == "compute" and arrived and not ended:
            bench.side.scheduled("r1", 1_000, [1])
        elif action == "preempt" and arrived and not ended:
            bench.side.preempted("r1")
        elif action in ("end", "abort") and arrived and not ended:
            held += bench.side.finished("r1", completed=action == "end")
            ended = True
        elif action == "step":
            bench.side.step()
        elif action == "staged":
            bench.side.reports([RankReport(0, staged=(TID,))])
        elif action == "sent":
            timing = SendTiming(TID, 1.0, 2.0, 3.0, chunks=1, wire_bytes=10)
            bench.side.reports([RankReport(0, staged=(TID,), sent=(TID,), send_timings=(timing,))])
        elif action == "failed":
            bench.side.reports([RankReport(0, send_failed=((TID, "transport"),))])
        elif action == "wait":
            bench.now += 20.0
    if arrived and not ended:
        held += bench.side.finished("r1", completed=True)
    bench.side.step()
    bench.now += 1_000.0  # every deadline passes
    bench.side.step()
    if held:
        bench.side.released("r1")
        released += 1
    bench.side.step()
    assert released == held <= 1
    assert bench.nothing_left()


def test_a_prompt_whose_offer_was_withdrawn_before_it_came_is_not_waited_for() -> None:
    bench = Bench()
    room = room_of(TID)
    bench.port.events += [OFFER, TicketCancelled(TID, "aborted")]
    assert bench.side.offered_in_room(room) is None
    bench.side.step()
    assert bench.side.withdrawn_in_room(room)
    bench.port.events.append(OFFER)  # the same number again
    assert bench.side.offered_in_room(room) == TID
    assert not bench.side.withdrawn_in_room(room)
