"""The latency policy goes where the first token comes earlier, weighs the harm, does not flap or contradict itself.

In the table D and the workers prefill 1,000 tokens/s and nothing else costs anything, unless a row says so.
"""

import itertools
import random
from dataclasses import dataclass, replace

import pytest
from hypothesis import assume, given, reject
from hypothesis import strategies as st

from disagg_policies.estimates import decode_harm_s, local_ttft_s, remote_ttft_s
from disagg_policies.offload import Local, Offload, latency
from disagg_policies.snapshots import (
    DecodeModel,
    DecodeState,
    Link,
    Placement,
    PolicyState,
    PrefillModel,
    Prompt,
    Snapshot,
    WorkerState,
    remember,
)

SPEED = PrefillModel(base_s=0.0, per_token_s=0.001, per_pair_s=0.0)
FREE_STEP = DecodeModel(base_s=0.0, per_request_s=0.0, per_context_token_s=0.0)
FREE_LINK = Link(bytes_per_s=1e9, setup_s=0.0, wire_bytes_per_token=0.0)
HERE = DecodeState("d0", prefill=SPEED, decode=FREE_STEP)
THERE = WorkerState("p0", healthy=True, queued_requests=0, max_prompt_tokens=1 << 20, prefill=SPEED, link=FREE_LINK)
PROMPT = Prompt("r", prompt_tokens=2_000, cached_tokens=0)


def situation(
    *, prompt: Prompt = PROMPT, here: DecodeState = HERE, there: WorkerState = THERE, overlap: int = 0
) -> Snapshot:
    return Snapshot(prompt, here, (there,), (overlap,), placement=Placement(("p0",), "score"))


@pytest.mark.parametrize(
    ("snapshot", "reason"),
    [
        pytest.param(situation(), "local_faster", id="an exact tie stays"),
        pytest.param(
            situation(here=replace(HERE, queued_prefill_tokens=1)), "remote_faster", id="one token is queued here"
        ),
        pytest.param(
            situation(there=replace(THERE, queued_prefill_tokens=1)), "local_faster", id="one token is queued there"
        ),
        pytest.param(
            situation(here=replace(HERE, queued_prefill_tokens=500), there=replace(THERE, in_flight_tokens=501)),
            "local_faster",
            id="what we sent there since its report is queued there",
        ),
        pytest.param(
            situation(here=replace(HERE, running_decodes=1)), "remote_faster", id="one running decode would be stalled"
        ),
        pytest.param(situation(overlap=512), "remote_faster", id="the worker holds a prefix that we do not"),
        pytest.param(
            situation(prompt=replace(PROMPT, cached_tokens=512), overlap=500),
            "local_faster",
            id="we hold more of it than the worker",
        ),
        pytest.param(
            situation(here=replace(HERE, running_decodes=4), there=replace(THERE, overhead_s=1.0)),
            "local_faster",
            id="0.8 s of weighed harm against 1 s of overhead",
        ),
        pytest.param(
            situation(here=replace(HERE, running_decodes=6), there=replace(THERE, overhead_s=1.0)),
            "remote_faster",
            id="1.2 s of weighed harm against 1 s of overhead",
        ),
        pytest.param(
            situation(
                here=replace(HERE, queued_prefill_tokens=1_900),
                there=replace(THERE, link=replace(FREE_LINK, wire_bytes_per_token=1e6)),
            ),
            "local_faster",
            id="the whole transfer of one chunk is exposed: 2 s",
        ),
        pytest.param(
            situation(
                here=replace(HERE, queued_prefill_tokens=2_100),
                there=replace(THERE, link=replace(FREE_LINK, wire_bytes_per_token=1e6)),
            ),
            "remote_faster",
            id="a queue here longer than the exposed transfer",
        ),
        pytest.param(
            situation(prompt=replace(PROMPT, deadline_s=2.5), here=replace(HERE, running_decodes=9),
                      there=replace(THERE, queued_prefill_tokens=1_000)),
            "deadline",
            id="sparing the decodes would miss the deadline",
        ),
        pytest.param(
            situation(here=replace(HERE, running_decodes=9, held_kv_tokens=100, held_kv_budget_tokens=2_000)),
            "kv_budget",
            id="too much KV is held for transfers",
        ),
        pytest.param(
            situation(here=replace(HERE, running_decodes=9, held_kv_tokens=0, held_kv_budget_tokens=1_000)),
            "remote_faster",
            id="one transfer is let in however long it is",
        ),
        pytest.param(
            situation(
                prompt=replace(PROMPT, cached_tokens=512, only_offload=True), there=replace(THERE, overhead_s=9.0)
            ),
            "only_offload",
            id="slower elsewhere, and wanted there by admission",
        ),
        pytest.param(
            situation(
                prompt=replace(PROMPT, only_offload=True),
                here=replace(HERE, held_kv_tokens=100, held_kv_budget_tokens=2_000),
            ),
            "kv_budget",
            id="wanted elsewhere, but too much KV is held for transfers",
        ),
        pytest.param(situation(prompt=replace(PROMPT, cached_tokens=1_999)), "cached_enough", id="only the last token"),
        pytest.param(replace(situation(), placement=Placement((), "queue_full")), "queue_full", id="nobody has room"),
        pytest.param(
            replace(situation(), workers=(), overlap_tokens=(), placement=None), "no_workers", id="nobody is configured"
        ),
    ],
)  # fmt: skip
def test_latency(snapshot: Snapshot, reason: str) -> None:
    assert latency(snapshot).reason == reason


