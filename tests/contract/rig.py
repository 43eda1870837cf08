"""A decode engine's connector without its engine, a prefill worker's data plane, and the network between them.

``DecodeRig`` is what each connector's rig fills in: how a request enters its engine, what one turn of the engine is,
and what the engine says of a request. Everything else is the same for all.
"""

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from disagg_plugin.config import DisaggSettings, TransferSettings
from disagg_plugin.control.decode_port import OfferCall
from disagg_plugin.control.events import (
    DecodeEvent,
    PeerJoined,
    PrefillAccepted,
    PrefillEnded,
    PrefillFailed,
    PrefillStarted,
)
from disagg_plugin.control.router_flow import HandedOver
from disagg_plugin.kv.commands import AddPeer, Computed, OpenSend, RankEndpoint
from disagg_plugin.kv.dataplane import DataPlane, agent_name
from disagg_plugin.kv.geometry import KVGeometry
from disagg_plugin.testing import DenseView, MemoryNetwork
from disagg_policies.snapshots import WorkerState

GEOMETRY = KVGeometry(layers=2, kv_heads=2, head_dim=16, dtype="float32")
PAGE = 16
PAGES = 64
SEED = 5
WORKER = "p:1"
SETTINGS = DisaggSettings.model_validate(
    {
        "role": "decode",
        "policy": {"offload": "threshold"},
        "split_policy": {"prompt_length_threshold": 24},
        "transfer": {
            "codec": "raw",
            "compile": False,
            "slot_bytes": 8192,
            "region_slots": 8,
            "ring_max_bytes": 8 * 8192,
            "scatter_budget_ms": 1000.0,
            "scatter_idle_budget_ms": 1000.0,
        },
    }
)
LEAKS = ("open_receives", "slots_in_use", "private_buffers_in_use", "unanswered")


@dataclass
class FakePort:
    """The I/O thread's half of the decode role, in the test's hands."""

    events: deque[DecodeEvent] = field(default_factory=deque)
    offers: list[OfferCall] = field(default_factory=list)
    readies: list[tuple[bytes, int, int]] = field(default_factory=list)
    cancels: list[tuple[bytes, str]] = field(default_factory=list)

    def workers(self) -> tuple[WorkerState, ...]:
        """One worker, idle, whose report has just come."""
        now_s = time.monotonic()
        return (WorkerState(WORKER, healthy=True, queued_requests=0, max_prompt_tokens=4096, reported_s=now_s),)

    def worker_at(self, host: str, bootstrap_port: int) -> str | None:
        return WORKER if (host, bootstrap_port) == ("p", 8998) else None

    def holder(self, handed: HandedOver) -> str | None:
        return WORKER if (handed.host, handed.port) == ("p", 1) else None

    def overlap_tokens(self, hashes: Sequence[int]) -> tuple[int, ...]:
        return ()

    def offer(self, call: OfferCall) -> None:
        self.offers.append(call)

    def ready(self, transfer_id: bytes, peer: str, first_token: int, end_token: int) -> None:
        self.readies.append((transfer_id, first_token, end_token))

    def cancel(self, transfer_id: bytes, peer: str, reason: str) -> None:
        self.cancels.append((transfer_id, reason))

    def failed(self, peer: str, reason: str) -> None: ...
    def assume(self, prefill: object) -> None: ...
    def ask_for_codecs(self, policy: object) -> None: ...
    def landed(self, peer: str, *, wire_bytes: int, tokens: int) -> None: ...
    def saw_overhead(self, peer: str, *, seconds: float) -> None: ...

    def drain(self) -> Iterable[DecodeEvent]:
        while self.events:
            yield self.events.popleft()


class DecodeRig(Protocol):
    """One connector's decode half, over a stand-in of its engine."""

    plane: DataPlane

    def send(self, request_id: str, prompt: list[int]) -> None:
        """A client's request reaches the engine."""

    def abort(self, request_id: str) -> None:
        """The client goes away."""

    def turn(self) -> None:
        """One turn of the engine: a scheduler step, and the worker's hooks around it."""

    def runnable(self, request_id: str) -> int | None:
        """Tokens of the prompt that the engine need not compute, once it may run the request; None: it waits."""

    def kv_of(self, request_id: str, tokens: int) -> object:
        """Canonical KV of the first ``tokens`` of a runnable request."""

    def end(self, request_id: str) -> None:
        """The engine has answered the request."""

    def pages_taken(self) -> int:
        """Pages that are neither free nor reusable."""

    def view(self) -> dict[str, object]:
        """The decode role's debug view."""


