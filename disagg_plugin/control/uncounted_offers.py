"""Prompts that were offered to a worker and that no load report of it counts yet; pure.

A worker answers offers and sends reports in one order, and counts a prompt from the moment it accepts it. So the first
report after ``Accepted`` counts it, and it is not ours to count any more.
"""

from dataclasses import dataclass


@dataclass(slots=True)
class _Offer:
    tokens: int
    priority: int = 0
    accepted: bool = False


class UncountedOffers:
    """Of one worker."""

    def __init__(self) -> None:
        self._offers: dict[bytes, _Offer] = {}

    @property
    def requests(self) -> int:
        return len(self._offers)

    @property
    def tokens(self) -> int:
        return sum([offer.tokens for offer in self._offers.values()])

    def by_priority(self, reported: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        """``(priority, tokens)`` of what a worker reported and of these offers together, sorted."""
        if not self._offers:
            return reported
        tokens = dict(reported)
        for offer in self._offers.values():
            tokens[offer.priority] = tokens.get(offer.priority, 0) + offer.tokens
        return tuple(sorted(tokens.items()))

    def add(self, transfer_id: bytes, tokens: int, priority: int = 0) -> None:
        """It is, or is about to be, offered; idempotent."""
        self._offers.setdefault(transfer_id, _Offer(tokens, priority))

    def accepted(self, transfer_id: bytes) -> None:
        """The next report counts it."""
        if (offer := self._offers.get(transfer_id)) is not None:
            offer.accepted = True

    def reported(self) -> None:
        """A load report came."""
        self._offers = {known: offer for known, offer in self._offers.items() if not offer.accepted}

    def remove(self, transfer_id: bytes) -> bool:
        """The worker does not have it; whether it was counted here."""
        return self._offers.pop(transfer_id, None) is not None

    def call_ended(self, transfer_id: bytes) -> bool:
        """Nobody works on the offer any more; as ``remove``, but what was accepted stays until a report counts it."""
        offer = self._offers.get(transfer_id)
        return offer is not None and not offer.accepted and self.remove(transfer_id)

    def clear(self) -> None:
        """The worker is gone."""
        self._offers.clear()