def test_the_estimates_are_the_sums_in_their_docstrings() -> None:
    here = replace(
        HERE,
        queued_requests=2,
        queued_prefill_tokens=300,
        running_decodes=3,
        prefill=PrefillModel(0.01, 0.001, 1e-6),
        decode=DecodeModel(0.02, 0.001, 0.0),
    )
    there = replace(
        THERE,
        queued_prefill_tokens=500,
        overhead_s=0.005,
        prefill=PrefillModel(0.01, 0.001, 1e-6),
        link=Link(bytes_per_s=1e6, setup_s=0.003, wire_bytes_per_token=100.0),
    )
    snapshot = situation(prompt=replace(PROMPT, cached_tokens=400), here=here, there=there, overlap=1_000)
    local_s = 2 * 0.01 + 300 * 0.001 + (0.01 + 1.6 + 1e-6 * 1_600 * (400 + 800))
    remote_s = 0.005 + 0.5 + (0.01 + 1.0 + 1e-6 * 1_000 * (1_000 + 500)) + (0.003 + 512 * 1e-4) + 0.024
    assert local_ttft_s(snapshot) == pytest.approx(local_s)
    assert decode_harm_s(snapshot) == pytest.approx(3 * (local_s - 0.32))
    assert remote_ttft_s(snapshot, there, 1_000, chunk_tokens=512) == pytest.approx(remote_s)
    decision = latency(snapshot, chunk_tokens=512)
    assert (decision.local_ttft_s, decision.remote_ttft_s) == (pytest.approx(local_s), pytest.approx(remote_s))


def test_the_transfer_hides_behind_the_prefill_but_for_its_last_chunk() -> None:
    slow_wire = replace(THERE, link=Link(1e6, 0.0, 500.0))  # half a millisecond a token
    snapshot = situation(there=slow_wire)
    assert remote_ttft_s(snapshot, slow_wire, 0, chunk_tokens=100) == pytest.approx(2.0 + 0.05)
    slower = replace(THERE, link=Link(1e6, 0.0, 3_000.0))
    assert remote_ttft_s(snapshot, slower, 0, chunk_tokens=100) == pytest.approx(3e-3 * 1_999)
    assert remote_ttft_s(snapshot, slower, 0, chunk_tokens=4_000) == pytest.approx(2.0 + 3e-3 * 1_999)
    assert remote_ttft_s(snapshot, slow_wire, 0, chunk_tokens=4_000) == pytest.approx(2.0 + 1_999 * 5e-4)


def test_a_placement_that_names_a_stranger_is_an_error() -> None:
    with pytest.raises(ValueError, match="none of 1 workers"):
        latency(replace(situation(), placement=Placement(("p9",), "own")))


def test_without_a_placement_the_least_loaded_is_asked() -> None:
    busy = replace(THERE, worker="p1", queued_prefill_tokens=100)
    snapshot = Snapshot(PROMPT, replace(HERE, running_decodes=9), (busy, THERE))
    decision = latency(snapshot)
    assert isinstance(decision, Offload)
    assert decision.workers == ("p0", "p1")


