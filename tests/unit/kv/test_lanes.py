"""Tensor parallelism may differ: every head of every token arrives at every rank that needs it, exactly once."""

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_plugin.config import TransferSettings
from disagg_plugin.errors import ConfigError
from disagg_plugin.kv.commands import (
    AbandonReceive,
    AddPeer,
    Computed,
    OpenReceive,
    OpenSend,
    RankEndpoint,
    ReleaseWhenStaged,
)
from disagg_plugin.kv.dataplane import DataPlane, agent_name
from disagg_plugin.kv.geometry import HeadRange, KVGeometry, heads_of_rank, plan_exchanges, senders_per_receiver
from disagg_plugin.kv.lanes import lanes_of
from disagg_plugin.testing import DenseView, MemoryNetwork, canonical_noise

SIZES = (1, 2, 4, 8)
ALL = list(itertools.product(SIZES, SIZES, (1, 2, 4, 8, 16)))  # prefill ranks, decode ranks, KV heads
ID, NONCE, SEED, TOKENS = b"transfer-0000001", 0xFEED, 3, 70
BLOCKS = tuple(range(1, 12))
LEAKS = ("open_sends", "open_receives", "slots_in_use", "slots_quarantined", "private_buffers_in_use", "unanswered")


@pytest.mark.parametrize(("prefill_tp", "decode_tp", "kv_heads"), ALL)
def test_every_head_goes_to_every_rank_that_holds_it_once(prefill_tp: int, decode_tp: int, kv_heads: int) -> None:
    plan = plan_exchanges(kv_heads, prefill_tp, decode_tp)
    for rank in range(decode_tp):
        wanted = heads_of_rank(kv_heads, rank, decode_tp)
        got = sorted(h for e in plan if e.decode_rank == rank for h in range(e.heads.start, e.heads.stop))
        assert got == list(range(wanted.start, wanted.stop))
    for exchange in plan:
        held = heads_of_rank(kv_heads, exchange.prefill_rank, prefill_tp)
        assert held.start <= exchange.heads.start
        assert exchange.heads.stop <= held.stop


