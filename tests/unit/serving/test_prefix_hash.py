"""Equal prefixes have equal hashes in every process, and nothing else has."""

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_plugin.serving.prefix_hash import prefix_hashes

TOKENS = list(range(1_000))
prompts = st.lists(st.integers(0, 3), max_size=40)


def test_only_full_chunks_are_hashed() -> None:
    assert [len(prefix_hashes(TOKENS[:n], chunk_tokens=64)) for n in (0, 63, 64, 127, 128)] == [0, 0, 1, 1, 2]


def test_the_hash_is_part_of_the_protocol() -> None:
    """Engines of different versions compare these numbers: whoever changes them raises the protocol version."""
    assert prefix_hashes(TOKENS[:256], chunk_tokens=128) == [14183017419450167635, 1921341073548418048]


def test_other_processes_agree() -> None:
    code = "from disagg_plugin.serving.prefix_hash import prefix_hashes; print(prefix_hashes(range(256)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "123"},
    )
    assert done.stdout.strip() == str(prefix_hashes(range(256)))


@given(prompts, prompts)
def test_two_prompts_agree_exactly_as_far_as_their_chunks_do(a: list[int], b: list[int]) -> None:
    agree = sum(
        x == y for x, y in zip(prefix_hashes(a, chunk_tokens=4), prefix_hashes(b, chunk_tokens=4), strict=False)
    )
    common = 0
    while common < min(len(a), len(b)) // 4 and a[: 4 * common + 4] == b[: 4 * common + 4]:
        common += 1
    assert agree == common


def test_salts_and_adapters_share_nothing() -> None:
    variants = [{}, {"salt": "a"}, {"lora": "a"}, {"salt": "a", "lora": "b"}, {"salt": "ab"}, {"lora": "ab"}]
    hashes = [h for v in variants for h in prefix_hashes(TOKENS, **v)]
    assert len(set(hashes)) == len(hashes)


@pytest.mark.parametrize("token", [-1, 1 << 32])
def test_a_token_id_that_is_none_is_refused(token: int) -> None:
    with pytest.raises(OverflowError):
        prefix_hashes([token] * 128)


def test_any_sequence_will_do() -> None:
    assert prefix_hashes(tuple(TOKENS)) == prefix_hashes(range(1_000)) == prefix_hashes(TOKENS)
