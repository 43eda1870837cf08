"""Two data planes over a network in memory, without threads and without real time, situation by situation."""

import math
from dataclasses import replace

import pytest
import torch

from disagg_plugin.config import TransferSettings
from disagg_plugin.errors import ConfigError
from disagg_plugin.kv.commands import (
    AbandonReceive,
    AddPeer,
    Computed,
    DropSend,
    OpenReceive,
    OpenSend,
    ReleaseWhenStaged,
    RemovePeer,
    SuspendReceive,
)
from disagg_plugin.kv.dataplane import Completions, DataPlane, agent_name
from disagg_plugin.kv.geometry import HeadRange, KVGeometry
from disagg_plugin.kv.wire import Kind, Notification, parse_notification
from disagg_plugin.testing import DenseView, MemoryNetwork, canonical_noise

GEOMETRY = KVGeometry(layers=2, kv_heads=2, head_dim=16, dtype="bfloat16")
SETTINGS = TransferSettings(
    codec="raw",
    compile=False,
    guard_tokens=0,
    guard_limit=10.0,
    slot_bytes=4096,
    region_slots=4,
    ring_max_bytes=32 * 4096,
    stall_timeout_s=10.0,
)
TOKENS = 100  # about 7 chunks
ID, NONCE = b"transfer-0000001", 0xFEED
P_BLOCKS, D_BLOCKS = tuple(range(20, 5, -1)), tuple(range(1, 20))
LEAKS = ("open_sends", "open_receives", "slots_in_use", "slots_quarantined", "private_buffers_in_use", "unanswered")


class Rig:
    """P and D, which know each other, and the time."""

    tick_s = 0.0  # passes whenever somebody looks at the clock

    def __init__(self, *, manual: bool = False, settings: TransferSettings = SETTINGS) -> None:
        self.now = 100.0
        self.settings = settings
        self.network = MemoryNetwork(manual=manual)
        self.views = {
            "p": DenseView(GEOMETRY, blocks=40, block_size=16),
            "d": DenseView(GEOMETRY, blocks=40, block_size=8),
        }
        self.planes = {engine: self.new_plane(engine, 1) for engine in "pd"}
        self.epochs = {"p": 1, "d": 1}
        self.introduce("p", "d")
        self.completed: list[str] = []
        self.released: list[str] = []
        self.invalid: set[int] = set()
        self.reports: dict[str, list] = {"p": [], "d": []}

    @property
    def p(self) -> DataPlane:
        return self.planes["p"]

    @property
    def d(self) -> DataPlane:
        return self.planes["d"]

    def new_plane(self, engine: str, epoch: int) -> DataPlane:
        return DataPlane(
            engine=engine,
            epoch=epoch,
            rank=0,
            view=self.views[engine],
            transfer=self.settings,
            transport=self.network.transport(agent_name(engine, 0, epoch)),
            clock=self.clock,
            threaded=False,
        )

    def clock(self) -> float:
        self.now += self.tick_s
        return self.now

    def introduce(self, *engines: str) -> None:
        """Tell these engines about the other one."""
        for engine in engines:
            other = "d" if engine == "p" else "p"
            self.planes[engine].apply(
                [AddPeer(other, self.epochs[other], (self.planes[other].endpoint,), 8, 4, receives=engine == "d")]
            )
            self.planes[engine].pump_once()

    def restart(self, engine: str) -> None:
        self.planes[engine].close()
        self.epochs[engine] += 1
        self.planes[engine] = self.new_plane(engine, self.epochs[engine])
        self.introduce("p", "d")

    def pump(self, rounds: int = 3) -> None:
        for _ in range(rounds):
            self.p.pump_once()
            self.d.pump_once()

    def step(self, engine: str) -> None:
        plane = self.planes[engine]
        plane.after_forward(computed=False)
        done = plane.take_completions()
        self.completed += done.received
        self.released += done.released
        self.invalid |= done.invalid_block_ids
        self.reports[engine].append(plane.report())

    def run(self, rounds: int = 40) -> None:
        for _ in range(rounds):
            self.step("p")
            self.pump()
            self.step("d")

    def said(self, engine: str, what: str) -> list:
        return [one for report in self.reports[engine] for one in getattr(report, what)]

    def open_receive(self, first: int = 0, end: int = TOKENS) -> None:
        self.d.apply([OpenReceive("r", ID, NONCE, "p", first, end, D_BLOCKS)])

    def open_send(self, first: int = 0, end: int = TOKENS, codec: str = "raw") -> None:
        self.p.apply([OpenSend(ID, NONCE, "d", first, end, codec)])

    def compute(self, tokens: int = TOKENS, blocks: tuple[int, ...] = P_BLOCKS) -> None:
        self.views["p"].fill(blocks, 1, tokens=tokens)
        self.p.apply([Computed(ID, tokens, blocks)])

    def begin(self, **kwargs) -> None:
        self.open_receive()
        self.open_send(**kwargs)
        self.compute()

    def error(self, first: int = 0, end: int = TOKENS) -> float:
        wanted = canonical_noise(GEOMETRY, HeadRange(0, 2), 1, TOKENS)[:, :, :, first:end]
        return float((self.views["d"].read(D_BLOCKS, first, end).float() - wanted.float()).abs().max())

    def assert_idle(self) -> None:
        for engine in "pd":
            counters = self.planes[engine].counters()
            assert {leak: counters[leak] for leak in LEAKS} == dict.fromkeys(LEAKS, 0)
            assert counters["internal_errors"] == counters["hook_errors"] == 0
            assert not self.planes[engine].report().busy
        assert self.network.open_handles == 0


