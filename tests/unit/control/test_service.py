"""Two scheduler processes' control planes over real loopback sockets: handshake, offer, HTTP prompt, ready, cancel."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from disagg_plugin.config import DisaggSettings, load_settings
from disagg_plugin.control import offloads
from disagg_plugin.control.decode_port import Claim, NotYet, PrefillLocally, PromptView
from disagg_plugin.control.decode_side import DecodeSide
from disagg_plugin.control.leaving import LeavingWord
from disagg_plugin.control.load import Load
from disagg_plugin.control.load_reports import HeldPrompt
from disagg_plugin.control.messages import ModelIdentity
from disagg_plugin.control.prefill_side import PrefillSide
from disagg_plugin.control.service import ControlService, EngineFacts, fetch_snapshot
from disagg_plugin.control.standstill import Steps
from disagg_plugin.kv.commands import AddPeer, OpenReceive, OpenSend, RankEndpoint
from disagg_plugin.kv.geometry import KVGeometry
from disagg_plugin.serving.prefix_hash import prefix_hashes
from disagg_policies.placement import eligible
from disagg_policies.snapshots import PrefillModel

GEOMETRY = KVGeometry(layers=4, kv_heads=2, head_dim=64, dtype="float32")
FACTS = EngineFacts(
    model=ModelIdentity("config-a", "weights-a", "tiny"),
    geometry=GEOMETRY,
    endpoints=(RankEndpoint(0, "agent", b"metadata", 4096, 1 << 20, 16),),
    max_prompt_tokens=4_000,
)
PROMPT = PromptView("r1", tuple(range(1_000)), http_fields=(("cache_salt", "s"),))


URGENT = PromptView("r1", tuple(range(1_000)), http_fields=(("cache_salt", "s"),), priority=-1)


class HttpPrefill:
    """A stand-in for the prefill engine's HTTP API: records bodies, answers when told to."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, object]] = []
        self.headers: list[dict[str, str]] = []
        self.arrived = threading.Event()
        self.may_answer = threading.Event()
        self.status = 200
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.headers.append({name.lower(): value for name, value in self.headers.items()})
                outer.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                outer.arrived.set()
                outer.may_answer.wait(10)
                self.send_response(outer.status)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.may_answer.set()
        self.server.shutdown()
        self.server.server_close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def eventually(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    """Wait for another thread's effect."""
    for _ in range(int(within_s / 0.01)):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("not in time")


class Pair:
    """A prefill and a decode control plane, and both roles on top of them."""

    def __init__(
        self,
        http: HttpPrefill,
        prefill_facts: EngineFacts = FACTS,
        queue_max: int = 8,
        word: LeavingWord | None = None,
    ) -> None:
        self.http = http
        self.port = free_port()
        common = {"policy": {"offload": "threshold"}, "transfer": {"offer_timeout_s": 0.5}}
        channel = {"heartbeat_s": 0.1, "peer_timeout_s": 1.0}
        limit = {"split_policy": {"prefill_queue_max": queue_max}}  # prefill enforces its own, whatever decode thinks
        p_settings = load_settings(
            {"role": "prefill", "side_channel": {"port": self.port, **channel}, **limit, **common}
        )
        worker = {"url": http.url, "side_channel": f"127.0.0.1:{self.port}"}
        d_settings = load_settings(
            {
                "role": "decode",
                "side_channel": {"port": 0, **channel},
                "prefill_workers": [worker],
                **common,
            }
        )
        self.p_service = self.service(p_settings, prefill_facts, word)
        self.d_service = self.service(d_settings, FACTS)
        assert self.p_service.prefill is not None
        assert self.d_service.decode is not None
        self.prefill = PrefillSide(p_settings, self.p_service.prefill, ranks=1, kv_capacity_tokens=10_000)
        self.decode = DecodeSide(d_settings, self.d_service.decode, engine="d", kv_capacity_tokens=10_000)

    @staticmethod
    def service(settings: DisaggSettings, facts: EngineFacts, word: LeavingWord | None = None) -> ControlService:
        service = ControlService(settings, facts, snapshot=dict, word=word)
        service.start()
        return service

    def met(self) -> bool:
        """Whether a prompt could be offered now."""
        links = self.d_service.decode
        return links is not None and bool(eligible(1_000, links.workers(), now_s=time.monotonic()))

    def match(self, prompt: PromptView = PROMPT) -> object:
        return self.decode.match(prompt, 0, free_tokens=10_000)

    def offloading(self, prompt: PromptView = PROMPT) -> bytes:
        """Offer the prompt and wait until it arrived over HTTP; the transfer id in it."""
        eventually(self.met)
        assert self.match(prompt) == NotYet()
        assert self.http.arrived.wait(10)
        params = self.http.bodies[-1]["kv_transfer_params"]
        assert isinstance(params, dict)
        return bytes.fromhex(params["disagg"]["transfer_id"])

    def close(self) -> None:
        self.d_service.close()
        self.p_service.close()


@pytest.fixture
def http() -> Iterator[HttpPrefill]:
    server = HttpPrefill()
    yield server
    server.close()


@contextmanager
def running(pair: Pair) -> Iterator[Pair]:
    try:
        yield pair
    finally:
        pair.close()


def test_a_prompt_goes_all_the_way_to_open_on_both_sides(http: HttpPrefill) -> None:
    with running(Pair(http)) as pair:
        transfer_id = pair.offloading()
        body = http.bodies[-1]
        assert (body["prompt"], body["max_tokens"], body["cache_salt"]) == (list(range(1_000)), 1, "s")
        assert body["kv_transfer_params"] == {"disagg": {"transfer_id": transfer_id.hex()}}, "nothing else of ours"
        assert pair.prefill.new_request("p-1", transfer_id, 1_000)
        eventually(lambda: isinstance(pair.match(), Claim))
        pair.decode.allocated("r1", (1, 2), 999)
        joined, opened = pair.decode.step()
        assert isinstance(joined, AddPeer)
        assert joined.receives
        assert isinstance(opened, OpenReceive)
        pair.prefill.scheduled("p-1", 512, [7])
        commands: list[object] = []

        def is_open() -> bool:
            commands.extend(pair.prefill.step())
            return any(isinstance(c, OpenSend) for c in commands)

        eventually(is_open)
        (send,) = [c for c in commands if isinstance(c, OpenSend)]
        assert (send.transfer_id, send.nonce) == (transfer_id, opened.nonce), "the ticket travelled by the side channel"
        assert (send.first_token, send.end_token, send.codec) == (0, 999, "raw")


@pytest.mark.parametrize(("rank", "header"), [(None, None), (0, "0"), (1, "1")])
def test_a_prompt_is_posted_to_the_data_parallel_rank_that_accepted_it(
    http: HttpPrefill, rank: int | None, header: str | None
) -> None:
    with running(Pair(http, replace(FACTS, http_dp_rank=rank))) as pair:
        pair.offloading()
        assert http.headers[-1].get("x-data-parallel-rank") == header


def test_an_engine_that_is_to_leave_hands_back_what_waits_and_is_not_asked_until_it_stays(
    http: HttpPrefill, tmp_path: Path
) -> None:
    word = LeavingWord(tmp_path)
    with running(Pair(http, word=word)) as pair:
        transfer_id = pair.offloading()
        assert pair.prefill.new_request("p-1", transfer_id, 1_000)
        word.say()
        eventually(lambda: not pair.met())
        assert pair.match(PromptView("r2", tuple(range(2_000, 3_000)))) == PrefillLocally("draining")
        eventually(lambda: pair.prefill.step() is not None and pair.prefill.drops["draining"] == 1)
        eventually(lambda: pair.match() == PrefillLocally("draining"))
        assert pair.decode.fallbacks == {"draining": 1}
        assert pair.p_service.figures()["draining"] is True
        word.take_back()
        eventually(pair.met)
        assert pair.match(PromptView("r3", tuple(range(3_000, 4_000)))) == NotYet()


class LookedAt(LeavingWord):
    """Counts how often somebody looks."""

    looks = 0

    @property
    def stands(self) -> bool:
        self.looks += 1
        return super().stands


def test_what_a_signal_has_said_no_word_takes_back(http: HttpPrefill, tmp_path: Path) -> None:
    word = LookedAt(tmp_path)
    with running(Pair(http, word=word)) as pair:
        eventually(pair.met)
        service = pair.p_service.prefill
        assert service is not None
        service.leave(for_good=True)
        eventually(lambda: not pair.met())
        word.say()
        seen = word.looks
        eventually(lambda: word.looks > seen + 2)
        word.take_back()
        seen = word.looks
        eventually(lambda: word.looks > seen + 2)
        assert service.leaving


def test_who_drains_by_word_only_takes_prompts_again_when_it_is_taken_back(http: HttpPrefill, tmp_path: Path) -> None:
    word = LeavingWord(tmp_path)
    with running(Pair(http, word=word)) as pair:
        eventually(pair.met)
        word.say()
        eventually(lambda: not pair.met())
        word.take_back()
        eventually(pair.met)


def test_an_abort_that_is_swallowed_once_ends_the_call_all_the_same(
    http: HttpPrefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    posting, swallowed = threading.Event(), threading.Event()

    async def post(*_: object) -> None:
        posting.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            swallowed.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(offloads, "post_prompt", post)
    with running(Pair(http)) as pair:
        eventually(pair.met)
        assert pair.match() == NotYet()
        assert posting.wait(10)
        pair.decode.finished("r1")
        eventually(lambda: pair.d_service.decode is not None and pair.d_service.decode.snapshot()["calls"] == 0)
        eventually(lambda: pair.prefill.step() is not None and pair.prefill.drops["aborted"] == 1)
    assert swallowed.is_set()


def test_a_full_queue_refuses_without_any_http(http: HttpPrefill) -> None:
    with running(Pair(http)) as pair:
        eventually(pair.met)
        assert pair.p_service.prefill is not None
        pair.p_service.prefill.publish(Load(queued_requests=8), 0.0)
        assert pair.match() == NotYet()
        eventually(lambda: pair.match() == PrefillLocally("refused_queue_full"))
        assert http.bodies == []


def test_an_engine_that_makes_no_steps_hands_back_what_it_has_not_begun_with(http: HttpPrefill) -> None:
    with running(Pair(http)) as pair:
        assert pair.prefill.new_request("p-1", pair.offloading(), 1_000)
        service = pair.p_service.prefill
        assert service is not None
        service.publish(Load(queued_requests=1), 0.0, steps=Steps(begun=1))  # and no second step, as it is paused
        eventually(lambda: pair.match() == PrefillLocally("prefill_paused"))
        assert pair.decode.fallbacks == {"prefill_paused": 1}
        assert pair.match(PromptView("r2", tuple(range(2_000, 3_000)))) == PrefillLocally("draining")
        assert not service.leaving, "it is asked again when it goes on"
        service.publish(Load(), 0.0, steps=Steps(begun=2, computing=1))
        eventually(pair.met)
        assert pair.match(PromptView("r3", tuple(range(3_000, 4_000)))) == NotYet()


def test_what_an_engine_has_begun_with_it_keeps_when_it_makes_no_steps(http: HttpPrefill) -> None:
    with running(Pair(http)) as pair:
        assert pair.prefill.new_request("p-1", pair.offloading(), 1_000)
        pair.prefill.scheduled("p-1", 100, range(7))
        service = pair.p_service.prefill
        assert service is not None
        service.publish(Load(queued_requests=1), 0.0, steps=Steps(begun=1))
        eventually(lambda: not pair.met())  # D has heard that it is at rest
        service.publish(Load(), 0.0, steps=Steps(begun=2, computing=1))
        eventually(pair.met)  # and, after whatever else it said meanwhile, that it goes on
        assert pair.match() == Claim(999)
        assert pair.decode.fallbacks == {}


@pytest.mark.parametrize("status", [400, 429, 500, 503])
def test_an_http_error_is_a_fallback_with_its_status(http: HttpPrefill, status: int) -> None:
    http.status = status
    http.may_answer.set()
    with running(Pair(http)) as pair:
        pair.offloading()
        eventually(
            lambda: pair.decode.fallbacks[f"http_{status}"] == 1 or pair.match() == PrefillLocally(f"http_{status}")
        )


def test_an_abort_on_decode_cancels_on_prefill_and_closes_the_connection(http: HttpPrefill) -> None:
    with running(Pair(http)) as pair:
        transfer_id = pair.offloading()
        pair.prefill.new_request("p-1", transfer_id, 1_000)
        pair.decode.finished("r1")
        eventually(lambda: pair.prefill.step() is not None and pair.prefill.drops["aborted"] == 1)
        eventually(lambda: pair.d_service.decode is not None and pair.d_service.decode.snapshot()["calls"] == 0)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        pytest.param(replace(FACTS, model=ModelIdentity("config-a", "weights-b")), "weights_digest", id="weights"),
        pytest.param(replace(FACTS, model=ModelIdentity("config-b", "weights-a")), "config_fingerprint", id="config"),
        pytest.param(replace(FACTS, geometry=replace(GEOMETRY, layers=5)), "layers", id="layers"),
        pytest.param(
            replace(FACTS, endpoints=FACTS.endpoints * 3), "tensor_parallel", id="heads that three ranks cannot share"
        ),
        pytest.param(
            replace(FACTS, geometry=replace(GEOMETRY, dtype="float8_e4m3fn")),
            "kv_dtype",
            id="quantized cache on one side",
        ),
    ],
)
def test_engines_that_do_not_fit_refuse_each_other_once_naming_both_values(
    http: HttpPrefill, caplog: pytest.LogCaptureFixture, facts: EngineFacts, reason: str
) -> None:
    with running(Pair(http, facts)) as pair:
        links = pair.d_service.decode
        assert links is not None
        eventually(lambda: links.counters[f"rejected_{reason}"] > 0)
        assert pair.match() == PrefillLocally("no_healthy_worker")
        threading.Event().wait(0.5)  # several heartbeats: it must not ask again
        assert links.counters[f"rejected_{reason}"] == 1
    (line,) = [
        r.getMessage() for r in caplog.records if f"{reason} differs" in r.getMessage() and "refused" in r.getMessage()
    ]
    assert "ours" in line
    assert "theirs" in line


