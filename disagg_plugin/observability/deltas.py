"""What a scheduler process sends to its API server about a while: plain data that merges.

    {"counters": {"disagg_fallbacks_total\\x1fpeer_lost": 2.0}, "gauges": {...}, "histograms": {key: [n0, sum0, ...]},
     "notes": {request id: [path, estimated TTFT or None]}, "engine_state": {...}}

Counters are increments, gauges the latest value, histograms a count and a sum per bucket, notes about requests are
bounded: nothing grows with time, requests or tokens. ``data`` may be encoded by any serializer as it is.
"""

import bisect
from collections.abc import Iterator, Sequence
from typing import Any

SEPARATOR = "\x1f"
MAX_NOTES = 4096

Note = tuple[str, float | None]


def series_key(name: str, *labels: str) -> str:
    """A metric's name and label values as one string."""
    return SEPARATOR.join((name, *labels))


def split_key(key: str) -> tuple[str, tuple[str, ...]]:
    """The inverse of ``series_key``."""
    name, *labels = key.split(SEPARATOR)
    return name, tuple(labels)


class Deltas:
    """A view of such data with names; changes go into ``data``."""

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        self.data: dict[str, Any] = {} if data is None else data

    @property
    def counters(self) -> dict[str, float]:
        return self._section("counters")

    @property
    def gauges(self) -> dict[str, float]:
        return self._section("gauges")

    @property
    def histograms(self) -> dict[str, list[float]]:
        return self._section("histograms")

    @property
    def engine_state(self) -> dict[str, Any] | None:
        """What one listener in the API server wants to know; None: nothing new."""
        state: dict[str, Any] | None = self.data.get("engine_state")
        return state

    def notes(self) -> Iterator[tuple[str, Note]]:
        """About requests: where each was prefilled, and what TTFT was predicted."""
        yield from (self.data.get("notes") or {}).items()

    def count(self, name: str, *labels: str, by: float = 1) -> None:
        key, counters = series_key(name, *labels), self.counters
        counters[key] = counters.get(key, 0) + by

    def set(self, name: str, *labels: str, to: float) -> None:
        self.gauges[series_key(name, *labels)] = to

    def observe(self, name: str, *labels: str, value: float, buckets: Sequence[float]) -> None:
        """One value into its bucket; ``buckets`` are the upper bounds, the last one open."""
        pairs = self.histograms.setdefault(series_key(name, *labels), [0.0] * (2 * len(buckets) + 2))
        position = 2 * bisect.bisect_left(buckets, value)
        pairs[position] += 1
        pairs[position + 1] += value

    def note(self, request_id: str, path: str, estimated_s: float | None) -> bool:
        """False if there are too many already."""
        notes = self._section("notes")
        if request_id not in notes and len(notes) >= MAX_NOTES:
            return False
        notes[request_id] = [path, estimated_s]
        return True

    def set_engine_state(self, state: dict[str, Any]) -> None:
        self.data["engine_state"] = state

    def merge(self, later: "Deltas") -> None:
        """Add what happened afterwards."""
        theirs, counters = later.data, self.counters
        for key, by in (theirs.get("counters") or {}).items():
            counters[key] = counters.get(key, 0) + by
        self.gauges.update(theirs.get("gauges") or {})
        for key, pairs in (theirs.get("histograms") or {}).items():
            mine = self.histograms.get(key)
            same = mine is not None and len(mine) == len(pairs)
            self.histograms[key] = [a + b for a, b in zip(mine, pairs, strict=True)] if mine and same else list(pairs)
        for request_id, (path, estimated_s) in later.notes():
            self.note(request_id, path, estimated_s)
        if later.engine_state is not None:
            self.set_engine_state(later.engine_state)

    @property
    def is_empty(self) -> bool:
        return not any(self.data.values())

    def _section(self, name: str) -> dict[str, Any]:
        section: dict[str, Any] = self.data.setdefault(name, {})
        return section
