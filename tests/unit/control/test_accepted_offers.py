"""How far each accepted offer has come, whatever becomes of it."""

from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from disagg_plugin.control.accepted_offers import REMEMBERED_OFFERS, AcceptedOffers
from disagg_plugin.control.load_reports import Awaited


def test_only_so_many_offers_are_remembered() -> None:
    offers = AcceptedOffers()
    for at in range(REMEMBERED_OFFERS + 1):
        offers.remember(at.to_bytes(16, "big"), "d")
    assert (0).to_bytes(16, "big") not in offers
    assert (1).to_bytes(16, "big") in offers


class Model(RuleBasedStateMachine):
    """Against plain sets of what was accepted, came, and was begun with."""

    def __init__(self) -> None:
        super().__init__()
        self.offers = AcceptedOffers()
        self.made = 0
        self.now_s = 0.0
        self.engine: dict[bytes, str] = {}
        self.until_s: dict[bytes, float] = {}
        self.unsettled: set[bytes] = set()

    def any_one(self) -> bytes:
        return list(self.engine)[self.made % len(self.engine)]

    @rule()
    def accept(self) -> None:
        one, engine = self.made.to_bytes(16, "big"), f"d{self.made % 2}"
        self.made += 1
        self.offers.remember(one, engine)
        self.offers.accept(one, engine, Awaited(self.now_s + 3.0, 100))
        self.engine[one], self.until_s[one] = engine, self.now_s + 3.0
        self.unsettled.add(one)

    @precondition(lambda self: self.engine)
    @rule()
    def arrives(self) -> None:
        one = self.any_one()
        self.offers.arrived(one)
        self.until_s.pop(one, None)

    @precondition(lambda self: self.engine)
    @rule()
    def is_begun_with(self) -> None:
        one = self.any_one()
        self.offers.settled(one)
        self.unsettled.discard(one)

    @precondition(lambda self: self.engine)
    @rule()
    def is_cancelled(self) -> None:
        one = self.any_one()
        self.offers.cancelled(one)
        del self.engine[one]
        self.until_s.pop(one, None)
        self.unsettled.discard(one)
        assert one not in self.offers

    @rule()
    def an_engine_leaves(self) -> None:
        self.offers.left("d0")
        self.unsettled = {one for one in self.unsettled if self.engine[one] != "d0"}

    @rule()
    def time_passes(self) -> None:
        self.now_s += 1.5
        late = {one for one, until_s in self.until_s.items() if self.now_s > until_s}
        assert set(self.offers.overdue(self.now_s)) == late
        for one in late:
            del self.until_s[one]
        self.unsettled -= late

    @invariant()
    def knows_what_is_open(self) -> None:
        assert {one for one, _ in self.offers.unsettled} == self.unsettled
        assert len(self.offers.awaited) == len(self.until_s)
        for one, engine in self.engine.items():
            assert self.offers.is_from(engine, one)
            assert not self.offers.is_from("somebody else", one)


TestAcceptedOffers = Model.TestCase
