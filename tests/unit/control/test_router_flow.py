"""A router drives P, then D: P holds the KV under a lease, D fetches it; what is late or wrong is computed again."""

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from unit.control.decode_bench import LONG
from unit.control.decode_bench import Bench as DecodeBench
from unit.control.test_prefill_side import Bench as PrefillBench

from disagg_plugin.allowed_hosts import DP_RANKS, AllowedHosts
from disagg_plugin.config import load_settings
from disagg_plugin.control.decode_port import NotYet, PrefillLocally, PromptView, Route
from disagg_plugin.control.events import Held, PeerLeft, PrefillFailed, TicketCancelled, TicketOffered, TicketReady
from disagg_plugin.control.events import TicketRenewed as Renewed
from disagg_plugin.control.offload_call import prompt_digest
from disagg_plugin.control.router_flow import hand_over_params, handed_over, wants_hold
from disagg_plugin.errors import ConfigError
from disagg_plugin.kv.commands import DropSend, OpenSend, RankReport, ReleaseWhenStaged

PROMPT = tuple(range(1_000))
HELD = Held(PROMPT, ("lora", "salt"))
TID = bytes(range(16))
SAID = hand_over_params(
    TID, engine="p-host:5600", host="10.0.0.1", port=5600, block_ids=[3, 4], tokens=9, tensor_parallel=2
)


class Holder(PrefillBench):
    """A prefill engine that computed a prompt for a router."""

    def compute(self, **more: Any) -> bytes:
        self.side.hold("r1", HELD)
        self.side.scheduled("r1", 1_000, [1, 2])
        self.side.step()
        assert self.side.finished("r1", completed=True)
        held = self.side.held_as("r1")
        assert held is not None
        return held

    def claim(self, transfer_id: bytes, peer: str = "d:1") -> None:
        self.port.events.append(TicketOffered(transfer_id, 7, peer, 1_000, "raw", 300.0, 1, held=True))

    def end(self) -> None:
        """The ranks let go of the blocks."""
        self.side.step()
        self.side.released("r1")


def test_what_p_answers_is_what_d_understands() -> None:
    handed = handed_over(SAID)
    assert handed is not None
    assert (handed.transfer_id, handed.engine, handed.host, handed.port) == (TID, "p-host:5600", "10.0.0.1", 5600)


def test_p_answers_with_every_field_that_nixlconnector_has() -> None:
    names = (
        "do_remote_prefill do_remote_decode remote_block_ids remote_engine_id remote_request_id remote_host remote_port"
    )
    names += " tp_size dcp_size pp_size remote_num_tokens remote_blocks_expiry_time transfer_mode"
    assert set(SAID) == set(names.split())


@pytest.mark.parametrize(
    "params",
    [
        pytest.param(None, id="none"),
        pytest.param([SAID], id="no mapping"),
        pytest.param({**SAID, "do_remote_prefill": False}, id="not handed over"),
        pytest.param({**SAID, "do_remote_prefill": "yes"}, id="a text for a truth"),
        pytest.param({**SAID, "remote_request_id": None}, id="no id"),
        pytest.param({**SAID, "remote_request_id": "cmpl-1234"}, id="an id of another connector"),
        pytest.param({**SAID, "remote_request_id": "zz" * 16}, id="no hex"),
        pytest.param({**SAID, "remote_request_id": "a " * 16}, id="blanks"),
        pytest.param({**SAID, "remote_port": 0}, id="port 0"),
        pytest.param({**SAID, "remote_port": "5600"}, id="a text for a port"),
        pytest.param({**SAID, "remote_port": True}, id="a truth for a port"),
        pytest.param({**SAID, "remote_host": ["10.0.0.1"]}, id="a list for a host"),
    ],
)
def test_what_makes_no_sense_is_no_hand_over(params: object) -> None:
    assert handed_over(params) is None


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda c: st.lists(c) | st.dictionaries(st.text(), c)
    )
)
def test_whatever_a_client_sends_is_read_without_an_error(value: object) -> None:
    for params in (value, {**SAID, "remote_request_id": value}, {**SAID, "remote_host": value, "remote_port": value}):
        handed_over(params)
        wants_hold(params)


# -- which hosts --


