"""What a prefill engine has said yes to, and how far each has come: offered, prompt arrived over HTTP, begun with.

    accept() ──arrived()──▶ in the engine's own queue ──settled()──▶ begun with, or over
        └── overdue() ──▶ the prompt never came

``arrived`` is called by the scheduler's thread too, all else by the I/O thread alone.
"""

from disagg_plugin.control.load_reports import Awaited

REMEMBERED_OFFERS = 8192


class AcceptedOffers:
    """Of one prefill engine."""

    def __init__(self) -> None:
        self._engines: dict[bytes, str] = {}  # transfer id -> decode engine, in order; the last REMEMBERED_OFFERS
        self._awaited: dict[bytes, Awaited] = {}
        self._unsettled: dict[bytes, str] = {}

    def __contains__(self, transfer_id: bytes) -> bool:
        """Whether it was offered before."""
        return transfer_id in self._engines

    @property
    def awaited(self) -> list[Awaited]:
        """Prompts that have not arrived."""
        return list(self._awaited.values())

    @property
    def unsettled(self) -> list[tuple[bytes, str]]:
        """Transfer ids and engines of what was neither begun with nor ended."""
        return list(self._unsettled.items())

    def is_from(self, engine: str, transfer_id: bytes) -> bool:
        """Whether this engine offered it."""
        return self._engines.get(transfer_id) == engine

    def remember(self, transfer_id: bytes, engine: str) -> None:
        """Offered once; the same id is refused from now on."""
        self._engines[transfer_id] = engine
        if len(self._engines) > REMEMBERED_OFFERS:
            del self._engines[next(iter(self._engines))]

    def accept(self, transfer_id: bytes, engine: str, awaited: Awaited) -> None:
        """Its prompt will come."""
        self._awaited[transfer_id] = awaited
        self._unsettled[transfer_id] = engine

    def arrived(self, transfer_id: bytes) -> None:
        """Its prompt came, and is counted with the engine's own queue."""
        self._awaited.pop(transfer_id, None)

    def settled(self, transfer_id: bytes) -> None:
        """The engine has begun with it, or will not."""
        self._unsettled.pop(transfer_id, None)

    def cancelled(self, transfer_id: bytes) -> None:
        """The decode engine does not want it any more."""
        for known in (self._engines, self._awaited, self._unsettled):
            known.pop(transfer_id, None)

    def left(self, engine: str) -> None:
        """The decode engine is gone."""
        for transfer_id, offered_by in self.unsettled:
            if offered_by == engine:
                self.settled(transfer_id)

    def overdue(self, now_s: float) -> list[bytes]:
        """Prompts that should have arrived by now; they are not awaited any more."""
        late = [transfer_id for transfer_id, one in list(self._awaited.items()) if now_s > one.until_s]
        for transfer_id in late:
            self.arrived(transfer_id)
            self.settled(transfer_id)
        return late