@pytest.fixture
def rig() -> Rig:
    return Rig()


@pytest.fixture
def manual() -> Rig:
    """Writes stay under way until the test delivers them."""
    return Rig(manual=True)


@pytest.mark.parametrize(("codec", "most_error"), [("raw", 0.0), ("auto", 0.0), ("int8", 0.05), ("int8c", 0.05)])
@pytest.mark.parametrize("first", [0, 16, 21])
def test_a_range_arrives_on_time_and_once(rig, codec, most_error, first):
    rig.open_receive(first=first)
    rig.open_send(first=first, codec=codec)
    rig.compute()
    rig.run()
    assert rig.error(first) <= most_error
    assert rig.completed == rig.said("d", "received") == ["r"]
    assert rig.said("p", "staged") == rig.said("p", "sent") == [ID]
    assert rig.invalid == set()
    received, sent = rig.said("d", "receive_timings")[0], rig.said("p", "send_timings")[0]
    assert (received.chunks, received.wire_bytes) == (sent.chunks, sent.wire_bytes)
    assert received.codecs == (("raw",) if most_error == 0 else (codec,))
    rig.assert_idle()


def test_chunks_follow_the_prefill_step_by_step(rig):
    rig.open_receive()
    rig.compute(10)
    rig.run(2)
    assert rig.p.counters()["chunks_sent"] == 0, "nothing leaves before D is ready"
    rig.open_send()
    rig.run(2)
    assert rig.d.counters()["chunks_received"] == 1
    rig.compute(TOKENS - 1)
    rig.run()
    assert rig.completed == []
    rig.compute(TOKENS)
    rig.run()
    assert rig.completed == ["r"]
    assert rig.error() == 0


def test_a_preempted_prompt_continues_from_what_was_staged(rig):
    rig.open_receive()
    rig.open_send()
    rig.compute(50)
    rig.run(5)
    staged = rig.p.counters()["raw_bytes_sent"]
    rig.views["p"].cache.zero_()  # its blocks went to somebody else
    other_blocks = tuple(range(30, 39))
    for tokens in (20, 50):
        rig.compute(tokens, other_blocks)
        rig.run(5)
    assert rig.p.counters()["raw_bytes_sent"] == staged
    rig.compute(TOKENS, other_blocks)
    rig.run()
    assert rig.completed == ["r"]
    assert rig.error() == 0


def test_values_that_int8_cannot_hold_go_raw_and_never_overflow_a_slot():
    rig = Rig()
    rig.open_receive()
    rig.open_send(codec="int8")
    rig.compute(30)
    rig.run(5)  # from now on chunks are sized for int8
    rig.views["p"].fill(P_BLOCKS, 1, tokens=TOKENS)
    rig.views["p"].cache[list(P_BLOCKS[2:]), :, :, 0, 0, 0] = float("inf")
    rig.p.apply([Computed(ID, TOKENS, P_BLOCKS)])
    rig.run()
    assert rig.completed == ["r"]
    assert rig.said("d", "receive_timings")[0].codecs == ("int8", "raw")
    found = rig.views["d"].read(D_BLOCKS, 32, TOKENS)
    assert torch.equal(found, rig.views["p"].read(P_BLOCKS, 32, TOKENS))


