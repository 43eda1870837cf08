"""Durations in a flat dict of monotonic counters: how the data plane's reports carry a histogram.

``write_s/n/3`` is how many fell into bucket 3, ``write_s/s/3`` their sum in seconds; keys appear with first use.
"""

import bisect
from collections.abc import Mapping, MutableMapping, Sequence

CHUNK_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
CHUNK_WRITE = "chunk_write_s"
CHUNK_SCATTER = "chunk_scatter_s"


def add_duration(
    counters: MutableMapping[str, float], prefix: str, duration_s: float, buckets: Sequence[float]
) -> None:
    """Count one duration; ``buckets`` are the upper bounds, the last one open."""
    position = bisect.bisect_left(buckets, duration_s)
    count, total = f"{prefix}/n/{position}", f"{prefix}/s/{position}"
    counters[count] = counters.get(count, 0) + 1
    counters[total] = counters.get(total, 0) + duration_s


def pairs_of(counters: Mapping[str, float], prefix: str, buckets: Sequence[float]) -> list[float]:
    """Count and sum of every bucket in turn, as ``Deltas.histograms`` has them."""
    pairs = []
    for position in range(len(buckets) + 1):
        pairs += [counters.get(f"{prefix}/n/{position}", 0.0), counters.get(f"{prefix}/s/{position}", 0.0)]
    return pairs
