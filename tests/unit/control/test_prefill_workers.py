"""What a decode engine knows of its prefill workers, with a hand-driven clock and no sockets."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from unit.control.virtual import VirtualLoop

from disagg_plugin.config import load_settings
from disagg_plugin.control.channel import ChannelState
from disagg_plugin.control.decode_port import OfferCall
from disagg_plugin.control.digest_stream import pack
from disagg_plugin.control.events import PeerJoined, PeerLeft, PrefillFailed
from disagg_plugin.control.messages import (
    PROTOCOL_VERSION,
    Accepted,
    AnyMessage,
    DigestPart,
    DigestRequest,
    Hello,
    LoadReport,
    ModelIdentity,
    Offer,
    PrefillSpeed,
    Refused,
    Sent,
    Welcome,
)
from disagg_plugin.control.prefill_workers import LEAVE_AFTER_S, PrefillWorkers
from disagg_plugin.kv.commands import RankEndpoint
from disagg_plugin.kv.geometry import KVGeometry
from disagg_policies.codec import by_link
from disagg_policies.placement import eligible, why_nobody
from disagg_policies.snapshots import PrefillModel, WorkerState

GEOMETRY = KVGeometry(layers=4, kv_heads=2, head_dim=64, dtype="bfloat16")
MODEL = ModelIdentity("config", "weights", "tiny")
HELLO = Hello(PROTOCOL_VERSION, (), "d:1", 5, MODEL, GEOMETRY, (RankEndpoint(0, "agent", b"", 0, 1 << 20, 24),), 0, 8)
WELCOME = Welcome(
    PROTOCOL_VERSION, (), "p", 1, MODEL, GEOMETRY, HELLO.endpoints, max_prompt_tokens=8_000, prefill_queue_max=8
)
REPORT = LoadReport(1, 2, 3_000, 4, 0.5, 8_000.0, PrefillSpeed(0.01, 1e-4, 1e-9, 20, 0.1))
A, B = "10.0.0.1:5600", "10.0.0.2:5600"


class FakeClient:
    """One prefill worker's end of the side channel, played by the test."""

    def __init__(self, **details: Any) -> None:
        self.host: str = details["host"]
        self.deliver: Callable[[AnyMessage], None] = details["on_message"]
        self.enter: Callable[[ChannelState, str], None] = details["on_state"]
        self.sent: list[AnyMessage] = []
        self.closed = False

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        self.closed = True

    def send(self, message: AnyMessage) -> bool:
        self.sent.append(message)
        return True

    def of(self, kind: type) -> list[Any]:
        return [message for message in self.sent if isinstance(message, kind)]


class Bench:
    """One decode engine's view of its workers."""

    def __init__(
        self,
        workers: Sequence[object] = ("http://10.0.0.1:8000",),
        split_policy: dict[str, object] | None = None,
        **transfer: object,
    ) -> None:
        self.io = VirtualLoop()
        self.clients: dict[str, FakeClient] = {}
        self.addresses: Sequence[str] = ()
        settings = load_settings(
            {
                "role": "decode",
                "prefill_workers": list(workers),
                "side_channel": {"host": "0.0.0.0", "insecure": True},
                "transfer": {"offer_timeout_s": 5.0, **transfer},
                "split_policy": split_policy or {},
            }
        )
        self.side = PrefillWorkers(
            settings,
            HELLO,
            make_client=self.make_client,  # type: ignore[arg-type]
            post=self.io.post,
            clock=self.io.clock,
            resolve=self.resolve,
        )

    def make_client(self, **details: Any) -> FakeClient:
        client = self.clients[details["host"]] = FakeClient(**details)
        return client

    async def resolve(self, host: str) -> Sequence[str]:
        return self.addresses

    async def listed(self, *addresses: str) -> None:
        """The name stands for these addresses now, and was looked up."""
        self.addresses = addresses
        await self.side._directory.look()
        await self.side._apply(self.side._directory.known())

    def meet(self, host: str = "10.0.0.1", epoch: int = 1, *, report: bool = True) -> FakeClient:
        client = self.clients[host]
        client.enter(ChannelState.UP, "connected")
        client.deliver(msgspec.structs.replace(WELCOME, epoch=epoch))
        if report:
            client.deliver(msgspec.structs.replace(REPORT, epoch=epoch))
        return client

    def row(self, name: str = A) -> WorkerState:
        return next(row for row in self.side.workers() if row.worker == name)

    def codec(self, name: str = A) -> object:
        workers = self.side.snapshot()["workers"]
        assert isinstance(workers, dict)
        return workers[name]["codec"]

    def state(self, name: str = A) -> object:
        workers = self.side.snapshot()["workers"]
        assert isinstance(workers, dict)
        return workers[name]["state"]

    def asked(self) -> list[str]:
        """Who would be asked now."""
        rows = self.side.workers()
        return [rows[i].worker for i in eligible(1_000, rows, now_s=self.io.now_s)]

    def offer(self, number: int = 1, *workers: str, tokens: int = 1_000) -> bytes:
        transfer_id = bytes([number]) * 16
        self.side.offer(OfferCall(transfer_id, number, workers or (A,), tuple(range(tokens)), 0, ()))
        return transfer_id

    async def settle(self) -> None:
        """Let the I/O thread do what was posted to it, and its tasks run until they wait."""
        for _ in range(5):
            self.io.run_posted()
            await asyncio.sleep(0)

    def failures(self) -> list[str]:
        return [event.reason for event in self.side.drain() if isinstance(event, PrefillFailed)]


