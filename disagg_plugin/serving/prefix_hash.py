"""Our own hash of a prompt's leading token chunks: equal in every process, whatever the engine.

The engines' block hashes differ between processes (seeded) and between engines. A chain instead::

    h[-1] = xxh3_64(salt and LoRA name)
    h[k]  = xxh3_64(tokens of chunk k, 4 bytes each, little-endian; seed = h[k - 1])

so ``h[k]`` stands for all tokens up to the end of chunk ``k``, for one cache salt and one adapter. Only full chunks are
hashed. XXH3 is no cryptographic hash: a client may construct a collision, and gets a worse placement for it, never a
wrong token, as the prefill worker's own cache decides what it reuses.
"""

import sys
from array import array
from collections.abc import Sequence

from xxhash import xxh3_64_intdigest

CHUNK_TOKENS = 128
_TOKEN_BYTES = 4
assert array("I").itemsize == _TOKEN_BYTES


def prefix_hashes(
    token_ids: Sequence[int], *, chunk_tokens: int = CHUNK_TOKENS, salt: str = "", lora: str = ""
) -> list[int]:
    """One hash per full chunk, in order.

    Args:
        salt: The request's cache salt: prefixes of different salts share nothing.
        lora: Name of the adapter, likewise.

    Raises:
        OverflowError: A token id is negative or does not fit into 32 bits.
    """
    full = len(token_ids) // chunk_tokens * chunk_tokens
    words = array("I", token_ids if len(token_ids) == full else token_ids[:full])
    if sys.byteorder == "big":
        words.byteswap()
    data = words.tobytes()
    step = chunk_tokens * _TOKEN_BYTES
    # the length keeps ("a", "b") apart from ("ab", "")
    last = xxh3_64_intdigest(f"{len(salt)}:{salt}{lora}".encode())
    hashes = []
    for at in range(0, len(data), step):
        last = xxh3_64_intdigest(data[at : at + step], last)
        hashes.append(last)
    return hashes
