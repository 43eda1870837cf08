"""Whatever happens to a request, in any order: the engine hears once of each load, and LMCache is left with nothing."""

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from lmcache_double import BLOCK, Blocks, KVConnectorTransferResults, Pair, request, step_of

from disagg_plugin.kv.dataplane import Completions

PROMPT_TOKENS = 400
BLOCK_IDS = tuple(range(1, 14))

ACTIONS = st.one_of(
    st.sampled_from(["look up", "run", "preempt", "abort", "late", "store ends", "wire ends", "step"]),
    st.tuples(st.just("answer"), st.sampled_from([None, 0, 128, 256, PROMPT_TOKENS - 1])),
    st.tuples(st.just("schedule"), st.booleans()),
    st.tuples(st.just("store fails"), st.integers(0, 12)),
    st.tuples(st.just("wire fails"), st.integers(0, 12)),
)


@dataclass
class Played:
    """One request, and vLLM's scheduler as far as it matters here."""

    pair: Pair = field(default_factory=Pair)
    state: str = "waiting"  # loading, running, over
    computed: int = 0
    loads: int = 0
    received: int = 0
    kept: bool = False
    released: int = 0
    asked_a_worker: bool = False
    pending: dict[str, range] = field(default_factory=dict)  # part of the load → its positions in the block table

    def __post_init__(self) -> None:
        self.request = request("r", PROMPT_TOKENS)

    def act(self, action: str, value: int | None = None) -> None:
        match action:
            case "answer":
                self.pair.child.answer = value
            case "late":
                self.pair.now_s += 10.0
            case "look up" if self.state == "waiting":  # at its arrival; its turn comes later
                self.pair.scheduler.look_up(self.request, 0)
            case "schedule" if self.state == "waiting":
                self.schedule(bool(value))
            case "store ends" | "store fails" if "store" in self.pending:
                self.end_store(value if action == "store fails" else None)
            case "wire ends" | "wire fails" if "wire" in self.pending:
                self.end_wire(value if action == "wire fails" else None)
            case "run" if self.state == "running":
                self.run()
            case "preempt" if self.state == "running":
                self.step(preempted={"r"})
                self.state, self.computed = "waiting", 0
            case "abort" if self.state != "over":
                self.end()
            case "step":
                self.step()

    def schedule(self, to_a_worker: bool) -> None:
        found = self.pair.scheduler.look_up(self.request, 0)
        if found is None:
            return self.step()
        wire = PROMPT_TOKENS - 1 - found if to_a_worker and not self.asked_a_worker else 0
        self.asked_a_worker |= wire > 0
        self.pair.scheduler.promise("r", 0, found)
        assert self.pair.scheduler.allocated(self.request, Blocks(*BLOCK_IDS), found + wire) == wire
        if not found + wire:
            return self.run()
        self.state, self.loads, self.computed = "loading", self.loads + 1, found + wire
        border = -(-found // BLOCK)
        parts = {"store": range(border), "wire": range(border, -(-(found + wire) // BLOCK))}
        self.step()
        self.pending = {part: at for part, at in parts.items() if (found if part == "store" else wire)}
        return None

    def run(self) -> None:
        self.state = "running"
        new_tokens = min(100, PROMPT_TOKENS - self.computed) if self.computed < PROMPT_TOKENS else 1
        self.step(computed={"r": (self.computed, new_tokens)})
        self.computed += new_tokens

    def end_store(self, bad: int | None) -> None:
        positions = self.pending.pop("store")
        self.pair.worker_child.results = KVConnectorTransferResults(finished_recving={"r"})
        if bad is not None:
            self.pair.worker_child.errors = {BLOCK_IDS[at] for at in positions if at >= bad}
        self.step()

    def end_wire(self, bad: int | None) -> None:
        positions = self.pending.pop("wire")
        invalid = frozenset(BLOCK_IDS[at] for at in positions if bad is not None and at >= bad)
        self.step(own=Completions(("r",), invalid))

    def end(self) -> None:
        if self.pair.scheduler.finished(self.request):
            assert self.state != "loading", "the engine waits for the load itself"
            self.kept = True
            self.pair.scheduler.sent_by("r", store=True, wire=False)
        self.state = "over"
        self.step()

    def step(
        self,
        computed: dict[str, tuple[int, int]] | None = None,
        preempted: set[str] | None = None,
        own: Completions | None = None,
    ) -> None:
        done = self.pair.step(step_of(computed, preempted=preempted or ()), own)
        self.released += len(done.released)
        self.received += len(done.received)
        if done.received and self.state == "loading":
            assert not self.pending, "all parts have ended"
            bad = [BLOCK_IDS.index(block) for block in done.invalid_block_ids]
            self.computed = min([self.computed, *(at * BLOCK for at in bad)])
            self.state = "running" if self.computed else "waiting"
            if self.computed:
                self.pair.scheduler.allocated(self.request, Blocks(*BLOCK_IDS), 0)


@settings(max_examples=300)
@given(st.lists(ACTIONS, max_size=25))
def test_the_engine_hears_once_of_each_load_and_nothing_is_left(actions: list[object]) -> None:
    played = Played()
    for action in actions:
        played.act(*(action if isinstance(action, tuple) else (str(action),)))
    for last in ("abort", "store ends", "wire ends"):
        played.act(last)
    played.pair.child.answer = 0
    while played.pair.scheduler.needs_steps:
        played.step()
    assert played.received == played.loads
    assert played.released == played.kept
    assert (played.pair.child.trackers, played.pair.child.locked) == ({}, set())
    assert (played.pair.worker.unexpected, played.pair.scheduler.snapshot()["tracked_requests"]) == (0, 0)
    assert played.pair.scheduler.snapshot()["inactive_reason"] == ""