def test_an_empty_range_is_complete_at_once(rig):
    rig.open_receive(first=TOKENS)
    rig.step("d")
    assert rig.completed == ["r"]
    rig.assert_idle()


def test_what_is_under_way_when_its_transfer_ends_keeps_both_engines_stepping(manual):
    """Otherwise an idle engine never hears that the slots and buffers are free again."""
    manual.begin()
    manual.step("p")
    manual.pump()
    manual.network.deliver(manual.network.pending[0])
    manual.d.pump_once()
    manual.p.apply([DropSend(ID, "aborted")])
    manual.d.apply([AbandonReceive("r", "aborted")])
    manual.step("p")
    assert manual.reports["p"][-1].busy
    manual.network.manual = False
    while manual.network.pending:
        manual.network.deliver(manual.network.pending[0])
    manual.pump()
    steps = 0
    while any(manual.planes[engine].report().busy for engine in "pd"):
        manual.run(1)
        steps += 1
        assert steps < 10
    manual.assert_idle()


def test_a_slot_that_nobody_answers_for_keeps_no_engine_stepping(manual):
    manual.begin()
    manual.step("p")
    manual.pump()
    manual.p.apply([DropSend(ID, "aborted")])
    manual.now += SETTINGS.stall_timeout_s + 1
    manual.p.pump_once()
    manual.step("p")
    assert manual.p.counters()["slots_quarantined"] > 0
    assert not manual.reports["p"][-1].busy


def test_who_was_given_up_and_does_not_know_it_is_answered_and_has_its_slots_again(manual):
    """As a peer that was stopped for a while, and writes on: nobody may introduce it again before the next prompt."""
    manual.begin()
    manual.step("p")
    manual.pump()
    manual.d.apply([AbandonReceive("r", "peer_silent"), RemovePeer("p")])
    manual.d.pump_once()
    assert manual.d._pump.connected, "the thread goes on listening"
    for write in list(manual.network.pending):
        manual.network.deliver(write)
    manual.d.pump_once()
    manual.now += SETTINGS.stall_timeout_s / 2 + 1
    manual.run(3)
    assert manual.said("p", "send_failed") == [(ID, "discarded")]
    assert manual.d.counters()["discards"] == 4
    manual.assert_idle()


@pytest.mark.parametrize("at", range(0, 4000, 333))
def test_a_damaged_chunk_is_sent_once_more(manual, at):
    manual.begin()
    manual.step("p")
    manual.pump()
    manual.network.deliver(manual.network.pending[0], flip_byte=at)
    manual.network.manual = False
    for write in list(manual.network.pending):
        manual.network.deliver(write)
    manual.run()
    assert manual.error() == 0
    assert manual.d.counters()["nacks"] == manual.p.counters()["chunks_resent"] == 1
    assert manual.completed == ["r"]
    manual.assert_idle()