@pytest.mark.parametrize(
    ("entry", "host", "port", "allowed"),
    [
        ("10.0.0.5", "10.0.0.5", 5600, True),
        ("10.0.0.5", "10.0.0.5", 5600 + DP_RANKS - 1, True),
        ("10.0.0.5", "10.0.0.5", 5600 + DP_RANKS, False),
        ("10.0.0.5", "10.0.0.6", 5600, False),
        ("10.0.0.5:7000", "10.0.0.5", 7000, True),
        ("10.0.0.5:7000", "10.0.0.5", 5600, False),
        ("10.0.0.0/24", "10.0.0.77", 5600, True),
        ("10.0.0.0/24", "10.0.1.77", 5600, False),
        ("10.0.0.0/24:7000", "10.0.0.77", 7000, True),
        ("10.0.0.0/24", "prefill-0", 5600, False),
        ("prefill-0.svc", "Prefill-0.svc", 5600, True),
        ("prefill-0.svc", "prefill-0.svc.evil.example", 5600, False),
        ("fd00::/8", "fd00::1", 5600, True),
        ("[fd00::1]:7000", "fd00::1", 7000, True),
        ("fd00::/8", "10.0.0.1", 5600, False),
    ],
)
def test_hosts_are_allowed_as_written(entry: str, host: str, port: int, allowed: bool) -> None:
    assert AllowedHosts([entry], default_port=5600).allows(host, port) is allowed


def test_an_empty_list_allows_nothing() -> None:
    assert not AllowedHosts([], default_port=5600).allows("127.0.0.1", 5600)


@pytest.mark.parametrize("entry", ["", "host:", "host:0", "host:65536", "10.0.0.0/33", "10.0.0.1/24", "two words"])
def test_an_entry_that_is_none_is_a_mistake_of_the_settings(entry: str) -> None:
    with pytest.raises(ConfigError, match="allowed_hosts"):
        load_settings({"router": {"allowed_hosts": [entry]}})


# -- P holds --


def test_p_holds_until_d_fetches() -> None:
    bench = Holder()
    transfer_id = bench.compute()
    assert bench.port.held_ids == {transfer_id: HELD}
    assert bench.side.step() == [ReleaseWhenStaged(transfer_id, "r1")]
    bench.claim(transfer_id)
    bench.port.events.append(TicketReady(transfer_id, 64, 999))
    assert bench.side.step() == [OpenSend(transfer_id, 7, "d:1", 64, 999, "raw")]
    bench.side.reports([RankReport(0, staged=(transfer_id,), sent=(transfer_id,))])
    bench.side.released("r1")
    assert bench.nothing_left()
    assert bench.side.totals == {"held": 1, "claimed": 1, "sent": 1}


def test_nobody_is_told_that_a_routers_prompt_started() -> None:
    bench = Holder()
    bench.compute()
    assert [what for what, _ in bench.port.sent] == []


def test_a_lease_ends_when_nobody_comes() -> None:
    bench = Holder()
    transfer_id = bench.compute()
    bench.side.step()
    bench.now += 31.0
    assert bench.side.step() == [DropSend(transfer_id, "hold_expired")]
    assert bench.port.held_ids == {}
    bench.end()
    assert bench.nothing_left()


def test_who_comes_after_the_lease_is_told_so_and_gets_nothing() -> None:
    bench = Holder()
    transfer_id = bench.compute()
    bench.now += 31.0
    bench.side.step()
    bench.claim(transfer_id)
    bench.port.events.append(TicketReady(transfer_id, 0, 999))
    assert not any(isinstance(command, OpenSend) for command in bench.side.step())
    assert bench.port.sent[-1] == ("cancel", "hold_expired")


def test_a_lease_is_renewed_while_d_waits_for_room() -> None:
    bench = Holder()
    transfer_id = bench.compute()
    bench.claim(transfer_id)
    for _ in range(6):
        bench.now += 20.0
        bench.port.events.append(Renewed(transfer_id))
        assert not any(isinstance(command, DropSend) for command in bench.side.step())
    bench.now += 31.0
    assert bench.side.step() == [DropSend(transfer_id, "hold_expired")]
    assert ("cancel", "hold_expired") in bench.port.sent


def test_a_held_prompt_is_handed_over_once() -> None:
    bench = Holder()
    transfer_id = bench.compute()
    bench.claim(transfer_id, "d:1")
    bench.claim(transfer_id, "d:2")
    bench.port.events.append(TicketReady(transfer_id, 0, 999))
    assert [c.peer for c in bench.side.step() if isinstance(c, OpenSend)] == ["d:1"]


def test_nothing_is_sent_before_somebody_has_offered_to_take_it() -> None:
    bench = Holder()
    transfer_id = bench.compute()
    bench.side.step()
    bench.port.events.append(TicketReady(transfer_id, 0, 999))
    assert bench.side.step() == []