def run(story: Callable[[Bench], Awaitable[None]], bench: Bench | None = None) -> None:
    """Play a story on a bench whose I/O thread is this test's loop."""
    bench = bench or Bench()

    async def play() -> None:
        assert bench is not None
        await bench.side.start()
        try:
            await story(bench)
        finally:
            await bench.side.close()

    asyncio.run(play())


def test_a_row_says_what_the_worker_reports_and_what_the_link_costs() -> None:
    async def story(bench: Bench) -> None:
        assert bench.asked() == []
        client = bench.meet()
        row = bench.row()
        assert (row.queued_requests, row.queued_prefill_tokens, row.running_requests) == (2, 3_000, 4)
        assert (row.kv_usage, row.prefill_tokens_per_s, row.reported_s) == (0.5, 8_000.0, bench.io.now_s)
        assert row.prefill == PrefillModel(0.01, 1e-4, 1e-9, 20, 0.1)
        assert row.link.wire_bytes_per_token == 4 * 2 * 2 * 66, "int8 between hosts"
        client.deliver(Sent(b"id", wire_bytes=2_000_000, wire_s=0.01))
        bench.side.landed(A, wire_bytes=2_000_000, tokens=1_000)
        bench.side.saw_overhead(A, seconds=9.0)  # the first one also wires the data plane up: it does not count
        bench.side.saw_overhead(A, seconds=0.02)
        await bench.settle()
        row = bench.row()
        assert (row.link.samples, row.link.wire_bytes_per_token) == (1, 2_000.0)
        assert row.overhead_s == pytest.approx(0.02)

    run(story)


def test_the_codec_policy_is_asked_again_whenever_the_wire_was_measured() -> None:
    """A codec of 1 GB/s on both sides: int8 pays on a wire of 100 MB/s, and not on one of 10 GB/s."""

    async def story(bench: Bench) -> None:
        bench.side.ask_for_codecs(lambda _, choices: by_link(choices).name)
        fast_codec = (replace(HELLO.endpoints[0], encode_bytes_per_s=1e9, decode_bytes_per_s=1e9),)
        client = bench.clients["10.0.0.1"]
        client.enter(ChannelState.UP, "connected")
        client.deliver(msgspec.structs.replace(WELCOME, endpoints=fast_codec))
        client.deliver(REPORT)
        assert bench.codec() == "raw", "not measured yet"
        for _ in range(10):
            client.deliver(Sent(b"id", wire_bytes=10_000_000, wire_s=0.1))
        assert bench.codec() == "int8"
        assert bench.row().link.wire_bytes_per_token == 4 * 2 * 2 * 66
        for _ in range(60):
            client.deliver(Sent(b"id", wire_bytes=10_000_000, wire_s=0.001))
        assert bench.codec() == "raw"
        assert bench.row().link.wire_bytes_per_token == 4 * 2 * 2 * 64 * 2

    run(story)


