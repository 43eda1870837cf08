"""What happened to requests and transfers since somebody last looked: written by the roles, drained by the collector.

One thread (the scheduler's) writes and drains. All of it is bounded; what does not fit is counted.
"""

from collections import deque
from collections.abc import Callable, Mapping

from disagg_plugin.observability.deltas import MAX_NOTES, Note
from disagg_plugin.observability.slo import Path

MAX_TRANSFERS = 1024
FOR_DECODE = "for_decode"  # a prefill engine's request on behalf of a decode engine: nobody's TTFT

Row = Mapping[str, object]


class Journal:
    """Notes on requests, and the transfers that are over."""

    def __init__(self) -> None:
        self._notes: dict[str, Note] = {}
        self._transfers: deque[tuple[str, Row]] = deque()
        self.dropped_notes = 0
        self.dropped_transfers = 0
        self._listener: Callable[[str, Row], None] | None = None

    def on_transfer_over(self, listener: Callable[[str, Row], None]) -> None:
        """Tell ``listener`` of each transfer too, at once: it must not take long."""
        self._listener = listener

    @property
    def has_notes(self) -> bool:
        return bool(self._notes)

    def decided(self, request_id: str, path: Path, estimated_ttft_s: float | None = None) -> None:
        """Where a prompt is to be prefilled, and the TTFT predicted for that."""
        self._note(request_id, (path, estimated_ttft_s))

    def fell_back(self, request_id: str) -> None:
        """Its offload failed, and the engine prefills it after all; what was predicted no longer applies."""
        self._note(request_id, ("fallback", None))

    def prefills_for_another(self, request_id: str) -> None:
        """A prefill engine's request whose client is a decode engine: in nobody's SLO."""
        self._note(request_id, (FOR_DECODE, None))

    def transfer_over(self, role: str, row: Row) -> None:
        """A transfer that ended, however, as the role describes it in its snapshot."""
        if self._listener is not None:
            self._listener(role, row)
        if len(self._transfers) < MAX_TRANSFERS:
            self._transfers.append((role, row))
        else:
            self.dropped_transfers += 1

    def take_notes(self) -> dict[str, Note]:
        taken, self._notes = self._notes, {}
        return taken

    def take_transfers(self) -> list[tuple[str, Row]]:
        taken, self._transfers = list(self._transfers), deque()
        return taken

    def _note(self, request_id: str, note: Note) -> None:
        if request_id in self._notes or len(self._notes) < MAX_NOTES:
            self._notes[request_id] = note
        else:
            self.dropped_notes += 1
