"""The connectors whose engine this environment has; together the two environments run the suite against both."""

import sys
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from contract.rig import Contract, DecodeRig, FakePort, introduce

from disagg_plugin.testing import MemoryNetwork

CONNECTORS = [name for name in ("vllm", "vllm 0.30", "sglang") if find_spec(name.partition(" ")[0])]


def rig_of(name: str, network: MemoryNetwork, port: FakePort, monkeypatch: pytest.MonkeyPatch) -> DecodeRig:
    """The rig of one connector; engines warn of much while they are imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name.startswith("vllm"):
            from contract.vllm_rig import VllmRig

            return VllmRig(network, port, monkeypatch, ends_empty_steps=name != "vllm 0.30")
        standins = str(Path(__file__).parents[1] / "sglang_standins")
        if standins not in sys.path:
            sys.path.append(standins)
        from contract.sglang_rig import SglangRig

        return SglangRig(network, port)


@pytest.fixture(params=CONNECTORS)
def contract(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Contract]:
    """One connector, a peer that it knows, and a network that delivers when told."""
    network, port = MemoryNetwork(manual=True), FakePort()
    rig = rig_of(request.param, network, port, monkeypatch)
    held = Contract(rig, port, network, introduce(port, rig.plane, network))
    held.turn(2)
    yield held
    for plane in (held.rig.plane, held.peer.plane):
        plane.close()
