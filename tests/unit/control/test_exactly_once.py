"""Exactly one report per request and rank, in every interleaving of what can happen, against vLLM's aggregator.

vLLM counts reports: when as many ranks have named a request as there are, it takes the request back. It counts a rank
that speaks twice as two ranks, and asserts that what was named is known, and either waits for KV or has ended. Here are
two ranks' real data planes, the real decode role, a scheduler in the manner of vLLM's, and two prefill workers.
"""

from dataclasses import dataclass, replace

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from unit.control.decode_bench import FakePort

from disagg_plugin.config import load_settings
from disagg_plugin.control.decode_port import Claim, NotYet, OfferCall, PromptView
from disagg_plugin.control.decode_side import DecodeSide
from disagg_plugin.control.events import PeerJoined, PeerLeft, PrefillAccepted, PrefillFailed, PrefillStarted
from disagg_plugin.kv.commands import AddPeer, Command, Computed, OpenSend
from disagg_plugin.kv.dataplane import DataPlane, agent_name
from disagg_plugin.kv.geometry import HeadRange, KVGeometry
from disagg_plugin.testing import DenseView, MemoryNetwork, canonical_noise

GEOMETRY = KVGeometry(layers=1, kv_heads=2, head_dim=8, dtype="float32")
RANKS = 2
PAGE = 8
PAGES = 40
TOKENS = 90
WORKERS = ("p:1", "p:2")
SLOT_BYTES = 4096  # 31 tokens of one rank: three chunks a prompt
SETTINGS = load_settings(
    {
        "role": "decode",
        "policy": {"offload": "threshold", "log_interval_s": None},
        "split_policy": {"prompt_length_threshold": 24},
        "transfer": {
            "codec": "raw",
            "compile": False,
            "slot_bytes": SLOT_BYTES,
            "region_slots": 2,
            "ring_max_bytes": 4 * SLOT_BYTES,
            "scatter_budget_ms": 1e6,
            "scatter_idle_budget_ms": 1e6,
            "stall_timeout_s": 5.0,
            "deadline_s": 30.0,
            "shared_prefix_wait_s": 0.0,
        },
    }
)


class Aggregator:
    """vLLM's ``KVOutputAggregator``: who was named by as many ranks as there are has ended."""

    def __init__(self) -> None:
        self.remaining: dict[str, int] = {}

    def ended(self, named: list[tuple[str, ...]]) -> list[str]:
        ended = []
        for request_ids in named:
            for request_id in request_ids:
                self.remaining[request_id] = self.remaining.get(request_id, RANKS) - 1
                if self.remaining[request_id] == 0:
                    del self.remaining[request_id]
                    ended.append(request_id)
        return ended


@dataclass
class Request:
    """As the engine's scheduler sees it: waiting, loading, running, or ended."""

    prompt: PromptView
    number: int
    state: str = "waiting"
    blocks: tuple[int, ...] = ()
    loads: int = 0


