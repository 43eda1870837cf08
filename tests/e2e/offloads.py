"""What several e2e files ask of an offloaded request."""

import random
from typing import Any

from e2e.client import Engine, same_tokens
from e2e.conftest import Fleet


def prompt_of(tokens: int, seed: int = 0) -> list[int]:
    return random.Random(f"{tokens}/{seed}").choices(range(10, 40_000), k=tokens)


class Offloads:
    """What the decode engine counted while a block of code ran."""

    def __init__(self, decode: Engine) -> None:
        self._engine = decode
        self._before = decode.snapshot()["decode"]

    def totals(self) -> dict[str, int]:
        after = self._engine.snapshot()["decode"]
        keys = ("landed", "wire_bytes", "raw_bytes", "offered")
        counted = {key: after["totals"].get(key, 0) - self._before["totals"].get(key, 0) for key in keys}
        counted["fallbacks"] = sum(after["fallbacks"].values()) - sum(self._before["fallbacks"].values())
        return counted


def assert_offloaded_as_local(pair: Fleet, prompt: list[int], **params: Any) -> dict[str, int]:
    """One request: offloaded, not repaired, moved bytes, and equal to the stock engine's own answer."""
    counted = Offloads(pair.decode)
    got = pair.decode.complete(prompt, **params)
    totals = counted.totals()
    assert (totals["offered"], totals["landed"], totals["fallbacks"]) == (1, 1, 0)
    assert totals["wire_bytes"] > 0
    local = pair.stock.complete(prompt, cache_salt="local")
    assert same_tokens(got, local), f"{got.text!r} is not {local.text!r}"
    return totals