@pytest.mark.parametrize(
    ("transfer", "codec"),
    [
        pytest.param({"codec": "int8c"}, "int8c", id="the settings say it"),
        pytest.param({}, "int8", id="the worker did not measure its codec"),
    ],
)
def test_the_codec_policy_is_not_asked_where_there_is_nothing_to_choose(transfer: dict[str, str], codec: str) -> None:
    async def story(bench: Bench) -> None:
        bench.side.ask_for_codecs(lambda *_: pytest.fail("asked"))
        client = bench.meet()
        client.deliver(Sent(b"id", wire_bytes=10_000_000, wire_s=0.1))
        assert bench.codec() == codec

    run(story, Bench(**transfer))


def test_a_worker_that_once_took_long_is_not_avoided_for_ever() -> None:
    """The first transfers wire the agents up; nobody would measure again what nobody uses."""

    async def story(bench: Bench) -> None:
        bench.meet()
        bench.side.landed(A, wire_bytes=1_000, tokens=10)
        bench.side.saw_overhead(A, seconds=9.0)  # the first one does not count
        bench.side.saw_overhead(A, seconds=2.5)
        await bench.settle()
        assert bench.row().overhead_s == pytest.approx(2.5)
        bench.io.pass_s(100.0)
        bench.meet()
        assert bench.row().overhead_s < 0.01
        bench.side.landed(A, wire_bytes=1_000, tokens=10)
        bench.side.saw_overhead(A, seconds=2.5)
        await bench.settle()
        assert bench.row().overhead_s == pytest.approx(2.5)

    run(story)


def test_reports_from_an_earlier_process_are_not_believed() -> None:
    async def story(bench: Bench) -> None:
        client = bench.meet(epoch=2)
        client.deliver(msgspec.structs.replace(REPORT, epoch=1, queued_requests=99))
        assert bench.row().queued_requests == 2

    run(story)


def test_what_was_offered_counts_until_a_report_counts_it() -> None:
    async def story(bench: Bench) -> None:
        client = bench.meet()
        transfer_id = bench.offer()
        row = bench.row()
        assert (row.in_flight_requests, row.in_flight_tokens) == (1, 1_000), "at once: the next decision is now"
        await bench.settle()
        assert bench.row().in_flight_requests == 1
        client.deliver(REPORT)
        assert bench.row().in_flight_requests == 1, "the report was sent before the offer was answered"
        client.deliver(Accepted(transfer_id, 0.0))
        assert bench.row().in_flight_requests == 1
        client.deliver(REPORT)
        assert bench.row().in_flight_requests == 0
        await bench.settle()

    run(story)


@pytest.mark.parametrize("end", ["refused", "cancelled", "cancelled before it was sent", "timeout", "lost"])
def test_what_the_worker_does_not_have_is_not_counted(end: str) -> None:
    async def story(bench: Bench) -> None:
        client = bench.meet()
        transfer_id = bench.offer()
        if end != "cancelled before it was sent":
            await bench.settle()
        if end == "refused":
            client.deliver(Refused(transfer_id, "queue_full"))
        elif end.startswith("cancelled"):
            bench.side.cancel(transfer_id, "", "aborted")
        elif end == "lost":
            client.enter(ChannelState.DOWN, "gone")
        elif end == "timeout":
            await asyncio.sleep(0.1)  # the offer's own time-out, in real time
        await bench.settle()
        assert bench.row().in_flight_requests == 0
        assert bench.side.snapshot()["calls"] == 0

    run(story, Bench(offer_timeout_s=0.05 if end == "timeout" else 5.0))


def test_decisions_of_one_step_know_of_each_other() -> None:
    async def story(bench: Bench) -> None:
        bench.meet("10.0.0.1")
        bench.meet("10.0.0.2")
        for number, worker in enumerate((A, B, A), start=1):
            bench.offer(number, worker, tokens=500)
        assert [row.in_flight_tokens for row in bench.side.workers()] == [1_000, 500]
        await bench.settle()
        assert [row.in_flight_tokens for row in bench.side.workers()] == [1_000, 500], "counted once"

    run(story, Bench(["http://10.0.0.1:8000", "http://10.0.0.2:8000"]))


