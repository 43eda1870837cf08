"""Exactly one report per request and rank, in every interleaving of what can happen, against vLLM's aggregator.

vLLM counts reports: when as many ranks have named a request as there are, it takes the request back. It counts a rank
that speaks twice as two ranks, and asserts that what was named is known, and either waits for KV or has ended. Here are
two ranks' real data planes, the real decode role, a scheduler in the manner of vLLM's, and two prefill workers.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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


class Port(FakePort):
    """Remembers which transfer a worker was told to send."""

    def __init__(self) -> None:
        super().__init__()
        self.readies: list[tuple[bytes, str, int, int]] = []

    def ready(self, transfer_id: bytes, peer: str, first_token: int, end_token: int) -> None:
        self.readies.append((transfer_id, peer, first_token, end_token))


class World:
    """One decode engine of two ranks, two prefill workers, and requests whose blocks are allocated.

    Args:
        abort_at_allocation: The last one's client goes away in the step that allocates.
    """

    def __init__(self, requests: int = 1, *, abort_at_allocation: bool = False) -> None:
        self.now = 1_000.0
        self.network = MemoryNetwork(manual=True)
        self.views = [self.view(rank) for rank in range(RANKS)]
        self.ranks = [self.plane("d", rank, self.views[rank]) for rank in range(RANKS)]
        self.peers = {name: [self.plane(name, rank, self.view(rank)) for rank in range(RANKS)] for name in WORKERS}
        self.port = Port()
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
        self.started: set[bytes] = set()
        for name in WORKERS:
            self.join(name)
            for plane in self.peers[name]:
                plane.apply([self.add("d", self.ranks, receives=False, region=2 * WORKERS.index(name))])
                plane.pump_once()

        for _ in range(requests):
            self.send()
        self.step()
        self.a_worker_starts()
        self.step(abort_at_allocation=abort_at_allocation)
        self.the_workers_compute()

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
        self.port.events.append(
            PeerJoined(self.add(name, self.peers[name], receives=True, region=2 * WORKERS.index(name)))
        )

    # -- the engine --------------------------------------------------------------------------------------------

    def send(self) -> None:
        number = len(self.requests)
        prompt = PromptView(f"r{number}", tuple(range(100 * number, 100 * number + TOKENS)))
        self.requests[prompt.request_id] = Request(prompt, number)

    def step(self, *, abort_at_allocation: bool = False) -> None:
        """One step of the engine, both ranks' hooks and the aggregator included."""
        for request in list(self.requests.values()):
            if request.state == "waiting":
                last = request.number == len(self.requests) - 1
                self.schedule(request, abort=abort_at_allocation and last)
        commands: list[Command] = self.side.step()
        named, reports = [], []
        invalid: set[int] = set()
        for rank, plane in enumerate(self.ranks):
            plane.apply(commands)
            plane.after_forward(computed=False)
            done = plane.take_completions()
            named.append(done.received)
            invalid |= done.invalid_block_ids
            reports.append(plane.report())
            for request_id in done.received:
                self.reported[request_id, rank] = self.reported.get((request_id, rank), 0) + 1
                assert self.reported[request_id, rank] <= self.requests[request_id].loads
        self.side.reports(reports)
        for request_id in self.aggregator.ended(named):
            self.take_back(self.requests[request_id], invalid)

    def schedule(self, request: Request, *, abort: bool) -> None:
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

    def abort(self, request: Request) -> None:
        if request.state == "ended":
            return
        loading = request.state == "loading"
        request.state = "ended"
        self.side.finished(request.prompt.request_id)
        if not loading:
            self.give_back(request)

    # -- what happens ------------------------------------------------------------------------------------------

    def happens(self, event: str) -> None:
        """Let one of ``EVENTS`` happen."""
        name, _, argument = event.partition(" ")
        getattr(self, f"_{name}")(*([int(argument)] if argument else []))

    def _chunk(self, rank: int, damaged: bool = False) -> None:
        """The next chunk of a rank arrives, and its thread notices."""
        target = self.ranks[rank].endpoint.agent_name
        write = next((one for one in self.network.pending if one.target == target), None)
        if write is not None:
            self.network.deliver(write, flip_byte=200 if damaged else None)
        self.ranks[rank].pump_once()
        self._workers()

    def _damaged(self, rank: int) -> None:
        self._chunk(rank, damaged=True)

    def _all(self, rank: int) -> None:
        """Whatever is still to come for a rank arrives."""
        for _ in range(6):
            self._chunk(rank)

    def _abort(self) -> None:
        self.abort(self.requests["r0"])

    def _deadline(self) -> None:
        self.now += 31.0

    def _stall(self) -> None:
        self.now += 6.0
        for plane in self.ranks:
            plane.pump_once()

    def _lost(self, worker: int) -> None:
        if (name := WORKERS[worker]) in self.joined:
            self.joined.discard(name)
            self.port.events.append(PeerLeft(name, "peer_lost"))

    def _back(self) -> None:
        for name in WORKERS:
            if name not in self.joined:
                self.join(name)

    def _preempt(self) -> None:
        for request in self.requests.values():
            if request.state == "running":
                self.give_back(request)
                request.state = "waiting"

    def _fails(self) -> None:
        """The HTTP call of the newest offer fails."""
        call = self.port.offers[-1]
        self.port.events.append(PrefillFailed(call.transfer_id, "http_connection_lost", call.workers[0]))

    def _starts(self) -> None:
        """Whoever was asked last accepts, starts, and computes what it is asked for."""
        self.a_worker_starts()
        self.step()
        self.the_workers_compute()

    def _workers(self) -> None:
        for planes in self.peers.values():
            for plane in planes:
                plane.after_forward(computed=False)
                plane.pump_once()

    def a_worker_starts(self) -> None:
        for call in self.port.offers:
            if call.transfer_id not in self.started:
                self.started.add(call.transfer_id)
                self.port.events.append(PrefillAccepted(call.transfer_id, call.workers[0], 9.0))
                self.port.events.append(PrefillStarted(call.transfer_id, call.workers[0]))

    def the_workers_compute(self) -> None:
        """Every range that was asked for and not yet begun."""
        asked, self.port.readies = self.port.readies, []
        calls = {call.transfer_id: call for call in self.port.offers}
        for transfer_id, worker, first, end in asked:
            self.deliver_prompt(calls[transfer_id], worker, first, end)

    def deliver_prompt(self, call: OfferCall, worker: str, first: int, end: int) -> None:
        blocks = tuple(range(1, -(-TOKENS // PAGE) + 1))
        for plane in self.peers[worker]:
            view = plane._view
            assert isinstance(view, DenseView)
            view.fill(blocks, seed=call.token_ids[0] // 100, tokens=TOKENS)
            plane.apply([OpenSend(call.transfer_id, call.nonce, "d", first, end, "raw")])
            plane.apply([Computed(call.transfer_id, TOKENS, blocks)])
            plane.after_forward(computed=True)
            plane.pump_once()

    # -- afterwards --------------------------------------------------------------------------------------------

    def end(self) -> None:
        """Everybody goes home: exactly one report per load and rank, and nothing is left."""
        for _ in range(3):
            for request in self.requests.values():
                self.abort(request)
            self.now += 100.0
            for plane in self.ranks:
                plane.pump_once()
            self.step()
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


EVENTS = (
    *("chunk 0", "chunk 1", "damaged 0", "damaged 1", "all 0", "all 1", "abort", "deadline", "stall", "lost 0"),
    *("lost 1", "back", "preempt", "fails", "starts"),
)


@settings(max_examples=400, deadline=None)
@given(
    events=st.lists(st.tuples(st.sampled_from(EVENTS), st.booleans()), min_size=2, max_size=9),
    requests=st.integers(1, 2),
    abort_at_allocation=st.booleans(),
)
def test_in_any_order_every_load_is_reported_once_by_every_rank(
    events: list[tuple[str, bool]], requests: int, abort_at_allocation: bool
) -> None:
    world = World(requests, abort_at_allocation=abort_at_allocation)
    for event, steps in events:
        world.happens(event)
        if steps:
            world.step()
    world.end()


@pytest.mark.parametrize(
    "first", ["abort", "deadline", "stall", "lost 0", "lost 1", "fails", "damaged 0", "all 0", "all 1"]
)
@pytest.mark.parametrize("second", ["abort", "deadline", "lost 0", "lost 1", "all 0", "all 1", "starts", "preempt"])
@pytest.mark.parametrize("third", ["all 0", "all 1", "starts", "abort"])
def test_every_three_events_with_a_step_between_them(first: str, second: str, third: str) -> None:
    world = World()
    for event in (first, second, third, "starts", "all 0", "all 1"):
        world.happens(event)
        world.step()
    world.end()
