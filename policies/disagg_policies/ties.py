"""Breaking ties by hash: equal for one request on one decode engine, different from request to request.

Each worker gets a number that depends on (request, decode engine, worker) alone, so the order of two workers does not
depend on who else is there (rendezvous hashing). Python's own ``hash`` of text differs between processes and is not
used.
"""

import functools
import hashlib
from collections.abc import Callable

_MASK = (1 << 64) - 1


@functools.lru_cache(maxsize=4096)
def _fingerprint(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") | 1  # odd: a permutation


def seed(request_id: str, decode_engine: str) -> int:
    """64 bits of (request, decode engine)."""
    key = f"{request_id}|{decode_engine}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


def tie_breaker(request_id: str, decode_engine: str) -> Callable[[str], int]:
    """Worker -> its number for this request; the smaller one goes first."""
    mixed = seed(request_id, decode_engine)
    return lambda worker: mixed * _fingerprint(worker) & _MASK
