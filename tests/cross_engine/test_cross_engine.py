"""Prefill on one engine, decode on the other: one wire form, one fingerprint, one digest, and whose token is the first.

Four real engines at once, two of each family: the only place where both are alive. Run by the Makefile, which says
where SGLang is.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
from either_engine import Server, agreement, at_once, prompt_of, start
from models import tiny

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2400)]

MARGIN = 1e-3  # logprobs: two engines round differently


@dataclass
class Crossed:
    """Each decode engine's only prefill worker is of the other family."""

    vllm_decode: Server
    sglang_decode: Server


@pytest.fixture(scope="module")
def crossed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crossed]:
    folder = tmp_path_factory.mktemp("crossed")
    with ExitStack() as stack:
        vllm, sglang = at_once(
            [
                lambda: start(stack, folder, "vllm-prefill", "vllm", tiny(), role="prefill", core=0),
                lambda: start(stack, folder, "sglang-prefill", "sglang", tiny(), role="prefill"),
            ]
        )
        vllm_decode, sglang_decode = at_once(
            [
                lambda: start(stack, folder, "vllm-decode", "vllm", tiny(), role="decode", workers=[sglang], core=1),
                lambda: start(stack, folder, "sglang-decode", "sglang", tiny(), role="decode", workers=[vllm]),
            ]
        )
        pair = Crossed(vllm_decode, sglang_decode)
        for server in (vllm_decode, sglang_decode):
            server.wait_for_workers()  # fingerprint and digest of the two families are equal, or there is none
            server.generate(prompt_of(600, seed=99))  # the first transfer wires the NIXL agents up
        yield pair


@pytest.fixture(params=["vllm_decode", "sglang_decode"])
def decode(crossed: Crossed, request: pytest.FixtureRequest) -> Server:
    server: Server = getattr(crossed, request.param)
    server.wait_for_workers()
    return server


@pytest.mark.parametrize("tokens", [33, 100, 257, 1_000])
def test_the_tokens_are_those_of_a_local_prefill(decode: Server, tokens: int) -> None:
    prompt = prompt_of(tokens, seed=1)
    before = decode.landed()
    offloaded = decode.generate(prompt, ignore_eos=True)
    assert decode.landed() == before + 1
    share, worst_gap = agreement([(offloaded, decode.generate(prompt, ignore_eos=True, local=True))])
    assert share == 1 or worst_gap < MARGIN


def test_temperature_with_a_seed_is_the_decode_engines(crossed: Crossed) -> None:
    """The decode engine computes the last prompt token itself, so sampling is as without us (vLLM honours seeds)."""
    decode = crossed.vllm_decode
    decode.wait_for_workers()
    prompt = prompt_of(150, seed=2)
    sampling = {"temperature": 0.8, "seed": 1234, "ignore_eos": True}
    before = decode.landed()
    offloaded = decode.generate(prompt, **sampling)
    assert decode.landed() == before + 1
    assert offloaded.tokens == decode.generate(prompt, local=True, **sampling).tokens


def test_a_json_grammar_is_the_decode_engines(decode: Server) -> None:
    prompt = prompt_of(150, seed=3)
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    grammar = {"structured_outputs": {"json": schema}} if decode.kind == "vllm" else {"json_schema": json.dumps(schema)}
    before = decode.landed()
    offloaded = decode.generate(prompt, max_tokens=12, **grammar)
    assert decode.landed() == before + 1
    share, worst_gap = agreement([(offloaded, decode.generate(prompt, max_tokens=12, local=True, **grammar))])
    assert share == 1 or worst_gap < MARGIN
