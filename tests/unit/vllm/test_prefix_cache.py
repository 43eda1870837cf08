"""What vLLM's own prefix cache holds of a prompt, before vLLM looks."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from disagg_vllm.prefix_cache import cached_tokens, can_look_up

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, when vLLM imports its compiler
    from vllm.v1.core.block_pool import BlockPool

BLOCK = 32


class Pool:
    """A block pool that holds the blocks with these hashes."""

    def __init__(self, *held: bytes) -> None:
        self.held = held

    def get_cached_block(self, block_hash: bytes, kv_cache_group_ids: list[int]) -> list[object] | None:
        assert kv_cache_group_ids == [0]
        return [object()] if block_hash in self.held else None


def asking(tokens: int) -> Any:
    return SimpleNamespace(num_prompt_tokens=tokens, block_hashes=[bytes([n]) for n in range(tokens // BLOCK)])


def test_this_vllms_pool_can_be_looked_into() -> None:
    pool = BlockPool(num_gpu_blocks=4, enable_caching=True, hash_block_size=BLOCK)
    assert can_look_up(pool)
    assert cached_tokens(pool, asking(100), BLOCK) == 0


def test_another_signature_is_not_called() -> None:
    assert not can_look_up(SimpleNamespace(get_cached_block=lambda block_hash: block_hash))  # type: ignore[arg-type]
    assert not can_look_up(SimpleNamespace())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tokens", "held", "expected"),
    [
        pytest.param(100, (), 0, id="nothing"),
        pytest.param(100, (b"\0", b"\1"), 64, id="whole blocks from the start"),
        pytest.param(100, (b"\1", b"\2"), 0, id="what does not begin at the start is of no use"),
        pytest.param(96, (b"\0", b"\1", b"\2"), 64, id="the last token is always computed"),
        pytest.param(97, (b"\0", b"\1", b"\2"), 96, id="all but the last token"),
    ],
)
def test_leading_blocks_count(tokens: int, held: tuple[bytes, ...], expected: int) -> None:
    assert cached_tokens(Pool(*held), asking(tokens), BLOCK) == expected  # type: ignore[arg-type]