def test_different_float_dtypes_fit(http: HttpPrefill) -> None:
    with running(Pair(http, replace(FACTS, geometry=replace(GEOMETRY, dtype="bfloat16")))) as pair:
        eventually(pair.met)


def test_a_restarted_prefill_engine_is_met_again_and_its_transfers_are_repaired(http: HttpPrefill) -> None:
    with running(Pair(http)) as pair:
        pair.offloading()
        pair.p_service.close()
        eventually(lambda: isinstance(pair.match(), PrefillLocally))
        eventually(lambda: not pair.met())
        pair.p_service = pair.service(load_settings({"role": "prefill", "side_channel": {"port": pair.port}}), FACTS)
        eventually(pair.met)
        epochs = [c.epoch for c in pair.decode.step() if isinstance(c, AddPeer)]
        assert epochs[-1] == pair.p_service.epoch


def test_prefixes_that_prefill_holds_are_known_to_decode(http: HttpPrefill) -> None:
    """Also what was computed before they met, and what is forgotten when the engine empties its cache."""
    with running(Pair(http, replace(FACTS, prefix_capacity_tokens=100_000))) as pair:
        prefill, links = pair.p_service.prefill, pair.d_service.decode
        assert prefill is not None
        assert links is not None
        prefill.holds(HeldPrompt(tuple(range(1_000)), salt="s"))
        hashes = prefix_hashes(tuple(range(900)), salt="s")

        def overlap(prompt: list[int]) -> tuple[int, ...]:
            links.workers()
            return links.overlap_tokens(prompt)

        eventually(lambda: overlap(hashes) == (896,))
        prefill.holds(HeldPrompt(tuple(range(2_000, 2_500))))
        eventually(lambda: overlap(prefix_hashes(tuple(range(2_000, 2_500)))) == (384,))
        assert overlap(prefix_hashes(tuple(range(900)))) == (0,), "another salt"
        prefill.cache_reset()
        eventually(lambda: overlap(hashes) == (0,))