@dataclass
class Peer:
    """The prefill worker: a data plane that sends what the test tells it to."""

    network: MemoryNetwork
    plane: DataPlane
    view: DenseView
    blocks: tuple[int, ...] = tuple(range(1, PAGES))

    def compute(self, call: OfferCall, ready: tuple[bytes, int, int], tokens: int) -> None:
        """The first ``tokens`` of the prompt are computed; what D asked for of them goes out."""
        _, first_token, end_token = ready
        self.view.fill(self.blocks, seed=SEED, tokens=len(call.token_ids))
        self.plane.apply([OpenSend(call.transfer_id, call.nonce, "d", first_token, end_token, "raw")])
        self.plane.apply([Computed(call.transfer_id, tokens, self.blocks)])
        self.plane.after_forward(computed=True)
        self.plane.pump_once()


def new_plane(network: MemoryNetwork, name: str, view: object) -> DataPlane:
    transfer: TransferSettings = SETTINGS.transfer
    return DataPlane(
        engine=name,
        epoch=1,
        rank=0,
        view=view,  # type: ignore[arg-type]  # a KVCacheView of the rig's
        transfer=transfer,
        transport=network.transport(agent_name(name, 0, 1)),
        threaded=False,
    )


def introduce(port: FakePort, decode: DataPlane, network: MemoryNetwork) -> Peer:
    """A prefill worker that the decode engine knows of."""
    view = DenseView(GEOMETRY, blocks=PAGES, block_size=PAGE)
    peer = Peer(network, new_plane(network, "p", view), view)
    slots = SETTINGS.transfer.region_slots
    port.events.append(PeerJoined(_add(WORKER, peer.plane.endpoint, slots, receives=True)))
    peer.plane.apply([_add("d", decode.endpoint, slots, receives=False)])
    peer.plane.pump_once()
    return peer


def _add(name: str, endpoint: RankEndpoint, slots: int, *, receives: bool) -> AddPeer:
    return AddPeer(name, 1, (endpoint,), region_first_slot=0, region_slots=slots, receives=receives)


@dataclass
class Contract:
    """What the tests hold: one connector's rig and everything around it."""

    rig: DecodeRig
    port: FakePort
    network: MemoryNetwork
    peer: Peer

    def accept(self) -> OfferCall:
        """P takes the newest offer and starts at once."""
        call = self.port.offers[-1]
        self.port.events += [PrefillAccepted(call.transfer_id, WORKER, 0.0), PrefillStarted(call.transfer_id)]
        self.turn(2)
        return call

    def fail(self, call: OfferCall, reason: str) -> None:
        self.port.events.append(PrefillFailed(call.transfer_id, reason))
        self.turn(3)

    def end_prefill(self, call: OfferCall) -> None:
        self.port.events.append(PrefillEnded(call.transfer_id))

    def turn(self, count: int = 1) -> None:
        """Turns of the engine, with the data-plane threads' work between them."""
        for _ in range(count):
            self.rig.turn()
            self.rig.plane.pump_once()
            self.peer.plane.after_forward(computed=False)
            self.peer.plane.pump_once()

    def assert_nothing_leaked_here(self) -> None:
        """On the decode side; what the peer still holds is its own deadline's business."""
        self.turn(2)
        view = self.rig.view()
        assert self.rig.pages_taken() == 0
        assert view["tracked_requests"] == 0
        assert view["held_tokens"] == 0
        counters = self.rig.plane.counters()
        assert {gauge: counters[gauge] for gauge in LEAKS} == dict.fromkeys(LEAKS, 0)

    def assert_nothing_leaked(self) -> None:
        self.assert_nothing_leaked_here()
        counters = self.peer.plane.counters()
        assert {gauge: counters[gauge] for gauge in LEAKS} == dict.fromkeys(LEAKS, 0)
        assert self.network.open_handles == 0
