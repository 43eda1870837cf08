"""Prompts that no worker takes are known before anybody is called."""

from dataclasses import replace

import pytest
from unit.control.decode_bench import LONG, Bench

from disagg_plugin.control.decode_port import NotYet, PrefillLocally


@pytest.mark.parametrize("limit", [len(LONG.token_ids) - 1, 1])
def test_a_prompt_that_no_worker_takes_is_not_offered(limit: int) -> None:
    """``max_prompt_tokens`` of the handshake leaves room for one output token."""
    bench = Bench()
    bench.port.states = [replace(state, max_prompt_tokens=limit) for state in bench.port.states]
    answer = bench.match(LONG)
    assert isinstance(answer, PrefillLocally)
    assert bench.port.offers == []
    assert bench.port.sent == []


def test_a_prompt_that_just_fits_is_offered() -> None:
    bench = Bench()
    bench.port.states = [replace(state, max_prompt_tokens=len(LONG.token_ids)) for state in bench.port.states]
    assert bench.match(LONG) == NotYet()