@pytest.mark.parametrize(("prefill_tp", "decode_tp", "kv_heads"), ALL)
def test_replicas_share_the_work(prefill_tp: int, decode_tp: int, kv_heads: int) -> None:
    """A head that several prefill ranks hold does not burden one of them with every decode rank."""
    plan = plan_exchanges(kv_heads, prefill_tp, decode_tp)
    sent = [sum(e.heads.count for e in plan if e.prefill_rank == rank) for rank in range(prefill_tp)]
    everything = sum(sent)
    busiest = -(-everything // min(prefill_tp, everything))
    assert max(sent) <= busiest


def endpoints(count: int) -> tuple[RankEndpoint, ...]:
    return tuple(RankEndpoint(rank, f"agent-{rank}", b"", 0, 4096, 64) for rank in range(count))


@given(st.sampled_from(ALL), st.integers(8, 40), st.integers(0, 100))
def test_both_sides_compute_the_same_lanes_and_no_two_share_a_slot(
    sizes: tuple[int, int, int], slots: int, first: int
) -> None:
    prefill_tp, decode_tp, kv_heads = sizes
    seen_by_prefill, seen_by_decode = set(), set()
    to_decode = AddPeer("d", 1, endpoints(decode_tp), first, slots, receives=False, our_ranks=prefill_tp)
    from_prefill = AddPeer("p", 1, endpoints(prefill_tp), first, slots, receives=True, our_ranks=decode_tp)
    for rank in range(prefill_tp):
        held = heads_of_rank(kv_heads, rank, prefill_tp)
        for lane in lanes_of(to_decode, kv_heads=kv_heads, rank=rank, held=held):
            seen_by_prefill.add((rank, lane.endpoint.rank, lane.heads, lane.region))
    for rank in range(decode_tp):
        held = heads_of_rank(kv_heads, rank, decode_tp)
        lanes = lanes_of(from_prefill, kv_heads=kv_heads, rank=rank, held=held)
        used = [slot for lane in lanes for slot in range(lane.region.slots)]
        assert used
        taken = [lane.region.slot(slot) for lane in lanes for slot in range(lane.region.slots)]
        assert len(set(taken)) == len(taken)
        assert set(taken) <= set(range(first, first + slots))
        seen_by_decode |= {(lane.endpoint.rank, rank, lane.heads, lane.region) for lane in lanes}
    assert seen_by_prefill == seen_by_decode


def test_a_region_too_small_for_all_senders_is_refused_with_both_numbers() -> None:
    peer = AddPeer("p", 1, endpoints(8), 0, 4, receives=True, our_ranks=1)
    with pytest.raises(ConfigError, match=r"8 prefill ranks share a region .* 4"):
        lanes_of(peer, kv_heads=8, rank=0, held=HeadRange(0, 8))
    assert senders_per_receiver(8, 8, 1) == 8


@dataclass
class Engines:
    """All ranks of P and D over one network in memory; time is a number."""

    network: MemoryNetwork
    prefill: list[DataPlane]
    decode: list[DataPlane]
    prefill_views: list[DenseView]
    decode_views: list[DenseView]

    def step(self) -> None:
        for plane in (*self.prefill, *self.decode):
            plane.after_forward(computed=False)
            plane.pump_once()

    def close(self) -> None:
        for plane in (*self.prefill, *self.decode):
            plane.close()


def engines(prefill_tp: int, decode_tp: int, kv_heads: int, *, manual: bool = False) -> Engines:
    geometry = KVGeometry(layers=2, kv_heads=kv_heads, head_dim=16, dtype="float32")
    network = MemoryNetwork(manual=manual)
    transfer = TransferSettings(
        codec="raw", compile=False, guard_tokens=0, guard_limit=10.0, slot_bytes=8192, region_slots=8,
        ring_max_bytes=128 * 8192, scatter_budget_ms=1000, scatter_idle_budget_ms=1000,
    )  # fmt: skip
    sides: dict[str, list[DataPlane]] = {"p": [], "d": []}
    views: dict[str, list[DenseView]] = {"p": [], "d": []}
    for name, tp, block in (("p", prefill_tp, 16), ("d", decode_tp, 8)):
        for rank in range(tp):
            heads = heads_of_rank(kv_heads, rank, tp)
            view = DenseView(geometry, blocks=14, block_size=block, heads=heads)
            views[name].append(view)
            sides[name].append(
                DataPlane(
                    engine=name,
                    epoch=1,
                    rank=rank,
                    view=view,
                    transfer=transfer,
                    transport=network.transport(agent_name(name, rank, 1)),
                    threaded=False,
                )
            )
    known = {name: tuple(plane.endpoint for plane in planes) for name, planes in sides.items()}
    for name, other in (("p", "d"), ("d", "p")):
        peer = AddPeer(other, 1, known[other], 8, 8, receives=name == "d", our_ranks=len(known[name]))
        for plane in sides[name]:
            plane.apply([peer])
            plane.pump_once()
    return Engines(network, sides["p"], sides["d"], views["p"], views["d"])


def transfer(made: Engines, codec: str) -> list[set[str]]:
    """One request from P to D; which requests each decode rank completed."""
    geometry = made.decode_views[0].geometry
    for plane in made.decode:
        plane.apply([OpenReceive("r", ID, NONCE, "p", 0, TOKENS, BLOCKS)])
    noise = canonical_noise(geometry, HeadRange(0, geometry.kv_heads), SEED, TOKENS)
    for view, plane in zip(made.prefill_views, made.prefill, strict=True):
        for layer, side in itertools.product(range(geometry.layers), range(geometry.sides)):
            view.scatter(layer, side, BLOCKS, 0, TOKENS, noise[layer, side, view.heads.start : view.heads.stop])
        plane.apply([OpenSend(ID, NONCE, "d", 0, TOKENS, codec), Computed(ID, TOKENS, BLOCKS)])
        plane.apply([ReleaseWhenStaged(ID, "p-request")])
    completed: list[set[str]] = [set() for _ in made.decode]
    for _ in range(60):
        made.step()
        for rank, plane in enumerate(made.decode):
            done = plane.take_completions()
            assert not set(done.received) & completed[rank], "once"
            completed[rank] |= set(done.received)
            assert done.invalid_block_ids == frozenset()
    return completed


@pytest.mark.parametrize("codec", ["raw", "int8"])
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("decode_tp", SIZES)
@pytest.mark.parametrize("prefill_tp", SIZES)
def test_kv_arrives_whatever_the_tensor_parallelism(prefill_tp: int, decode_tp: int, kv_heads: int, codec: str) -> None:
    made = engines(prefill_tp, decode_tp, kv_heads)
    assert transfer(made, codec) == [{"r"}] * decode_tp
    geometry = made.decode_views[0].geometry
    noise = canonical_noise(geometry, HeadRange(0, kv_heads), SEED, TOKENS)
    for view in made.decode_views:
        wanted = noise[:, :, view.heads.start : view.heads.stop]
        error = (view.read(BLOCKS, 0, TOKENS) - wanted).abs().max()
        assert error <= (0.0 if codec == "raw" else 0.05)
    for plane in made.prefill:
        assert plane.take_completions().released == ("p-request",)
        assert plane.report().sent == (ID,), "a rank without lanes has nothing to send, and says so"
    for plane in (*made.prefill, *made.decode):
        counters = plane.counters()
        assert {leak: counters[leak] for leak in LEAKS} == dict.fromkeys(LEAKS, 0)
        assert counters["internal_errors"] == counters["hook_errors"] == 0
    assert made.network.open_handles == 0
    made.close()


def test_what_counts_as_landed_is_what_all_heads_have() -> None:
    """One of two senders is silent: the tokens that the other one brought are computed again."""
    made = engines(2, 1, 2, manual=True)
    made.decode[0].apply([OpenReceive("r", ID, NONCE, "p", 0, TOKENS, BLOCKS)])
    for rank, plane in enumerate(made.prefill):
        made.prefill_views[rank].fill(BLOCKS, SEED, tokens=TOKENS)
        plane.apply([OpenSend(ID, NONCE, "d", 0, TOKENS, "raw"), Computed(ID, 32 if rank else TOKENS, BLOCKS)])
    for _ in range(8):
        made.step()
        for write in list(made.network.pending):
            made.network.deliver(write)
    made.decode[0].apply([AbandonReceive("r", "stalled")])
    done = made.decode[0].take_completions()
    assert done.received == ("r",)
    assert done.invalid_block_ids == frozenset(BLOCKS[32 // 8 : -(-TOKENS // 8)])
    made.close()
