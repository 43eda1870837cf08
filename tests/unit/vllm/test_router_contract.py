"""vLLM's connector as D of a router: the fields of a request lead to the engine that holds its KV, and nowhere else."""

import warnings
from collections.abc import Iterator

import pytest
import torch
from contract.rig import GEOMETRY, PAGE, SEED, Contract, FakePort, introduce

from disagg_plugin.control.router_flow import hand_over_params
from disagg_plugin.kv.geometry import HeadRange
from disagg_plugin.testing import MemoryNetwork, canonical_noise

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, when vLLM imports its compiler
    from contract.vllm_rig import VllmRig

    from disagg_vllm.metadata import RankHandshake

TOKENS = 200
PROMPT = list(range(1_000, 1_000 + TOKENS))
TID = bytes(range(16))
PARAMS = hand_over_params(TID, engine="p", host="p", port=1, block_ids=[1], tokens=TOKENS, tensor_parallel=1)


@pytest.fixture
def contract(monkeypatch: pytest.MonkeyPatch) -> Iterator[Contract]:
    network, port = MemoryNetwork(manual=True), FakePort()
    rig = VllmRig(network, port, monkeypatch)
    held = Contract(rig, port, network, introduce(port, rig.plane, network))
    held.turn(2)
    yield held
    for plane in (held.rig.plane, held.peer.plane):
        plane.close()


def send(contract: Contract, request_id: str, prompt: list[int], **params: object) -> None:
    assert isinstance(contract.rig, VllmRig)
    contract.rig.send(request_id, prompt, **params)
    contract.turn()


@pytest.mark.parametrize("tokens", [3, TOKENS], ids=["however short", "long"])
def test_a_prompt_that_was_handed_over_is_fetched(contract: Contract, tokens: int) -> None:
    send(contract, "r", PROMPT[:tokens], **PARAMS)
    (call,) = contract.port.offers
    assert (call.transfer_id, call.held, call.post, call.workers) == (TID, True, False, ("p:1",))
    contract.accept()
    contract.peer.compute(call, contract.port.readies[-1], tokens)
    while contract.network.pending:
        for write in list(contract.network.pending):
            contract.network.deliver(write)
        contract.turn(2)
    assert contract.rig.runnable("r") == tokens - 1
    expected = canonical_noise(GEOMETRY, HeadRange(0, GEOMETRY.kv_heads), SEED, tokens)[:, :, :, : tokens - 1]
    got = contract.rig.kv_of("r", tokens - 1)
    assert isinstance(got, torch.Tensor)
    assert torch.equal(got, expected)
    contract.rig.end("r")
    contract.assert_nothing_leaked()


def test_a_lease_that_ends_while_kv_streams_keeps_what_landed_and_nothing_else(contract: Contract) -> None:
    send(contract, "r", PROMPT, **PARAMS)
    call = contract.accept()
    contract.peer.compute(call, contract.port.readies[-1], 100)
    while contract.network.pending:
        for write in list(contract.network.pending):
            contract.network.deliver(write)
        contract.turn(2)
    contract.fail(call, "hold_expired")
    assert contract.rig.runnable("r") == 100 // PAGE * PAGE
    contract.rig.end("r")
    contract.assert_nothing_leaked_here()


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"remote_host": "elsewhere"}, id="a host that is not allowed"),
        pytest.param({"remote_request_id": "cmpl-1"}, id="an id that is none"),
        pytest.param({"remote_port": None}, id="no port"),
    ],
)
def test_what_cannot_be_fetched_is_computed(contract: Contract, changed: dict[str, object]) -> None:
    send(contract, "r", PROMPT, **{**PARAMS, **changed})
    contract.turn(3)
    assert contract.port.offers == []
    assert contract.rig.runnable("r") == 0
    contract.rig.end("r")
    contract.assert_nothing_leaked()


def test_an_abort_before_p_answers_leaves_nothing(contract: Contract) -> None:
    send(contract, "r", PROMPT, **PARAMS)
    contract.rig.abort("r")
    assert contract.port.cancels == [(TID, "aborted")]
    contract.assert_nothing_leaked()


def test_a_handshake_that_comes_again_changes_nothing(contract: Contract) -> None:
    """vLLM 0.33 calls it at each wake-up, also of an engine that does not sleep."""
    assert isinstance(contract.rig, VllmRig)
    send(contract, "r", PROMPT, **PARAMS)
    before = contract.rig.scheduler._decode, contract.rig.scheduler._service
    contract.rig.scheduler.ranks_ready({0: RankHandshake(0, contract.rig.plane.endpoint, GEOMETRY)})
    assert (contract.rig.scheduler._decode, contract.rig.scheduler._service) == before
    contract.accept()
    assert contract.port.readies, "the request that waited goes on"