@pytest.mark.parametrize("event", [lambda t: TicketCancelled(t, "aborted"), lambda _: PeerLeft("d:1", "peer_lost")])
def test_blocks_are_free_when_d_gives_up_or_goes(event: Callable[[bytes], Any]) -> None:
    bench = Holder()
    transfer_id = bench.compute()
    bench.claim(transfer_id)
    bench.side.step()
    bench.port.events.append(event(transfer_id))
    assert isinstance(bench.side.step()[-1], DropSend)
    bench.end()
    assert bench.nothing_left()


def test_held_prompts_take_a_bounded_share_of_the_cache() -> None:
    bench = Holder(capacity_tokens=3_000)
    bench.compute()
    bench.side.hold("r2", HELD)
    bench.side.scheduled("r2", 1_000, [3, 4])
    assert not bench.side.finished("r2", completed=True)
    assert bench.side.held_as("r2") is None
    assert bench.side.drops == {"hold_full": 1}


def test_an_engine_short_of_blocks_does_not_wait_for_a_router() -> None:
    """vLLM would preempt nobody as long as it hears that blocks are about to be free."""
    bench = Holder()
    transfer_id = bench.compute()
    assert not bench.side.holds_blocks
    bench.claim(transfer_id)
    bench.port.events.append(TicketReady(transfer_id, 0, 999))
    bench.side.step()
    assert bench.side.holds_blocks


def test_an_aborted_first_half_is_not_held() -> None:
    bench = Holder()
    bench.side.hold("r1", HELD)
    bench.side.scheduled("r1", 500, [1])
    assert not bench.side.finished("r1", completed=False)
    bench.side.step()
    assert bench.nothing_left()


# -- D fetches --

ROUTED = PromptView("r1", LONG.token_ids, route=Route("p:1", held=TID), lora="lora", cache_salt="salt")


def test_d_opens_a_ticket_under_the_id_that_the_router_brought() -> None:
    bench = DecodeBench()
    assert bench.match(ROUTED) == NotYet()
    (call,) = bench.port.offers
    assert (call.transfer_id, call.workers, call.post, call.held) == (TID, ("p:1",), False, True)
    assert call.under == ("lora", "salt")
    bench.accepted()
    assert bench.match(ROUTED) != NotYet()


def test_an_id_that_comes_twice_is_fetched_once() -> None:
    bench = DecodeBench()
    assert bench.match(ROUTED) == NotYet()
    twin = PromptView("r2", LONG.token_ids, route=ROUTED.route)
    assert bench.match(twin) == PrefillLocally("handed_over_twice")
    assert len(bench.port.offers) == 1


def test_d_computes_what_p_does_not_hold_any_more() -> None:
    bench = DecodeBench()
    bench.match(ROUTED)
    bench.port.events.append(PrefillFailed(TID, "refused_hold_expired"))
    assert bench.match(ROUTED) == PrefillLocally("refused_hold_expired")
    assert bench.side.fallbacks == {"refused_hold_expired": 1}


def test_d_lets_p_go_of_what_it_must_compute_itself() -> None:
    bench = DecodeBench()
    prompt = PromptView("r1", LONG.token_ids, "prompt_logprobs", route=ROUTED.route)
    assert bench.match(prompt) == PrefillLocally("prompt_logprobs")
    assert bench.port.sent == [("cancel", "p:1", "prompt_logprobs")]


@pytest.mark.parametrize(("cached", "lmcache"), [(999, 0), (64, 999)])
def test_d_lets_p_go_at_once_of_what_it_and_lmcache_hold_whole(cached: int, lmcache: int) -> None:
    bench = DecodeBench()
    answer = bench.side.match(ROUTED, cached, free_tokens=100_000, lmcache_tokens=lmcache)
    assert answer == PrefillLocally("prefix_held")
    assert bench.port.sent == [("cancel", "p:1", "prefix_held")]
    assert bench.port.offers == []


@given(st.lists(st.integers(0, 99)), st.text(max_size=3), st.text(max_size=3), st.text(max_size=3), st.text(max_size=3))
def test_a_digest_is_of_prompt_adapter_and_salt(ids: list[int], lora: str, salt: str, lora2: str, salt2: str) -> None:
    same = (lora, salt) == (lora2, salt2)
    assert (prompt_digest(ids, lora, salt) == prompt_digest(ids, lora2, salt2)) is same
