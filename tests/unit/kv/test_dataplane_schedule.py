"""Any schedule of steps, writes, faults and second thoughts: no wrong byte, one completion each, nothing leaks."""

from random import Random

import pytest
import torch

from disagg_plugin.config import TransferSettings
from disagg_plugin.kv.commands import (
    AbandonReceive,
    AddPeer,
    Computed,
    DropSend,
    OpenReceive,
    OpenSend,
    ReleaseWhenStaged,
)
from disagg_plugin.kv.dataplane import DataPlane
from disagg_plugin.kv.geometry import HeadRange, KVGeometry
from disagg_plugin.testing import DenseView, MemoryNetwork, PendingWrite, canonical_noise

GEOMETRY = KVGeometry(layers=2, kv_heads=1, head_dim=16, dtype="float32")
SETTINGS = TransferSettings(
    codec="raw",
    compile=False,
    guard_tokens=0,
    guard_limit=10.0,
    slot_bytes=4096,
    region_slots=3,
    ring_max_bytes=16 * 4096,
    stall_timeout_s=10.0,
)
TOKENS, BLOCK, BLOCKS_EACH = 64, 8, 8  # raw: 15 tokens a chunk
TRANSFERS = 12
POISON = 7.0e7
MOST_ERROR = {"raw": 0.0, "int8": 0.05}
GAUGES = ("open_sends", "open_receives", "slots_in_use", "slots_quarantined", "private_buffers_in_use", "unanswered")


