"""What was admitted here and is not counted in any engine's report yet: so a burst between two reports is seen."""

from dataclasses import dataclass

from disagg_policies.admission_snapshots import QueuedWork

SETTLE_S = 1.0  # where arrivals cannot be recognised, a report this much later has them
EXPIRE_S = 30.0


@dataclass(slots=True)
class Reservation:
    """One request on its way to the scheduler.

    Attributes:
        mark: ``request_mark`` of the engine's request id, once it has one.
    """

    priority: int
    tokens: int
    made_s: float
    mark: int | None = None
    open: bool = True


class Ledger:
    """Sums by priority are kept, so that a look costs the number of classes, not of requests."""

    def __init__(self) -> None:
        self._open: dict[int, Reservation] = {}
        self._by_mark: dict[int, Reservation] = {}
        self._sums: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return len(self._open)

    def reserve(self, priority: int, tokens: int, now_s: float) -> Reservation:
        """A request was admitted."""
        reservation = Reservation(priority, tokens, now_s)
        self._open[id(reservation)] = reservation
        sums = self._sums.setdefault(priority, [0, 0])
        sums[0] += 1
        sums[1] += tokens
        return reservation

    def sent(self, reservation: Reservation, mark: int, tokens: int) -> None:
        """It is handed to the engine under this mark, and exactly so long."""
        if reservation.open:
            self._sums[reservation.priority][1] += tokens - reservation.tokens
            reservation.tokens = tokens
            reservation.mark = mark
            self._by_mark[mark] = reservation

    def release(self, reservation: Reservation) -> None:
        """It is counted elsewhere, or has ended; idempotent."""
        if not reservation.open:
            return
        reservation.open = False
        del self._open[id(reservation)]
        sums = self._sums[reservation.priority]
        sums[0] -= 1
        sums[1] -= reservation.tokens
        if reservation.mark is not None and self._by_mark.get(reservation.mark) is reservation:
            del self._by_mark[reservation.mark]

    def reported(self, marks: tuple[int, ...], now_s: float) -> None:
        """A report came that counts the requests with these marks."""
        for mark in marks:
            if (reservation := self._by_mark.get(mark)) is not None:
                self.release(reservation)
        late = [
            reservation
            for reservation in self._open.values()
            if now_s - reservation.made_s > (SETTLE_S if reservation.mark is None else EXPIRE_S)
        ]
        for reservation in late:
            self.release(reservation)

    def work(self) -> list[QueuedWork]:
        """By priority."""
        return [QueuedWork(priority, count, tokens) for priority, (count, tokens) in self._sums.items() if count]
