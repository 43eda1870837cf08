"""Prompts with one long beginning that arrive at once: it travels once."""

import pytest
from e2e.client import at_once, same_tokens
from e2e.conftest import BLOCK, TINY_TOKEN_BYTES, Fleet
from e2e.offloads import Offloads, prompt_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

SYSTEM, OWN, REQUESTS = 2_048, 16, 16


def test_one_long_system_prompt_travels_once(pair: Fleet) -> None:
    system = prompt_of(SYSTEM, seed=90)
    prompts = [[*system, *prompt_of(OWN, seed=91 + at)] for at in range(REQUESTS)]
    counted = Offloads(pair.decode)
    answers = at_once([lambda p=p: pair.decode.complete(p, cache_salt="shared", max_tokens=4) for p in prompts])
    totals = counted.totals()
    once = (SYSTEM + OWN) * TINY_TOKEN_BYTES
    rests = REQUESTS * (OWN + BLOCK) * TINY_TOKEN_BYTES
    assert once <= totals["raw_bytes"] + TINY_TOKEN_BYTES
    assert totals["raw_bytes"] <= once + rests
    assert totals["fallbacks"] == 0
    for prompt, got in zip(prompts[::5], answers[::5], strict=True):
        assert same_tokens(got, pair.stock.complete(prompt, cache_salt="local", max_tokens=4))


def test_several_answers_to_one_prompt_need_one_transfer(pair: Fleet) -> None:
    prompt = prompt_of(1_500, seed=120)
    counted = Offloads(pair.decode)
    answers = pair.decode.choices(prompt, n=4, temperature=0.7, seed=3, cache_salt="n=4")
    assert len(answers) == 4
    totals = counted.totals()
    assert 1_499 * TINY_TOKEN_BYTES <= totals["raw_bytes"] <= (1_499 + 4 * 2 * BLOCK) * TINY_TOKEN_BYTES