def test_a_worker_that_drains_is_not_asked_until_it_says_otherwise() -> None:
    async def story(bench: Bench) -> None:
        client = bench.meet()
        assert (bench.asked(), bench.state()) == ([A], "healthy")
        client.deliver(msgspec.structs.replace(REPORT, draining=True))
        assert (bench.asked(), bench.state(), bench.row().draining) == ([], "draining", True)
        assert why_nobody(1_000, bench.side.workers(), now_s=bench.io.now_s) == "draining"
        client.deliver(REPORT)
        assert (bench.asked(), bench.state(), bench.row().draining) == ([A], "healthy", False)

    run(story)


def test_a_refusal_says_it_as_well_and_is_no_failure() -> None:
    async def story(bench: Bench) -> None:
        client = bench.meet()
        transfer_id = bench.offer()
        await bench.settle()
        client.deliver(Refused(transfer_id, "draining"))
        await bench.settle()
        assert bench.failures() == ["refused_draining"]
        assert (bench.asked(), bench.state()) == ([], "draining")
        client.deliver(REPORT)
        assert bench.asked() == [A], "it was not left alone for a while, as one that fails is"

    run(story)


def test_a_worker_that_has_drained_and_ended_comes_back_as_any_other() -> None:
    async def story(bench: Bench) -> None:
        client = bench.meet()
        client.deliver(msgspec.structs.replace(REPORT, draining=True))
        client.enter(ChannelState.DOWN, "gone")
        assert bench.state() == "connecting"
        bench.meet(epoch=2)
        assert (bench.asked(), bench.state()) == ([A], "healthy")

    run(story)


def test_a_worker_whose_report_is_old_is_suspect_and_not_asked() -> None:
    async def story(bench: Bench) -> None:
        client = bench.meet()
        bench.io.pass_s(0.9)
        assert (bench.asked(), bench.state()) == ([A], "healthy")
        bench.io.pass_s(0.2)
        assert (bench.asked(), bench.state()) == ([], "suspect")
        client.deliver(REPORT)
        assert (bench.asked(), bench.state()) == ([A], "healthy")

    run(story)


def test_a_report_that_we_could_not_have_read_is_not_old() -> None:
    """Our own thread stood still; reports of the meantime wait to be read."""

    async def story(bench: Bench) -> None:
        bench.meet()
        bench.side.sweep()
        bench.io.pass_s(0.5)
        bench.side.sweep()
        bench.io.pass_s(30.0)
        bench.side.sweep()
        assert (bench.asked(), bench.state()) == ([A], "healthy")
        for _ in range(2):  # nothing came, although it was looked for
            bench.io.pass_s(0.5)
            bench.side.sweep()
        assert (bench.asked(), bench.state()) == ([], "suspect")

    run(story)


def test_how_old_a_report_may_be_is_a_setting() -> None:
    async def story(bench: Bench) -> None:
        bench.meet()
        bench.io.pass_s(1.9)
        assert bench.state() == "healthy"
        bench.io.pass_s(0.2)
        assert bench.state() == "suspect"

    run(story, Bench(split_policy={"suspect_after_s": 2.0}))


def test_a_connected_worker_that_never_reported_is_not_asked() -> None:
    async def story(bench: Bench) -> None:
        bench.meet(report=False)
        assert (bench.asked(), bench.state()) == ([], "suspect")

    run(story)


def test_a_killed_worker_is_left_at_once_and_comes_back_with_its_next_process() -> None:
    async def story(bench: Bench) -> None:
        client = bench.meet()
        client.enter(ChannelState.DOWN, "connection lost")
        assert (bench.asked(), bench.state()) == ([], "connecting")
        bench.meet(epoch=2)
        assert bench.asked() == [A]
        kinds = [type(event) for event in bench.side.drain()]
        assert kinds == [PeerJoined, PeerLeft, PeerJoined]

    run(story)


