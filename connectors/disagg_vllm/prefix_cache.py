"""vLLM's own prefix cache, asked before vLLM asks it: a decision is due when a request arrives, not at its turn.

The engine visits a waiting request only once the ones before it leave room in a step. Deciding there would look at an
empty queue each time, and keep every prompt of a burst on the engine that the burst is stalling.
"""

import inspect
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.request import Request

ONE_GROUP = [0]  # engines with more are not served


def can_look_up(block_pool: "BlockPool") -> bool:
    """Whether this vLLM's block pool has the one method that is used here, as it was tested with."""
    method = getattr(block_pool, "get_cached_block", None)
    return method is not None and list(inspect.signature(method).parameters) == ["block_hash", "kv_cache_group_ids"]


def cached_tokens(block_pool: "BlockPool", request: "Request", block_size: int) -> int:
    """Leading prompt tokens that the engine's cache holds now, in whole blocks; read only, nothing is reserved.

    The last token is left out, as it is by the engine: something has to be computed.
    """
    blocks = 0
    for block_hash in request.block_hashes[: (request.num_prompt_tokens - 1) // block_size]:
        if block_pool.get_cached_block(block_hash, ONE_GROUP) is None:
            break
        blocks += 1
    return blocks * block_size