# -- a longer prompt ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A D and a P whose estimates for the shorter prompt differ by a billionth: the next token decides."""

    model: PrefillModel
    faster: float
    link_s_per_token: float
    held: int
    overlap: int
    batch: int
    chunk: int

    def balanced(self, uncached: int, *, remote: bool) -> "Pair.Side":
        """With the overhead that makes ``uncached`` tokens just remote, or just local."""
        cost_s, remote_s = self.estimates(uncached, overhead_s=0.0)
        if cost_s <= remote_s:
            reject()
        return Pair.Side(self, (cost_s - remote_s) * (1 - 1e-9 if remote else 1 + 1e-9))

    def estimates(self, uncached: int, *, overhead_s: float) -> tuple[float, float]:
        """Local cost and remote TTFT."""
        snapshot = self.snapshot(uncached, overhead_s=overhead_s)
        cost_s = local_ttft_s(snapshot) + 0.1 * decode_harm_s(snapshot)
        return cost_s, remote_ttft_s(snapshot, snapshot.workers[0], self.overlap, chunk_tokens=self.chunk)

    def snapshot(self, uncached: int, *, overhead_s: float) -> Snapshot:
        prompt = replace(PROMPT, prompt_tokens=self.held + uncached, cached_tokens=self.held)
        m, f = self.model, self.faster
        there = replace(
            THERE,
            prefill=PrefillModel(m.base_s, m.per_token_s * f, m.per_pair_s * f),
            link=Link(1e9, 0.001, self.link_s_per_token * 1e9),
            overhead_s=overhead_s,
        )
        here = replace(HERE, prefill=m, running_decodes=self.batch, queued_prefill_tokens=200_000)
        return situation(prompt=prompt, here=here, there=there, overlap=self.overlap)

    @dataclass(frozen=True)
    class Side:
        pair: "Pair"
        overhead_s: float

        def is_remote(self, uncached: int, previous: PolicyState) -> bool:
            snapshot = replace(self.pair.snapshot(uncached, overhead_s=self.overhead_s), previous=previous)
            return isinstance(latency(snapshot, chunk_tokens=self.pair.chunk), Offload)

        def is_a_tie(self, uncached: int) -> bool:
            """Equal but for rounding."""
            cost_s, remote_s = self.pair.estimates(uncached, overhead_s=self.overhead_s)
            return cost_s == pytest.approx(remote_s, rel=1e-8)


models = st.builds(PrefillModel, st.floats(0.0, 0.1), st.floats(1e-5, 1e-2), st.sampled_from([0.0, 1e-8, 1e-7]))


@st.composite
def lengths(draw: st.DrawFn) -> tuple[int, int]:
    shorter = draw(st.integers(2, 20_000))
    return shorter, shorter + draw(st.integers(1, 20_000))


@given(
    model=models,
    faster=st.floats(0.2, 1.0),
    lengths=lengths(),
    caches=st.tuples(st.integers(0, 4_000), st.integers(0, 4_000)),
    batch=st.sampled_from([0, 1, 8, 64]),
    link_share=st.floats(0.0, 0.999),
    chunk=st.sampled_from([1, 64, 512, 2_048, 8_192]),
    previous=st.sampled_from([PolicyState(), PolicyState(remote_sizes=-1)]),
)
def test_a_longer_prompt_never_comes_back_where_the_wire_is_faster_than_our_prefill(
    model: PrefillModel, faster: float, lengths: tuple[int, int], caches: tuple[int, int], batch: int,
    link_share: float, chunk: int, previous: PolicyState,
) -> None:  # fmt: skip
    """The worker is at least as fast as D. Within its last step the wire comes on top of its prefill: there, the wire
    has to cost less than what the worker is faster and the decodes are spared."""
    held, overlap = caches
    shorter, longer = lengths
    link_s = link_share * model.marginal_s(held)
    spared_s = model.marginal_s(held) * (1 + 0.1 * batch) - faster * model.marginal_s(held)
    assume(shorter - 1 >= chunk or link_s <= spared_s)
    assume(overlap < held + shorter)
    side = Pair(model, faster, link_s, held, overlap, batch, chunk).balanced(shorter, remote=True)
    assert side.is_remote(shorter, previous) or side.is_a_tie(shorter)
    assert side.is_remote(longer, previous) or side.is_a_tie(longer)


@given(
    model=models,
    lengths=lengths(),
    held=st.integers(0, 4_000),
    batch=st.sampled_from([0, 1, 8, 64]),
    link_factor=st.floats(1.0, 20.0),
    chunk=st.sampled_from([1, 64, 512, 2_048, 8_192]),
    previous=st.sampled_from([PolicyState(), PolicyState(remote_sizes=-1), PolicyState(local_sizes=-1)]),
)
def test_a_longer_prompt_never_goes_where_the_wire_is_slower_than_our_prefill_and_its_harm(
    model: PrefillModel, lengths: tuple[int, int], held: int, batch: int, link_factor: float, chunk: int,
    previous: PolicyState,
) -> None:  # fmt: skip
    """The wire is the bottleneck: nothing of it hides behind the worker's prefill, or more than the prefill is long."""
    shorter, longer = lengths
    link_s = link_factor * model.marginal_s(held + longer) * (1 + 0.1 * batch)
    assume(longer - 1 <= chunk or link_s * (shorter - 1 - chunk) >= model.seconds(shorter, held))
    side = Pair(model, 1.0, link_s, held, held, batch, chunk).balanced(shorter, remote=False)
    assert not side.is_remote(shorter, previous) or side.is_a_tie(shorter)
    assert not side.is_remote(longer, previous) or side.is_a_tie(longer)


