"""A short soak; ``benchmarks/soak.py`` runs the long one."""

import pytest
from faults.conftest import Fleets
from faults.soak import Soak


@pytest.mark.timeout(400)
def test_nothing_is_lost_hung_wrong_or_leaked(fleets: Fleets) -> None:
    with fleets.lent("two", patient=False) as fleet:
        fleet.engines["p2"].gates(load=0)
        tally = Soak(fleet, seed=7).run(60, per_round=6)
        bad = (tally.lost, tally.hung, tally.wrong, tally.leaked)
        assert bad == (0, 0, 0, 0), "\n".join(tally.found)
        assert len(tally.by_fault) == 10