def test_a_loaded_prefill_engine_is_seen_so_within_milliseconds(http: HttpPrefill) -> None:
    with running(Pair(http)) as pair:
        prefill, links = pair.p_service.prefill, pair.d_service.decode
        assert prefill is not None
        assert links is not None
        eventually(pair.met)
        speed = PrefillModel(0.01, 1e-4, 1e-9, 20, 0.1)
        prefill.publish(Load(3, 9_000, 2, prefill_tokens_per_s=9_000.0, prefill=speed), 0.25)
        eventually(lambda: links.workers()[0].queued_requests == 3, within_s=0.4)
        (row,) = links.workers()
        assert (row.queued_prefill_tokens, row.running_requests, row.kv_usage) == (9_000, 2, 0.25)
        assert (row.queue_s, row.prefill) == (1.0, speed)


def test_an_idle_prefill_engine_stays_fresh_without_being_asked(http: HttpPrefill) -> None:
    with running(Pair(http)) as pair:
        links = pair.d_service.decode
        assert links is not None
        eventually(lambda: links.workers()[0].reported_s > 0)
        first_s = links.workers()[0].reported_s
        eventually(lambda: links.workers()[0].reported_s > first_s, within_s=1.0)
        assert pair.met()


def test_a_killed_prefill_engine_is_left_within_a_second(http: HttpPrefill) -> None:
    with running(Pair(http)) as pair:
        eventually(pair.met)
        pair.p_service.close()
        eventually(lambda: not pair.met(), within_s=1.0)


