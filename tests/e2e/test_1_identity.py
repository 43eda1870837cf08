"""With codec raw, an offloaded prompt gives exactly what a local prefill gives, whatever its length or form."""

from collections.abc import Callable
from typing import Any

import pytest
from e2e.client import Answer, at_once, same_tokens
from e2e.conftest import BLOCK, THRESHOLD, TINY_TOKEN_BYTES, Fleet
from e2e.offloads import Offloads, assert_offloaded_as_local, prompt_of
from engine_processes import slowed

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]


@pytest.mark.parametrize(
    "tokens",
    [
        pytest.param(BLOCK - 1, id="one under the block size"),
        pytest.param(BLOCK, id="exactly one block"),
        pytest.param(BLOCK + 1, id="one over the block size"),
        pytest.param(4 * BLOCK, id="a multiple of the block size"),
        pytest.param(400, id="less than a scheduler chunk"),
        pytest.param(512, id="exactly one scheduler chunk"),
        pytest.param(1_500, id="several scheduler chunks"),
        pytest.param(3_000, id="six scheduler chunks"),
    ],
)
def test_an_offloaded_prompt_gives_what_a_local_prefill_gives(pair: Fleet, tokens: int) -> None:
    totals = assert_offloaded_as_local(pair, prompt_of(tokens), cache_salt=f"identity-{tokens}")
    assert totals["raw_bytes"] == (tokens - 1) * TINY_TOKEN_BYTES


def test_only_the_tokens_that_decode_lacks_travel(pair: Fleet) -> None:
    prompt = prompt_of(1_000, seed=1)
    assert_offloaded_as_local(pair, prompt[:700], cache_salt="prefix")
    totals = assert_offloaded_as_local(pair, prompt, cache_salt="prefix")
    cached = 700 // BLOCK * BLOCK
    assert totals["raw_bytes"] == (1_000 - 1 - cached) * TINY_TOKEN_BYTES
    assert totals["wire_bytes"] < 1.02 * totals["raw_bytes"]


def test_a_prompt_that_prefill_has_cached_is_sent_whole(pair: Fleet) -> None:
    prompt = prompt_of(600, seed=2)
    pair.prefill.complete(prompt, cache_salt="only-p")
    totals = assert_offloaded_as_local(pair, prompt, cache_salt="only-p")
    assert totals["raw_bytes"] == 599 * TINY_TOKEN_BYTES


def test_sixteen_at_once_are_all_right(pair: Fleet) -> None:
    prompts = [prompt_of(200 + 50 * i, seed=3) for i in range(16)]
    counted = Offloads(pair.decode)
    answers: list[Answer] = at_once([lambda p=p: pair.decode.complete(p, cache_salt="many") for p in prompts])
    totals = counted.totals()
    assert (totals["offered"], totals["landed"], totals["fallbacks"]) == (16, 16, 0)
    for prompt, got in zip(prompts, answers, strict=True):
        local = pair.stock.complete(prompt, cache_salt="local")
        assert_same_up_to_batching(got, local)


def assert_same_up_to_batching(got: Answer, local: Answer) -> None:
    """Requests that decode in one batch may round differently: a first difference must stand at a close call."""
    for position, (ours, theirs) in enumerate(zip(got.tokens, local.tokens, strict=True)):
        if ours != theirs:
            assert local.top2_gaps[position] < 2e-2, f"token {position}: {ours!r} is not {theirs!r}"
            return


@pytest.mark.parametrize(
    "ask",
    [
        pytest.param(lambda e, p: e.stream(p, cache_salt="stream"), id="streaming"),
        pytest.param(
            lambda e, p: sorted(a.text for a in e.choices(p, n=2, temperature=0.5, top_k=1, cache_salt="n=2")), id="n=2"
        ),
        pytest.param(lambda e, p: e.chat(" ".join(str(t) for t in p[:150])), id="chat"),
        pytest.param(lambda e, p: e.complete(" ".join(str(t) for t in p[150:300])).text, id="text prompt"),
    ],
)
def test_every_form_of_request_is_offloaded_and_right(pair: Fleet, ask: Callable[..., Any]) -> None:
    prompt = prompt_of(500, seed=4)
    counted = Offloads(pair.decode)
    got = ask(pair.decode, prompt)
    totals = counted.totals()
    assert totals["landed"] >= 1
    assert totals["fallbacks"] == 0
    assert got == ask(pair.stock, prompt)


def test_a_short_prompt_stays_local(pair: Fleet) -> None:
    counted = Offloads(pair.decode)
    prompt = prompt_of(THRESHOLD, seed=5)
    got = pair.decode.complete(prompt)
    assert counted.totals()["offered"] == 0
    assert same_tokens(got, pair.stock.complete(prompt, cache_salt="local"))
    assert pair.decode.snapshot()["decode"]["decisions"]["short_prompt"] >= 1


def test_the_first_chunk_lands_before_the_last_one_is_computed(pair: Fleet) -> None:
    with slowed(pair.prefill):
        assert_offloaded_as_local(pair, prompt_of(3_000, seed=6), cache_salt="overlap")
    received = pair.decode.when(lambda v: bool(v["decode"]["recent"]))["decode"]["recent"][-1]
    sent = {t["transfer_id"]: t for t in pair.prefill.when(lambda v: not v["prefill"]["open"])["prefill"]["recent"]}
    last_computed_s = sent[received["transfer_id"]]["last_computed_s"]
    assert received["chunks"] >= 12, "255 tokens fit a slot"
    assert received["first_chunk_s"] < last_computed_s
