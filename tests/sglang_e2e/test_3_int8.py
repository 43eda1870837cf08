"""With int8 asked for, a quarter of an fp32 cache travels, guarded, and the next token is the same.

How good int8 KV is, is a question for a trained model: ``benchmarks/cross_engine.py --codec int8`` asks it.
"""

import pytest
from sglang_e2e.client import Engine, Offloads, prompt_of
from sglang_e2e.conftest import Fleet, is_quiet
from sglang_e2e.test_1_offload import rows

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

UNDECIDED = 0.1  # a lead of the best token, in logprobs, that rounding may turn over in a random model


@pytest.mark.parametrize("tokens", [100, 700])
def test_int8_moves_a_quarter_and_predicts_the_same_token(fleet: Fleet, second_decode: Engine, tokens: int) -> None:
    prompt = prompt_of(tokens, seed=41)
    counted = Offloads(second_decode)
    got = second_decode.generate(prompt, max_new_tokens=1)
    totals = counted.totals()
    assert (totals["landed"], totals["fallbacks"]) == (1, 0)
    assert totals["wire_bytes"] <= 0.27 * totals["raw_bytes"] + 4096, "of an fp32 cache; a chunk's header comes on top"
    transfer = rows(second_decode.when(lambda v: bool(rows(v, tokens))), tokens)[-1]
    assert set(transfer["codecs"]) <= {"int8", "int8c"}
    local = fleet.local(prompt, max_new_tokens=1)
    assert got.output_ids == local.output_ids or local.top2_gaps[0] < UNDECIDED
    second_decode.when(is_quiet)


def test_the_prefill_server_counts_on_its_metrics(fleet: Fleet, second_decode: Engine) -> None:
    second_decode.generate(prompt_of(300, seed=42), max_new_tokens=1)
    fleet.prefill.when(is_quiet)
    assert fleet.prefill.metrics("disagg_offers_answered_total")[("accepted",)] > 0
    assert fleet.prefill.metrics("disagg_chunks_total")[("sent",)] > 0
    assert fleet.prefill.metrics("disagg_ttft_seconds_count") == {}, "prompts for others are no requests of its own"