def test_a_silent_decode_engine_is_forgotten_by_prefill(http: HttpPrefill) -> None:
    with running(Pair(http)) as pair:
        transfer_id = pair.offloading()
        pair.prefill.new_request("p-1", transfer_id, 1_000)
        pair.d_service.close()
        eventually(lambda: pair.prefill.step() is not None and pair.prefill.drops.total() == 1)


def test_the_debug_view_is_served_to_anyone_with_the_keys(http: HttpPrefill) -> None:
    import asyncio

    with running(Pair(http)) as pair:
        view = asyncio.run(fetch_snapshot("127.0.0.1", pair.d_service.port, None))
        assert view["role"] == "decode"
        assert "disagg-io" in view["threads"]


def test_a_port_in_use_is_one_line_that_names_the_setting(http: HttpPrefill) -> None:
    from disagg_plugin.errors import ConfigError

    with running(Pair(http)) as pair:
        again = load_settings({"role": "prefill", "side_channel": {"port": pair.port}})
        with pytest.raises(ConfigError, match=r"side_channel\.port"):
            Pair.service(again, FACTS)


@pytest.mark.parametrize(("by_priority", "sent"), [(True, -1), (False, None)])
def test_a_priority_travels_to_a_worker_that_schedules_by_it(
    http: HttpPrefill, by_priority: bool, sent: int | None
) -> None:
    """An engine that does not would refuse the request for the field alone."""
    with running(Pair(http, replace(FACTS, by_priority=by_priority))) as pair:
        pair.offloading(URGENT)
        assert http.bodies[-1].get("priority") == sent
        assert http.bodies[-1]["cache_salt"] == "s"