def test_a_worker_that_hangs_is_suspect_first_and_lost_later() -> None:
    async def story(bench: Bench) -> None:
        client = bench.meet()
        for _ in range(5):
            bench.io.pass_s(0.5)
            bench.side.sweep()
        assert (bench.asked(), bench.state()) == ([], "suspect")
        for _ in range(3):
            bench.io.pass_s(0.5)
            bench.side.sweep()
        assert bench.state() == "silent"
        before = len(client.of(Hello))
        bench.side.sweep()
        assert len(client.of(Hello)) == before + 1, "introduced to again"

    run(story)


def test_a_worker_that_fails_is_backed_off_and_probed_by_one_prompt() -> None:
    async def story(bench: Bench) -> None:
        client = bench.meet()
        bench.side.failed(A, "stalled")
        bench.side.failed(A, "stalled")  # an older one
        await bench.settle()
        assert (bench.asked(), bench.state()) == ([], "backed_off")
        bench.io.pass_s(0.7)
        client.deliver(REPORT)
        assert bench.asked() == [A]
        transfer_id = bench.offer(1)
        bench.offer(2)  # decided in the same step
        await bench.settle()
        assert len(client.of(Offer)) == 1
        assert bench.failures() == ["backed_off"]
        client.deliver(REPORT)
        assert bench.asked() == [], "while the probe is under way"
        client.deliver(Accepted(transfer_id, 0.0))
        bench.side.landed(A, wire_bytes=1_000, tokens=10)
        await bench.settle()
        assert (bench.asked(), bench.state()) == ([A], "healthy")

    run(story)


def test_offers_without_an_answer_back_a_worker_off_twice_as_long_each_time() -> None:
    async def story(bench: Bench) -> None:
        client = bench.meet()
        pauses_s = []
        for number in range(1, 4):
            bench.offer(number)
            await bench.settle()
            await asyncio.sleep(0.1)  # the offer's own time-out, in real time
            await bench.settle()
            assert bench.failures() == ["offer_timeout"]
            began_s = bench.io.now_s
            while not bench.asked():
                bench.io.pass_s(0.05)
                client.deliver(REPORT)
            pauses_s.append(bench.io.now_s - began_s)
        assert 0.3 <= pauses_s[0] <= 0.7
        assert pauses_s[2] > 2 * pauses_s[0]

    run(story, Bench(offer_timeout_s=0.05))


def test_a_full_queue_is_no_failure_and_the_second_worker_is_asked() -> None:
    async def story(bench: Bench) -> None:
        first, second = bench.meet("10.0.0.1"), bench.meet("10.0.0.2")
        transfer_id = bench.offer(1, A, B)
        await bench.settle()
        first.deliver(Refused(transfer_id, "queue_full"))
        await bench.settle()
        assert len(second.of(Offer)) == 1
        assert [row.in_flight_requests for row in bench.side.workers()] == [0, 1]
        second.deliver(Refused(transfer_id, "queue_full"))
        await bench.settle()
        assert bench.failures() == ["refused_queue_full"]
        assert bench.asked() == [A, B]

    run(story, Bench(["http://10.0.0.1:8000", "http://10.0.0.2:8000"]))


def test_a_restart_forgives() -> None:
    async def story(bench: Bench) -> None:
        client = bench.meet()
        bench.side.failed(A, "stalled")
        await bench.settle()
        client.enter(ChannelState.DOWN, "connection lost")
        bench.meet(epoch=1)
        assert bench.state() == "backed_off", "the same process"
        bench.meet(epoch=2)
        assert bench.asked() == [A]

    run(story)


def test_prefixes_are_known_in_the_order_of_the_rows() -> None:
    async def story(bench: Bench) -> None:
        bench.meet("10.0.0.1")
        second = bench.meet("10.0.0.2")
        second.deliver(msgspec.structs.replace(REPORT, digest=DigestPart(1, True, pack([7, 8]), b"")))
        bench.side.workers()
        assert bench.side.overlap_tokens([7, 8, 9]) == (0, 256)
        second.deliver(msgspec.structs.replace(REPORT, digest=DigestPart(2, False, b"", pack([8]))))
        assert bench.side.overlap_tokens([7, 8, 9]) == (0, 128)
        second.enter(ChannelState.DOWN, "gone")
        bench.side.workers()
        assert bench.side.overlap_tokens([7, 8, 9]) == (0, 0)

    run(story, Bench(["http://10.0.0.1:8000", "http://10.0.0.2:8000"]))