def test_a_longer_prompt_may_come_back_while_its_whole_transfer_is_exposed() -> None:
    """Why these properties have conditions: D and P equally fast, no decodes, the wire ten times faster, one step."""
    side = Pair(SPEED, 1.0, 0.0001, 0, 0, 0, 2_048).balanced(100, remote=True)
    assert side.is_remote(100, PolicyState())
    assert not side.is_remote(1_000, PolicyState())


@given(queue=st.integers(0, 10_000), more=st.integers(1, 10_000), batch=st.integers(0, 32))
def test_a_longer_queue_never_makes_the_worker_more_attractive(queue: int, more: int, batch: int) -> None:
    here = replace(HERE, running_decodes=batch, queued_prefill_tokens=1_000)
    short = latency(situation(here=here, there=replace(THERE, queued_prefill_tokens=queue)))
    long = latency(situation(here=here, there=replace(THERE, queued_prefill_tokens=queue + more)))
    assert isinstance(short, Offload) or isinstance(long, Local)


@given(batch=st.integers(0, 256), overhead_s=st.floats(0, 1))
def test_a_tie_stays(batch: int, overhead_s: float) -> None:
    """Whatever was before: the queue here is made so long that both sides are equal to the last bit."""
    there = replace(THERE, overhead_s=overhead_s)
    here = replace(HERE, running_decodes=batch)
    snapshot = situation(here=here, there=there)
    remote_s = remote_ttft_s(snapshot, there, 0, chunk_tokens=2_048)
    weight = (remote_s - local_ttft_s(snapshot)) / decode_harm_s(snapshot) if batch else 0.0
    assume(local_ttft_s(snapshot) + weight * decode_harm_s(snapshot) == remote_s)
    for previous in (PolicyState(), PolicyState(remote_sizes=-1), PolicyState(local_sizes=-1)):
        decision = latency(replace(snapshot, previous=previous), decode_harm_weight=weight)
        assert decision.reason == "local_faster"


# -- hysteresis -----------------------------------------------------------------------------------------------------


def changes(noise: float, hysteresis: float) -> int:
    """How often 1,000 equal prompts change sides when both sides are equal but for relative noise in the estimates."""
    rng = random.Random(7)
    previous, sides = PolicyState(), []
    for _ in range(1_000):
        model = replace(SPEED, per_token_s=0.001 * (1 + noise * (2 * rng.random() - 1)))
        snapshot = replace(situation(here=replace(HERE, prefill=model)), previous=previous)
        decision = latency(snapshot, hysteresis=hysteresis)
        previous = remember(previous, PROMPT, decision, placed=True)
        sides.append(isinstance(decision, Offload))
    return sum(a != b for a, b in itertools.pairwise(sides))


def test_it_does_not_flap_on_noise_below_the_hysteresis() -> None:
    assert changes(noise=0.02, hysteresis=0.0) > 300
    assert changes(noise=0.02, hysteresis=0.05) <= 1


def test_it_changes_sides_once_the_difference_is_real() -> None:
    stayed = remember(PolicyState(), PROMPT, latency(situation()), placed=True)
    assert stayed.local_sizes
    here = replace(HERE, queued_prefill_tokens=100)  # 2 s there, 2.1 s here: 4.8 %
    assert latency(replace(situation(here=here), previous=stayed)).reason == "local_faster"
    here = replace(HERE, queued_prefill_tokens=110)  # 5.2 %
    went = latency(replace(situation(here=here), previous=stayed))
    assert went.reason == "remote_faster"
    after = remember(stayed, PROMPT, went, placed=True)
    here = replace(HERE, queued_prefill_tokens=1)  # now faster at all is enough
    assert latency(replace(situation(here=here), previous=after)).reason == "remote_faster"


def test_sizes_have_their_own_history() -> None:
    stayed = remember(PolicyState(), replace(PROMPT, prompt_tokens=100), Local("local_faster", 1.0, 1.0), placed=True)
    here = replace(HERE, queued_prefill_tokens=1)
    assert latency(replace(situation(here=here), previous=stayed)).reason == "remote_faster"