class Schedule:
    """Each transfer has blocks of its own on both sides; D's are poisoned whenever its request is not open."""

    WEIGHTS = {  # noqa: RUF012  how often each action is chosen
        "begin": 4,
        "compute": 6,
        "step": 12,
        "pump": 20,
        "deliver": 20,
        "flow": 6,
        "abandon": 1,
        "end_of_prefill": 1,
        "drop": 0.3,
        "damage": 1,
        "lose": 0.3,
        "replay": 2,
        "late_write": 2,
        "overwrite": 2,
        "wait": 1,
    }

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.now = 0.0
        self.network = MemoryNetwork(manual=True)
        blocks = TRANSFERS * BLOCKS_EACH
        self.views = {engine: DenseView(GEOMETRY, blocks=blocks, block_size=BLOCK) for engine in "pd"}
        self.views["d"].cache.fill_(POISON)
        self.planes = {engine: self.new_plane(engine) for engine in "pd"}
        for engine, other in (("p", "d"), ("d", "p")):
            peer = AddPeer(other, 1, (self.planes[other].endpoint,), 4, 3, receives=engine == "d")
            self.planes[engine].apply([peer])
            self.planes[engine].pump_once()
        self.specs: list[tuple[int, int, str]] = []
        self.open: set[int] = set()
        self.completed: list[str] = []
        self.released: list[str] = []
        self.ended = 0
        self.heard: list[tuple[str, bytes]] = []
        self.old_slots: list[torch.Tensor] = []

    def run(self, actions: int) -> None:
        names, weights = list(self.WEIGHTS), list(self.WEIGHTS.values())
        for name in self.random.choices(names, weights, k=actions):
            getattr(self, name)()
            self.assert_closed_blocks_are_untouched()
        self.end()

    def new_plane(self, engine: str) -> DataPlane:
        return DataPlane(
            engine=engine,
            epoch=1,
            rank=0,
            view=self.views[engine],
            transfer=SETTINGS,
            transport=self.network.transport(f"{engine}-0-1"),
            clock=lambda: self.now,
            threaded=False,
        )

    @staticmethod
    def blocks(number: int) -> tuple[int, ...]:
        return tuple(range(number * BLOCKS_EACH, (number + 1) * BLOCKS_EACH))

    @staticmethod
    def transfer_id(number: int) -> bytes:
        return number.to_bytes(16, "big")

    # what engines and schedulers do

    def begin(self) -> None:
        number = len(self.specs)
        if number == TRANSFERS:
            return
        first, end = self.random.randint(0, 20), self.random.randint(30, TOKENS)
        codec = self.random.choice(list(MOST_ERROR))
        self.specs.append((first, end, codec))
        self.open.add(number)
        ids = (self.transfer_id(number), 1000 + number)
        self.planes["p"].apply([OpenSend(*ids, "d", first, end, codec)])
        self.compute(number)
        if self.random.random() < 0.3:
            self.flow()  # D's worker hears of it late
        self.planes["d"].apply([OpenReceive(f"r{number}", *ids, "p", first, end, self.blocks(number))])

    def any_transfer(self) -> int | None:
        return self.random.randrange(len(self.specs)) if self.specs else None

    def compute(self, number: int | None = None) -> None:
        """More tokens than before, or fewer: a preemption."""
        number = self.any_transfer() if number is None else number
        if number is not None:
            tokens = self.random.choice([self.random.randint(1, TOKENS), TOKENS])
            self.views["p"].fill(self.blocks(number), number, tokens=tokens)
            self.planes["p"].apply([Computed(self.transfer_id(number), tokens, self.blocks(number))])

    def abandon(self) -> None:
        self.planes["d"].apply([AbandonReceive(f"r{self.any_transfer()}", "test")])
        self.collect()

    def end_of_prefill(self) -> None:
        number = self.any_transfer()
        if number is not None:
            self.ended += 1
            self.planes["p"].apply([ReleaseWhenStaged(self.transfer_id(number), f"p{number}-{self.ended}")])

    def drop(self) -> None:
        number = self.any_transfer()
        if number is not None:
            self.planes["p"].apply([DropSend(self.transfer_id(number), "test")])

    def step(self, engine: str | None = None) -> None:
        self.planes[engine or self.random.choice("pd")].after_forward(computed=False)
        self.collect()

    def pump(self, engine: str | None = None) -> None:
        engine = engine or self.random.choice("pd")
        self.heard += self.network.agents[f"{engine}-0-1"].notifications
        self.planes[engine].pump_once()

    def flow(self) -> None:
        for engine in "pd":
            self.step(engine)
            self.pump(engine)

    # what the network does

    def deliver(self, flip_byte: int | None = None) -> None:
        if self.network.pending:
            self.deliver_one(self.random.choice(self.network.pending), flip_byte)

    def deliver_one(self, write: PendingWrite, flip_byte: int | None = None) -> None:
        self.network.deliver(write, flip_byte=flip_byte)
        self.old_slots.append(self.network.agents["d-0-1"].memory(write.remote_address, 4096).clone())

    def damage(self) -> None:
        self.deliver(flip_byte=self.random.randrange(4096))

    def lose(self) -> None:
        if self.network.pending:
            self.network.fail(self.random.choice(self.network.pending))

    def replay(self) -> None:
        if self.heard:
            source, message = self.random.choice(self.heard)
            target = "d-0-1" if source == "p-0-1" else "p-0-1"
            self.network.agents[target].notifications.append((source, message))

    def late_write(self) -> None:
        if self.old_slots:
            address = self.planes["d"].endpoint.ring_address + self.random.randint(4, 6) * 4096
            self.network.agents["d-0-1"].memory(address, 4096).copy_(self.random.choice(self.old_slots))

    def overwrite(self) -> None:
        """A write that was given up lands just behind a good one, before D looks."""
        if self.network.pending and self.old_slots:
            write = self.random.choice(self.network.pending)
            self.deliver_one(write)
            memory = self.network.agents["d-0-1"].memory(write.remote_address, 4096)
            memory.copy_(self.random.choice(self.old_slots))
            self.pump("d")

    def wait(self) -> None:
        self.now += self.random.choice([0.5, 0.5, 4.0, 11.0])

    # what must hold

    def collect(self) -> None:
        done = self.planes["d"].take_completions()
        self.completed += done.received
        self.released += self.planes["p"].take_completions().released
        for request_id in done.received:
            self.check(int(request_id[1:]), done.invalid_block_ids)

    def check(self, number: int, invalid: frozenset[int]) -> None:
        """What was handed on is right; then the blocks go back to the engine."""
        first, end, codec = self.specs[number]
        blocks = self.blocks(number)
        valid = next((i * BLOCK for i, block in enumerate(blocks) if block in invalid), end)
        if valid > first:
            wanted = canonical_noise(GEOMETRY, HeadRange(0, 1), number, TOKENS)[:, :, :, first:valid]
            found = self.views["d"].read(blocks, first, valid)
            assert (found - wanted).abs().max() <= MOST_ERROR[codec]
        self.open.discard(number)
        self.views["d"].cache[list(blocks)] = POISON

    def assert_closed_blocks_are_untouched(self) -> None:
        closed = sorted(set(range(TRANSFERS)) - self.open)
        blocks = self.views["d"].cache.view(TRANSFERS, -1)[closed]
        assert (blocks == POISON).all()

    def end(self) -> None:
        numbers = range(len(self.specs))
        self.settle()
        self.planes["d"].apply([AbandonReceive(f"r{number}", "end") for number in numbers])
        self.planes["p"].apply([DropSend(self.transfer_id(number), "end") for number in numbers])
        self.now += 6.0
        self.settle()
        assert sorted(self.completed) == sorted(f"r{number}" for number in numbers)
        assert len(set(self.released)) == len(self.released) == self.ended
        for plane in self.planes.values():
            counters = plane.counters()
            assert {gauge: counters[gauge] for gauge in GAUGES} == dict.fromkeys(GAUGES, 0)
            assert counters["internal_errors"] == counters["hook_errors"] == 0
        assert self.network.open_handles == 0

    def settle(self) -> None:
        """A quiet while: everything under way arrives."""
        for _ in range(20):
            for engine in "pd":
                self.pump(engine)
                self.step(engine)
            for write in list(self.network.pending):
                self.network.deliver(write)


@pytest.mark.parametrize("seed", range(40))
def test_any_schedule(seed):
    schedule = Schedule(seed)
    schedule.run(actions=400)
    assert schedule.planes["d"].counters()["chunks_received"] > 5, "the schedule is about something"