def test_a_missing_part_of_the_digest_is_asked_for_once_a_second() -> None:
    async def story(bench: Bench) -> None:
        client = bench.meet()
        client.deliver(msgspec.structs.replace(REPORT, digest=DigestPart(1, True, pack([7]), b"")))
        for sequence in (3, 4, 5):
            client.deliver(msgspec.structs.replace(REPORT, digest=DigestPart(sequence, False, pack([9]), b"")))
        assert len(client.of(DigestRequest)) == 1
        bench.io.pass_s(1.0)
        client.deliver(msgspec.structs.replace(REPORT, digest=DigestPart(6, False, b"odd", b"")))
        assert len(client.of(DigestRequest)) == 2
        client.deliver(msgspec.structs.replace(REPORT, digest=DigestPart(9, True, pack([5]), b"")))
        bench.side.workers()
        assert bench.side.overlap_tokens([5]) == (128,)
        assert bench.side.overlap_tokens([7]) == (0,)

    run(story)


def test_a_worker_that_measured_nothing_is_taken_for_one_like_us() -> None:
    async def story(bench: Bench) -> None:
        bench.side.assume(PrefillModel(0.004, 5e-5, 1e-9, samples=300))
        client = bench.meet(report=False)
        client.deliver(msgspec.structs.replace(REPORT, prefill=PrefillSpeed(0.005, 1e-3, 2e-8, 0, 0.0)))
        assert bench.row().prefill.per_token_s == 5e-5
        client.deliver(REPORT)
        assert bench.row().prefill.per_token_s == 1e-4

    run(story)


def test_addresses_of_a_name_come_and_go_without_disturbing_others() -> None:
    async def story(bench: Bench) -> None:
        await bench.listed("10.0.0.1", "10.0.0.2")
        first = bench.meet("10.0.0.1")
        second = bench.meet("10.0.0.2")
        await bench.listed("10.0.0.2", "10.0.0.3")
        third = bench.meet("10.0.0.3")
        assert bench.asked() == [B, "10.0.0.3:5600"]
        assert bench.state(A) == "leaving"
        assert not first.closed, "what it has begun may end"
        assert (len(second.of(Hello)), second.closed) == (1, False)
        first_slots = [client.of(Hello)[0].region_first_slot for client in (first, second, third)]
        assert first_slots == [0, 8, 16]
        for _ in range(int(LEAVE_AFTER_S) + 2):
            bench.io.pass_s(1.0)
            for client in (first, second, third):
                client.deliver(REPORT)
            bench.side.sweep()
        await bench.settle()
        assert first.closed
        assert [row.worker for row in bench.side.workers()] == [B, "10.0.0.3:5600"]
        assert [e.peer for e in bench.side.drain() if isinstance(e, PeerLeft) and e.reason == "left"] == [A]

    run(story, Bench(["prefill.svc:8000"]))


def test_an_address_that_comes_back_is_used_again() -> None:
    async def story(bench: Bench) -> None:
        await bench.listed("10.0.0.1", "10.0.0.2")
        first = bench.meet("10.0.0.1")
        await bench.listed("10.0.0.2")
        assert bench.asked() == []
        await bench.listed("10.0.0.1", "10.0.0.2")
        assert bench.asked() == [A]
        assert bench.clients["10.0.0.1"] is first

    run(story, Bench(["prefill.svc:8000"]))


def test_when_the_ring_is_full_it_is_said_once_and_a_region_that_gets_free_is_used(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def story(bench: Bench) -> None:
        hosts = [f"10.0.0.{number}" for number in range(1, 6)]
        await bench.listed(*hosts)
        assert set(bench.clients) == set(hosts[:3])
        assert bench.state("10.0.0.4:5600") == "ring_exhausted"
        await bench.listed(*hosts)
        await bench.listed(*hosts[1:])  # the first was never connected: it goes at once
        assert set(bench.clients) == set(hosts[:4])
        assert len([m for m in caplog.messages if "no ring slots left" in m]) == 1

    run(story, Bench(["prefill.svc:8000"]))
