"""Unusual requests of the table in tests/edge_cases.py: served as by an engine without us, here or by way of P."""

from typing import Any

import pytest
from e2e.client import Engine
from e2e.conftest import Fleet
from e2e.offloads import Offloads, prompt_of
from edge_cases import REQUESTS, EdgeCase, Outcome

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

TOKENS = 330
SENT = [case for case in REQUESTS if case.fields]


def answers(engine: Engine, prompt: list[int], case: EdgeCase, salt: str) -> list[tuple[str, str]]:
    """(text, finish reason) of every choice."""
    body: dict[str, Any] = {"model": engine.model, "prompt": prompt, "max_tokens": 16, "temperature": 0}
    body |= {"ignore_eos": True, "cache_salt": salt, **case.fields}
    if "structured_outputs" in body:
        body["ignore_eos"] = False
    response = engine.http.post(f"{engine.url}/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return sorted((choice["text"], choice["finish_reason"]) for choice in response.json()["choices"])


@pytest.mark.parametrize("case", [c for c in SENT if c.outcome is Outcome.LOCAL], ids=lambda c: c.name)
def test_a_request_that_cannot_be_offloaded_is_served_where_it_is(pair: Fleet, case: EdgeCase) -> None:
    prompt = prompt_of(TOKENS, seed=80)
    counted = Offloads(pair.decode)
    before = pair.decode.snapshot()["decode"]["decisions"].get(case.reason, 0)
    got = answers(pair.decode, prompt, case, salt=case.name)
    assert counted.totals()["offered"] == 0
    assert pair.decode.snapshot()["decode"]["decisions"][case.reason] > before
    assert got == answers(pair.stock, prompt, case, salt="local")


@pytest.mark.parametrize("case", [c for c in SENT if c.outcome is Outcome.AS_LOCAL], ids=lambda c: c.name)
def test_what_shapes_only_the_answer_works_as_without_us(pair: Fleet, case: EdgeCase) -> None:
    prompt = prompt_of(TOKENS, seed=81)
    counted = Offloads(pair.decode)
    got = answers(pair.decode, prompt, case, salt=case.name)
    totals = counted.totals()
    assert totals["landed"] >= 1
    assert totals["fallbacks"] == 0
    assert got == answers(pair.stock, prompt, case, salt="local")
