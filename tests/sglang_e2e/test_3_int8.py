"""With int8 asked for, a quarter of an fp32 cache travels, guarded, and the next token is the same.

How good int8 KV is, is a question for a trained model: ``benchmarks/cross_engine.py --codec int8`` asks it.
"""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from engines import free_port
from sglang_e2e.client import Engine, Offloads, prompt_of
from sglang_e2e.conftest import TRANSFER, Fleet, Plan, connected, is_quiet, settings

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

UNDECIDED = 0.1  # a lead of the best token, in logprobs, that rounding may turn over in a random model


@pytest.fixture(scope="module")
def int8_decode(fleet: Fleet) -> Iterator[Engine]:
    """A second decode server of the same prefill server, which asks for int8."""
    worker = {"url": fleet.prefill.url, "side_channel": f"127.0.0.1:{fleet.prefill.side_port}"}
    transfer = {**TRANSFER, "codec": "int8"}
    plan = Plan("int8", free_port(), "decode", settings(free_port(), prefill_workers=[worker], transfer=transfer))
    with ExitStack() as stack:
        decode = plan.start(stack, fleet.folder)
        decode.when(connected)
        decode.generate(prompt_of(600, seed=40))  # the guard measures the model's own KV before it lets int8 through
        yield decode


@pytest.mark.parametrize("tokens", [100, 700])
def test_int8_moves_a_quarter_and_predicts_the_same_token(fleet: Fleet, int8_decode: Engine, tokens: int) -> None:
    prompt = prompt_of(tokens, seed=41)
    counted = Offloads(int8_decode)
    got = int8_decode.generate(prompt, max_new_tokens=1)
    totals = counted.totals()
    assert (totals["landed"], totals["fallbacks"]) == (1, 0)
    assert totals["wire_bytes"] <= 0.27 * totals["raw_bytes"] + 4096, "of an fp32 cache; a chunk's header comes on top"
    (transfer,) = int8_decode.snapshot()["decode"]["recent"][-1:]
    assert set(transfer["codecs"]) <= {"int8", "int8c"}
    local = fleet.local(prompt, max_new_tokens=1)
    assert got.output_ids == local.output_ids or local.top2_gaps[0] < UNDECIDED
    int8_decode.when(is_quiet)