class Machine(RuleBasedStateMachine):
    """The interleavings."""

    @initialize()
    def start(self) -> None:
        self.now = 1_000.0
        self.network = MemoryNetwork(manual=True)
        self.views = [self.view(rank) for rank in range(RANKS)]
        self.ranks = [self.plane("d", rank, self.views[rank]) for rank in range(RANKS)]
        self.peers = {name: [self.plane(name, rank, self.view(rank)) for rank in range(RANKS)] for name in WORKERS}
        self.port = FakePort()
        (first,) = self.port.states
        self.port.states = [replace(first, worker=name) for name in WORKERS]
        self.side = DecodeSide(
            SETTINGS, self.port, engine="d", kv_capacity_tokens=PAGES * PAGE, ranks=RANKS, clock=lambda: self.now
        )
        self.free = list(range(1, PAGES))
        self.requests: dict[str, Request] = {}
        self.aggregator = Aggregator()
        self.reported: dict[tuple[str, int], int] = {}
        self.joined: set[str] = set()
        for name in WORKERS:
            self.join(name)
            for plane in self.peers[name]:
                plane.apply([self.add("d", self.ranks, receives=False, region=2 * WORKERS.index(name))])
                plane.pump_once()

    def view(self, rank: int) -> DenseView:
        return DenseView(GEOMETRY, blocks=PAGES, block_size=PAGE, heads=HeadRange(rank, 1))

    def plane(self, name: str, rank: int, view: DenseView) -> DataPlane:
        return DataPlane(
            engine=name,
            epoch=1,
            rank=rank,
            view=view,
            transfer=SETTINGS.transfer,
            transport=self.network.transport(agent_name(name, rank, 1)),
            clock=lambda: self.now,
            threaded=False,
        )

    def add(self, name: str, planes: list[DataPlane], *, receives: bool, region: int) -> AddPeer:
        endpoints = tuple([plane.endpoint for plane in planes])
        return AddPeer(name, 1, endpoints, region_first_slot=region, region_slots=2, receives=receives)

    def join(self, name: str) -> None:
        self.joined.add(name)
        self.port.events.append(PeerJoined(self.add(name, self.peers[name], receives=True, region=2 * WORKERS.index(name))))

    # -- what happens ------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.requests) < 3)
    @rule()
    def a_request_comes(self) -> None:
        number = len(self.requests)
        prompt = PromptView(f"r{number}", tuple(range(100 * number, 100 * number + TOKENS)))
        self.requests[prompt.request_id] = Request(prompt, number)

    @rule(abort_at_allocation=st.booleans())
    def the_engine_steps(self, abort_at_allocation: bool = False) -> None:
        for request in self.requests.values():
            if request.state == "waiting":
                self.schedule(request, abort_at_allocation)
        commands: list[Command] = self.side.step()
        named, invalid = [], set()
        reports = []
        for rank, plane in enumerate(self.ranks):
            plane.apply(commands)
            plane.after_forward(computed=False)
            done = plane.take_completions()
            named.append(done.received)
            invalid |= done.invalid_block_ids
            reports.append(plane.report())
            for request_id in done.received:
                self.reported[request_id, rank] = self.reported.get((request_id, rank), 0) + 1
        self.side.reports(reports)
        for request_id in self.aggregator.ended(named):
            self.take_back(self.requests[request_id], invalid)

    def schedule(self, request: Request, abort: bool) -> None:
        answer = self.side.match(request.prompt, 0, free_tokens=len(self.free) * PAGE)
        count = -(-TOKENS // PAGE)
        if isinstance(answer, NotYet) or count > len(self.free):
            return
        request.blocks, self.free = tuple(self.free[:count]), self.free[count:]
        if not isinstance(answer, Claim):
            request.state = "running"
            return
        request.state = "loading"
        request.loads += 1
        self.side.allocated(request.prompt.request_id, request.blocks, answer.tokens)
        if abort:
            self.abort(request)

    def take_back(self, request: Request, invalid: set[int]) -> None:
        """vLLM's asserts, and that what counts as loaded is right."""
        assert request.state in ("loading", "ended"), f"a report for a request that is {request.state}"
        self.side.load_completed(request.prompt.request_id)
        if request.state == "ended":
            self.give_back(request)
            return
        request.state = "running"
        good = next((at for at, block in enumerate(request.blocks) if block in invalid), len(request.blocks))
        tokens = min(good * PAGE, TOKENS - 1)
        for rank, view in enumerate(self.views):
            wanted = canonical_noise(GEOMETRY, HeadRange(rank, 1), request.number, TOKENS)[:, :, :, :tokens]
            assert tokens == 0 or torch.equal(view.read(request.blocks, 0, tokens), wanted)

    def give_back(self, request: Request) -> None:
        assert not set(request.blocks) & set(self.free), "blocks freed twice"
        self.free += request.blocks
        request.blocks = ()

    @precondition(lambda self: self.alive())
    @rule(data=st.data())
    def a_client_goes_away(self, data: st.DataObject) -> None:
        self.abort(self.requests[data.draw(st.sampled_from(self.alive()))])

    def alive(self) -> list[str]:
        return [name for name, request in self.requests.items() if request.state != "ended"]

    def abort(self, request: Request) -> None:
        loading = request.state == "loading"
        request.state = "ended"
        self.side.finished(request.prompt.request_id)
        if not loading:
            self.give_back(request)

    @precondition(lambda self: any(request.state == "running" for request in self.requests.values()))
    @rule()
    def the_engine_preempts(self) -> None:
        request = next(request for request in self.requests.values() if request.state == "running")
        self.give_back(request)
        request.state = "waiting"

    @precondition(lambda self: self.port.offers)
    @rule(data=st.data(), starts=st.booleans())
    def a_worker_accepts(self, data: st.DataObject, starts: bool) -> None:
        call: OfferCall = data.draw(st.sampled_from(self.port.offers))
        worker = call.workers[0]
        self.port.events.append(PrefillAccepted(call.transfer_id, worker, 9.0))
        if starts:
            self.port.events.append(PrefillStarted(call.transfer_id, worker))

    @precondition(lambda self: self.port.offers)
    @rule(data=st.data())
    def a_worker_gives_up(self, data: st.DataObject) -> None:
        call: OfferCall = data.draw(st.sampled_from(self.port.offers))
        self.port.events.append(PrefillFailed(call.transfer_id, "http_connection_lost", call.workers[0]))

    @precondition(lambda self: any(sent[0] == "ready" for sent in self.port.sent))
    @rule()
    def the_workers_compute(self) -> None:
        """Every range that was asked for and not yet begun."""
        for sent in [sent for sent in self.port.sent if sent[0] == "ready"]:
            self.port.sent.remove(sent)
            first, _, end = sent[2].partition("-")
            calls = [call for call in self.port.offers if call.workers[0] == sent[1]]
            for call in calls:
                self.send(call, sent[1], int(first), int(end))

    def send(self, call: OfferCall, worker: str, first: int, end: int) -> None:
        blocks = tuple(range(1, -(-TOKENS // PAGE) + 1))
        for plane in self.peers[worker]:
            view = plane._view
            assert isinstance(view, DenseView)
            view.fill(blocks, seed=call.token_ids[0] // 100, tokens=TOKENS)
            plane.apply([OpenSend(call.transfer_id, call.nonce, "d", first, end, "raw")])
            plane.apply([Computed(call.transfer_id, TOKENS, blocks)])
            plane.after_forward(computed=True)
            plane.pump_once()

    @precondition(lambda self: self.network.pending)
    @rule(data=st.data(), damaged=st.booleans())
    def a_chunk_arrives(self, data: st.DataObject, damaged: bool) -> None:
        write = data.draw(st.sampled_from(range(len(self.network.pending))))
        self.network.deliver(self.network.pending[write], flip_byte=200 if damaged else None)

    @rule(rank=st.integers(0, RANKS - 1))
    def a_ranks_thread_runs(self, rank: int) -> None:
        self.ranks[rank].pump_once()

    @rule()
    def the_workers_threads_run(self) -> None:
        for planes in self.peers.values():
            for plane in planes:
                plane.after_forward(computed=False)
                plane.pump_once()

    @rule(seconds=st.sampled_from([1.0, 6.0, 40.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.joined)
    @rule(data=st.data())
    def a_worker_is_lost(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.joined)))
        self.joined.discard(name)
        self.port.events.append(PeerLeft(name, "peer_lost"))

    @precondition(lambda self: len(self.joined) < len(WORKERS))
    @rule()
    def a_worker_comes_back(self) -> None:
        self.join(next(name for name in WORKERS if name not in self.joined))

    # -- what always holds -------------------------------------------------------------------------------------

    @invariant()
    def no_rank_reports_more_often_than_there_were_loads(self) -> None:
        for (request_id, _rank), times in getattr(self, "reported", {}).items():
            assert times <= self.requests[request_id].loads

    def teardown(self) -> None:
        if not hasattr(self, "side"):
            return
        for _ in range(3):
            for name in self.alive():
                self.abort(self.requests[name])
            self.now += 100.0
            for plane in self.ranks:
                plane.pump_once()
            self.the_engine_steps()
        for request_id, request in self.requests.items():
            for rank in range(RANKS):
                assert self.reported.get((request_id, rank), 0) == request.loads
        assert self.aggregator.remaining == {}
        assert len(self.free) == PAGES - 1
        view = self.side.snapshot()
        assert (view["tracked_requests"], view["held_tokens"], view["open"]) == (0, 0, [])
        for plane in self.ranks:
            counters = plane.counters()
            assert (counters["open_receives"], counters["private_buffers_in_use"]) == (0, 0)
            assert (counters["hook_errors"], counters["internal_errors"]) == (0, 0)


TestExactlyOnce = Machine.TestCase
TestExactlyOnce.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