def test_a_chunk_damaged_twice_fails_the_transfer_on_both_sides(manual):
    manual.begin()
    for _ in range(10):
        manual.step("p")
        manual.pump()
        for write in list(manual.network.pending):
            manual.network.deliver(write, flip_byte=200)
        manual.pump()
        manual.step("d")
    assert manual.said("p", "send_failed") == [(ID, "bad_chunk")]
    assert manual.said("d", "receive_failed") == [("r", "bad_chunk")]
    assert manual.completed == [], "only the scheduler ends it, on all ranks"
    manual.d.apply([AbandonReceive("r", "test")])
    manual.run(3)
    assert manual.completed == ["r"]
    assert manual.invalid == set(D_BLOCKS[: -(-TOKENS // 8)])
    manual.assert_idle()


def test_an_abandoned_request_keeps_its_landed_prefix(rig):
    rig.open_receive()
    rig.open_send()
    rig.compute(50)
    rig.run(10)
    rig.d.apply([AbandonReceive("r", "test"), AbandonReceive("r", "again")])
    rig.compute()
    rig.run()
    assert rig.completed == ["r"]
    assert rig.invalid == set(D_BLOCKS[50 // 8 : -(-TOKENS // 8)])
    assert rig.error(end=50) == 0
    assert rig.said("p", "send_failed") == [(ID, "discarded")]
    assert rig.d.counters()["late_commands"] == 1
    rig.assert_idle()


def test_open_and_abandon_in_one_step_is_one_completion(rig):
    rig.d.apply([OpenReceive("r", ID, NONCE, "p", 0, TOKENS, D_BLOCKS), AbandonReceive("r", "test")])
    rig.open_send()
    rig.compute()
    rig.run()
    assert rig.completed == ["r"]
    rig.assert_idle()


def test_abandoning_what_was_never_opened_is_only_counted(rig):
    rig.d.apply([AbandonReceive("unknown", "test")])
    rig.run(2)
    assert rig.completed == []
    assert rig.d.counters()["late_commands"] == 1


@pytest.mark.parametrize("extra", [0, 5])
def test_a_suspended_request_goes_on_with_another_transfer_and_completes_once(manual, extra):
    """``extra``: this rank got further than the slowest one, whose end counts for all."""
    manual.begin()
    manual.run(2)
    for write in list(manual.network.pending)[:2]:
        manual.network.deliver(write)
    late = list(manual.network.pending)
    manual.run()
    manual.d.apply([SuspendReceive("r")])
    (end,) = [end for report in [manual.d.report()] for _, end in report.receive_suspended]
    assert 0 < end < TOKENS
    assert manual.error(0, end) == 0.0
    for write in late:
        manual.network.deliver(write)  # of the first sender: refused
    while manual.network.pending:
        manual.network.deliver(manual.network.pending[0])
        manual.run(2)
    manual.run()
    again = replace_ids(OpenReceive("r", ID, NONCE, "p", end - extra, TOKENS, D_BLOCKS))
    manual.d.apply([again])
    manual.p.apply([OpenSend(again.transfer_id, again.nonce, "d", end - extra, TOKENS, "raw")])
    manual.p.apply([Computed(again.transfer_id, TOKENS, P_BLOCKS)])
    for _ in range(20):
        manual.run(2)
        for write in list(manual.network.pending):
            manual.network.deliver(write)
    assert manual.completed == ["r"]
    assert not manual.invalid
    assert manual.error() == 0.0
    manual.assert_idle()


def test_a_sender_that_would_leave_a_hole_is_refused(manual):
    manual.begin()
    manual.run(2)
    manual.network.deliver(manual.network.pending[0])
    manual.run()
    manual.d.apply([SuspendReceive("r")])
    ((_, end),) = manual.d.report().receive_suspended
    manual.d.apply([replace_ids(OpenReceive("r", ID, NONCE, "p", end + 1, TOKENS, D_BLOCKS))])
    assert manual.d.report().receive_failed == (("r", "hole_in_range"),)
    manual.d.apply([AbandonReceive("r", "test")])
    manual.step("d")
    assert manual.completed == ["r"]
    assert min(manual.invalid) == D_BLOCKS[end // 8]


@pytest.mark.parametrize("opened", [False, True])
def test_suspending_twice_or_what_is_not_open_is_only_counted(rig, opened):
    if opened:
        rig.open_receive()
        rig.d.apply([SuspendReceive("r")])
    rig.d.apply([SuspendReceive("r")])
    report = rig.d.report()
    assert report.counters["late_commands"] == 1
    assert len(report.receive_suspended) == opened


def test_an_answer_that_was_lost_is_asked_for_again(manual):
    """The chunk's transfer is over by then; its slot is not lost with it."""
    manual.begin()
    manual.run(2)
    for write in list(manual.network.pending):
        manual.network.deliver(write, notify=False)  # the data landed, D was never told
    manual.p.apply([DropSend(ID, "test")])
    manual.now += 11.0
    manual.run(3)
    assert manual.p.counters()["slots_quarantined"] > 0
    manual.d.apply([AbandonReceive("r", "test")])
    manual.now += 11.0
    manual.run(3)
    assert manual.d.counters()["late"] > 0
    assert manual.p.counters()["slots_quarantined"] == 0
    manual.assert_idle()


@pytest.mark.parametrize("written", [False, True])
def test_a_peer_that_never_answers_is_introduced_again_and_its_slots_are_free(manual, written):
    """``written``: as far as the transport knows; else the writes stay under way for ever."""
    manual.begin()
    manual.run(2)
    for write in list(manual.network.pending) if written else ():
        manual.network.deliver(write, notify=False)
    for _ in range(6):
        manual.now += 11.0
        manual.p.pump_once()
        manual.network.agents[manual.d.endpoint.agent_name].notifications.clear()  # nothing gets through
        manual.step("p")
    counters = manual.p.counters()
    assert (counters["slots_quarantined"], counters["slots_in_use"], counters["reintroductions"]) == (0, 0, 1)
    manual.run(4)
    manual.d.apply([AbandonReceive("r", "test")])
    manual.run(2)
    manual.assert_idle()


def test_a_peer_that_goes_on_asking_is_introduced_again(rig):
    rig.begin()
    rig.run()
    (p_name, d_name) = (rig.planes[engine].endpoint.agent_name for engine in "pd")
    asked = Notification(Kind.CHUNK, 0, 0, 0, NONCE, 4000).pack()
    for _ in range(3):
        rig.network.agents[d_name].notifications.append((p_name, asked))
        rig.pump(1)
    assert rig.d.counters()["reintroductions"] == 1


def test_answers_that_cannot_be_sent_are_sent_over_a_new_connection(manual):
    """Several of them: a peer's slots are all taken by the time that the cut is found out."""
    manual.begin()
    manual.step("p")
    manual.p.pump_once()
    assert len(manual.network.pending) > 1
    for write in list(manual.network.pending):
        manual.network.deliver(write)
    manual.network.manual = False
    manual.network.broken[manual.d.endpoint.agent_name, manual.p.endpoint.agent_name] = 1
    manual.run()
    assert manual.completed == ["r"]
    assert (manual.invalid, manual.error()) == (set(), 0)
    assert manual.d.counters()["reintroductions"] == 1
    assert manual.d.counters()["transport_errors"] == 1
    manual.assert_idle()


def test_where_no_answer_can_be_sent_the_transfer_is_lost(rig):
    rig.network.broken[rig.d.endpoint.agent_name, rig.p.endpoint.agent_name] = math.inf
    rig.begin()
    rig.run()
    assert rig.said("d", "receive_failed") == [("r", "peer_lost")]


def replace_ids(command: OpenReceive) -> OpenReceive:
    return replace(command, transfer_id=b"transfer-0000002", nonce=0xBEEF)


def test_a_chunk_may_come_before_its_ticket(rig):
    rig.open_send()
    rig.compute()
    rig.step("p")
    rig.pump()
    assert rig.d.counters()["unanswered"] == 4
    rig.open_receive()
    rig.run()
    assert rig.completed == ["r"]
    assert rig.error() == 0
    rig.assert_idle()


def test_a_chunk_whose_ticket_never_comes_is_refused(rig):
    rig.open_send()
    rig.compute()
    rig.step("p")
    rig.pump()
    rig.now += SETTINGS.stall_timeout_s / 2 + 1
    rig.run(3)
    assert rig.said("p", "send_failed") == [(ID, "discarded")]
    assert rig.d.counters()["foreign"] == 4
    rig.assert_idle()


def test_a_silent_sender_is_reported_and_its_late_chunks_change_nothing(manual):
    manual.begin()
    manual.step("p")
    manual.pump()
    manual.now += SETTINGS.stall_timeout_s + 1
    manual.pump()
    manual.step("p")
    manual.step("d")
    assert manual.said("d", "receive_failed") == [("r", "stalled")]
    assert manual.said("p", "send_failed") == [(ID, "stalled")]
    assert manual.p.counters()["slots_quarantined"] == 4
    manual.d.apply([AbandonReceive("r", "test")])
    manual.views["d"].cache.fill_(3.0)  # the blocks belong to somebody else
    for write in list(manual.network.pending):
        manual.network.deliver(write)
    manual.run(3)
    assert (manual.views["d"].cache == 3.0).all()
    assert manual.d.counters()["late"] == 4
    assert manual.completed == ["r"]
    manual.assert_idle()


def test_a_replayed_notification_changes_nothing(rig):
    rig.begin()
    spied: list[tuple[str, bytes]] = []
    notifications = rig.network.agents["d-0-1"].notifications
    rig.step("p")
    rig.p.pump_once()
    spied += notifications
    rig.pump()
    notifications.extend(spied)
    rig.run(10)
    notifications.extend(spied)
    rig.run()
    counters = rig.d.counters()
    assert (counters["replays"], counters["late"]) == (4, 4)
    assert rig.completed == ["r"]
    assert rig.error() == 0
    rig.assert_idle()


def test_an_intact_chunk_of_an_older_transfer_in_the_slot_is_not_taken_for_the_announced_one(manual):
    endpoint = manual.d.endpoint
    old_id, old_nonce = b"transfer-0000000", 77
    manual.views["p"].fill(P_BLOCKS, 99, tokens=TOKENS)
    manual.d.apply([OpenReceive("old", old_id, old_nonce, "p", 0, TOKENS, D_BLOCKS)])
    manual.p.apply([OpenSend(old_id, old_nonce, "d", 0, TOKENS, "raw"), Computed(old_id, TOKENS, P_BLOCKS)])
    manual.step("p")
    manual.p.pump_once()
    late = manual.network.pending[0]
    manual.network.deliver(late)
    slot = manual.network.agents["d-0-1"].memory(late.remote_address, endpoint.slot_bytes)
    old_chunk = slot.clone()
    manual.p.apply([DropSend(old_id, "test")])
    manual.d.apply([AbandonReceive("old", "test")])
    manual.network.manual = False
    for write in list(manual.network.pending):
        manual.network.deliver(write)
    manual.run()
    manual.network.manual = True
    manual.begin()
    manual.step("p")
    manual.p.pump_once()
    write = next(write for write in manual.network.pending if write.remote_address == late.remote_address)
    assert write.nbytes == late.nbytes
    manual.network.deliver(write)
    slot.copy_(old_chunk)  # the old write lands once more, behind the new one
    manual.d.pump_once()
    assert manual.d.counters()["nacks"] == 1
    manual.network.manual = False
    for write in list(manual.network.pending):
        manual.network.deliver(write)
    manual.run()
    assert manual.completed == ["old", "r"]
    assert manual.error() == 0
    manual.assert_idle()


def test_a_replayed_answer_frees_nobody_elses_slot(manual):
    manual.begin()
    manual.step("p")
    manual.pump()
    for write in list(manual.network.pending):
        manual.network.deliver(write)
    manual.d.pump_once()
    answers = list(manual.network.agents["p-0-1"].notifications)
    manual.p.pump_once()
    manual.step("p")
    manual.p.pump_once()
    assert manual.p.counters()["slots_in_use"] == 3
    manual.network.agents["p-0-1"].notifications.extend(answers)
    manual.p.pump_once()
    manual.step("p")
    counters = manual.p.counters()
    assert (counters["stale_answers"], counters["slots_in_use"]) == (4, 3)
    manual.network.manual = False
    for write in list(manual.network.pending):
        manual.network.deliver(write)
    manual.run()
    assert manual.completed == ["r"]
    manual.assert_idle()


def test_another_peer_cannot_write_into_a_transfer(rig):
    rig.open_receive()
    stranger = rig.network.transport("x-0-1")
    endpoint = replace(rig.p.endpoint, agent_name="x-0-1", agent_metadata=b"x-0-1")
    rig.d.apply([AddPeer("x", 1, (endpoint,), 16, 4, receives=True)])
    rig.pump()
    stranger.add_peer(b"d-0-1")
    for slot, nonce in [(0, NONCE), (4, NONCE), (65535, NONCE)]:
        stranger.notify("d-0-1", Notification(Kind.CHUNK, slot, 0, 0, nonce, 4000).pack())
    stranger.notify("d-0-1", b"rubbish")
    rig.pump()
    assert [parse_notification(message).kind for _, message in stranger.poll()] == [Kind.DISCARD]
    counters = rig.d.counters()
    assert (counters["foreign"], counters["bad_slots"], counters["unparsable"]) == (1, 2, 1)
    rig.open_send()
    rig.compute()
    rig.run()
    assert rig.completed == ["r"]
    assert rig.error() == 0


def test_without_a_private_buffer_a_chunk_waits_unanswered(rig):
    rig.begin()
    for _ in range(5):
        rig.step("p")
        rig.pump()
    counters = rig.d.counters()
    assert (counters["private_buffers_in_use"], counters["unanswered"]) == (4, 3)
    assert rig.p.counters()["slots_in_use"] == 3
    rig.now += SETTINGS.stall_timeout_s - 1
    rig.pump()
    rig.now += 2
    rig.pump()
    rig.step("d")
    assert rig.said("d", "receive_failed") == [], "it is D that is slow"


def test_a_transfer_whose_slots_are_taken_by_others_that_wait_is_not_stalled(rig):
    """All of the peer's slots hold chunks of the first one; the second one's sender cannot send."""
    rig.begin()
    for _ in range(5):
        rig.step("p")
        rig.pump()
    assert rig.d.counters()["unanswered"] == 3
    rig.d.apply([OpenReceive("second", b"transfer-0000002", 0xBEEF, "p", 0, TOKENS, tuple(range(20, 39)))])
    rig.pump()
    rig.now += SETTINGS.stall_timeout_s + 1
    rig.d.pump_once()
    rig.step("d")
    assert rig.said("d", "receive_failed") == []


def test_more_is_scattered_in_a_long_step():
    """A share of it, where a fixed time would leave a busy engine's cache to fill ever more slowly."""
    scattered = {}
    for step_s in (0.001, 1.0):
        rig = Rig()
        rig.begin()
        for _ in range(5):
            rig.step("p")
            rig.pump()
        rig.d.apply([])
        rig.now += step_s
        rig.tick_s = 0.001
        rig.d.after_forward(computed=True)
        scattered[step_s] = rig.d.counters()["chunks_received"]
    assert scattered[1.0] > scattered[0.001]


@pytest.mark.parametrize("survivor", ["p", "d"])
def test_a_new_epoch_fails_what_the_old_one_owed(survivor):
    rig = Rig()
    rig.begin()
    rig.step("p")
    rig.pump()
    rig.restart("d" if survivor == "p" else "p")
    rig.run(3)
    if survivor == "p":
        assert [one for one, _ in rig.said("p", "send_failed")] == [ID]
    else:
        assert rig.said("d", "receive_failed") == [("r", "peer_restarted")]
        rig.d.apply([AbandonReceive("r", "test")])
    other, nonce = b"transfer-0000002", 5
    rig.d.apply([OpenReceive("r2", other, nonce, "p", 0, TOKENS, D_BLOCKS)])
    rig.views["p"].fill(P_BLOCKS, 1, tokens=TOKENS)
    rig.p.apply([OpenSend(other, nonce, "d", 0, TOKENS, "raw"), Computed(other, TOKENS, P_BLOCKS)])
    rig.run()
    assert rig.completed[-1] == "r2"
    assert rig.error() == 0
    rig.assert_idle()


def test_a_removed_peer_is_lost_to_both_directions(rig):
    rig.begin()
    rig.step("p")
    rig.pump()
    rig.p.apply([RemovePeer("d")])
    rig.d.apply([RemovePeer("p")])
    rig.run(3)
    assert rig.said("p", "send_failed") == [(ID, "peer_removed")]
    assert rig.said("d", "receive_failed") == [("r", "peer_removed")]
    rig.p.apply([OpenSend(b"transfer-0000003", 9, "d", 0, TOKENS, "raw")])
    rig.step("p")
    assert rig.said("p", "send_failed")[1:] == [(b"transfer-0000003", "peer_lost")]
    rig.d.apply([AbandonReceive("r", "test")])
    rig.run(3)
    rig.assert_idle()


RELEASE = ReleaseWhenStaged(ID, "p-request")


def test_blocks_are_released_when_staged_not_when_acknowledged(manual):
    manual.begin()
    manual.p.apply([RELEASE])
    manual.step("p")
    manual.pump()
    assert manual.released == [], "4 slots are not enough for 7 chunks"
    for write in list(manual.network.pending):
        manual.network.deliver(write)
    manual.pump()
    manual.step("p")
    manual.pump()
    assert manual.released == ["p-request"]
    assert len(manual.network.pending) == 3
    manual.network.manual = False
    for write in list(manual.network.pending):
        manual.network.deliver(write)
    manual.run()
    assert manual.released == ["p-request"]
    manual.assert_idle()


@pytest.mark.parametrize(
    ("before", "after", "failed"),
    [
        pytest.param([], [], [], id="a transfer nobody ever opened"),
        pytest.param(["compute"], [DropSend(ID, "test")], [], id="held, then dropped"),
        pytest.param(["open", "compute"], [DropSend(ID, "test")], [], id="dropped under way"),
        pytest.param(["open", "half"], [], [(ID, "incomplete")], id="its request ended half computed"),
        pytest.param(["half", "run"], ["open"], [(ID, "incomplete")], id="held, opened, but half computed"),
    ],
)
def test_blocks_are_released_exactly_once_when_nobody_wants_them(rig, before, after, failed):
    actions = {"open": rig.open_send, "compute": rig.compute, "half": lambda: rig.compute(50), "run": rig.run}
    for action in before:
        actions[action]()
    rig.p.apply([RELEASE])
    for action in after:
        rig.p.apply([action]) if isinstance(action, DropSend) else actions[action]()
    rig.open_receive()
    rig.run()
    rig.p.apply([Computed(ID, TOKENS, P_BLOCKS)])  # too late: nothing begins anew
    rig.run(3)
    assert rig.released == ["p-request"]
    assert rig.said("p", "send_failed") == failed
    assert rig.p.counters()["open_sends"] == 0


def test_a_cache_that_raises_costs_its_transfer_only(rig, caplog):
    rig.begin()
    scatter, gather = rig.views["d"].scatter, rig.views["p"].gather

    def broken(*_args):
        raise RuntimeError("broken cache")

    rig.views["d"].scatter = broken
    rig.run(5)
    assert rig.said("d", "receive_failed") == [("r", "bad_chunk")]
    rig.views["d"].scatter = scatter
    rig.d.apply([AbandonReceive("r", "test")])
    rig.run(5)
    rig.views["p"].gather = broken
    rig.p.apply([OpenSend(b"transfer-0000003", 9, "d", 0, 9, "raw"), Computed(b"transfer-0000003", 9, P_BLOCKS)])
    rig.run(5)
    assert rig.said("p", "send_failed")[-1] == (b"transfer-0000003", "gather_failed")
    rig.views["p"].gather = gather
    assert "broken cache" in caplog.text
    rig.assert_idle()


def test_scattering_respects_its_budget_section_by_section(rig):
    rig.begin()
    rig.step("p")
    rig.pump()
    calls = []
    scatter = rig.views["d"].scatter

    def slow(layer, side, *args):
        calls.append((layer, side))
        rig.now += 0.001
        scatter(layer, side, *args)

    rig.views["d"].scatter = slow
    rig.d.after_forward(computed=True)
    assert calls == [(0, 0), (0, 1)], "2 ms"
    rig.d.after_forward(computed=True)
    assert calls == [(0, 0), (0, 1), (1, 0), (1, 1)], "and goes on where it stopped"
    assert rig.d.take_completions() == Completions()


def test_a_slot_too_small_for_one_token_is_a_start_up_error():
    wide = KVGeometry(layers=80, kv_heads=8, head_dim=128, dtype="bfloat16")
    with pytest.raises(ConfigError, match=r"one token takes 327920 bytes in a slot of 4096"):
        DataPlane(
            engine="p",
            epoch=1,
            rank=0,
            view=DenseView(wide, blocks=1, block_size=16),
            transfer=SETTINGS,
            transport=MemoryNetwork().transport("p-0-1"),
            threaded=False,
        )


def test_a_peer_whose_ranks_cannot_be_matched_is_said_loudly_and_not_used(rig, caplog):
    endpoints = tuple(replace(rig.d.endpoint, rank=rank) for rank in range(3))
    rig.p.apply([AddPeer("d2", 1, endpoints, 0, 4, receives=False)])
    assert "2 KV heads cannot be split over 3 ranks" in caplog.text
    rig.p.apply([OpenSend(ID, NONCE, "d2", 0, TOKENS, "raw")])
    rig.step("p")
    assert rig.said("p", "send_failed") == [(ID, "peer_lost")]


def test_the_thread_does_the_same_and_ends():
    rig = Rig()
    threaded = {}
    for engine in "pd":
        rig.planes[engine].close()
        rig.epochs[engine] = 2
        threaded[engine] = DataPlane(
            engine=engine,
            epoch=2,
            rank=0,
            view=rig.views[engine],
            transfer=SETTINGS,
            transport=rig.network.transport(agent_name(engine, 0, 2)),
        )
    rig.planes = threaded
    for engine, other in (("p", "d"), ("d", "p")):
        rig.planes[engine].apply([AddPeer(other, 2, (rig.planes[other].endpoint,), 8, 4, receives=engine == "d")])
    rig.begin()
    for _ in range(200_000):
        rig.step("p")
        rig.step("d")
        if rig.completed and rig.said("p", "sent"):
            break
    assert rig.completed == ["r"]
    assert rig.error() == 0
    assert rig.p.counters()["threads"] == 1
    for plane in threaded.values():
        plane.close()
        assert plane.counters()["threads"] == 0
