"""The trace replay counts what it says: four requests of which the shares can be worked out by hand.

request   length   blocks    cached before it    uncached
0         1,300    1 2 3     0                   1,300
1         1,300    1 2 4     2 blocks, 1,024       276
2           700    1 5       1 block, 512          188
3         1,024    1 2       2 blocks, 1,024         0
4           300    9         0                     300
5         1,300    8 2 3     0 (2 and 3 follow something else)   1,300
"""

import json

import pytest

from benchmarks.replay_offload import prompts, replay

TRACE = [
    json.dumps({"input_length": length, "hash_ids": blocks})
    for length, blocks in [
        (1_300, [1, 2, 3]),
        (1_300, [1, 2, 4]),
        (700, [1, 5]),
        (1_024, [1, 2]),
        (300, [9]),
        (1_300, [8, 2, 3]),
    ]
]


def test_the_cached_prefix_ends_at_the_first_new_block() -> None:
    assert [prompt.uncached_tokens for prompt in prompts(TRACE)] == [1_300, 276, 188, 0, 300, 1_300]


@pytest.mark.parametrize(
    ("limit", "offloaded", "of_long", "reasons"),
    [
        pytest.param(256, 4 / 6, 4 / 6, {"over_threshold": 4, "cached_enough": 2}, id="256: 0, 1, 4 and 5"),
        pytest.param(
            512, 2 / 6, 2 / 5, {"over_threshold": 2, "cached_enough": 3, "short_prompt": 1}, id="512: 0 and 5"
        ),
        pytest.param(1_300, 0.0, 0.0, {"short_prompt": 6}, id="1,300: none is longer"),
    ],
)
def test_shares_by_threshold(limit: int, offloaded: float, of_long: float, reasons: dict[str, int]) -> None:
    result = replay(list(prompts(TRACE)), limit)
    assert (result.offloaded, result.offloaded_of_long) == (offloaded, of_long)
    assert result.reasons == reasons
