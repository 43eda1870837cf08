"""Every cell of the fault matrix: right bytes, one report per request, nothing leaks, and the counters say why."""

import subprocess
import sys

import pytest
from faults.conftest import Fleets
from faults.harness import DEADLINE_S, ROOT, Fleet, eventually
from faults.matrix import FAULTS, MOMENTS, Cell, Fault, Moment
from faults.strikes import HALF, STRIKES, TOKENS, Scene, Strike

TOKEN_BYTES = 256
CELLS = [
    pytest.param(fault, moment, id=f"{fault.strike}-{moment}")
    for fault in FAULTS
    for moment in MOMENTS
    if isinstance(fault.at(moment), Cell)
]


@pytest.mark.timeout(90)
@pytest.mark.parametrize(("fault", "moment"), CELLS)
def test_a_cell_of_the_matrix(fleets: Fleets, fault: Fault, moment: Moment) -> None:
    strike, cell = STRIKES[fault.strike], fault.at(moment)
    assert isinstance(cell, Cell)
    # what a cut link has lost shows by a time-out only, be it to the prompts after
    patient = cell.outcome in ("offloaded", "elsewhere", "gone") and not fault.strike.startswith("kv_")
    with fleets.lent(strike.fleet, patient=patient) as fleet:
        play(fleet, strike, cell, moment)


def play(fleet: Fleet, strike: Strike, cell: Cell, moment: Moment) -> None:
    scene = Scene(fleet, moment)
    if strike.fleet == "two":
        fleet.engines["p2"].gates(load=12)  # so that the first one is asked first
        eventually(lambda: fleet.worker("p2")["queued_requests"] >= 12, "p2 reports its load")
    fleet.mark()
    try:
        strike.arm(scene)
        bring_to(scene, held_at_queue=strike.held_at_queue)
        strike.strike(scene)
        scene.open_gates()
        check_outcome(scene, cell)
        for counter, by in cell.counts.items():
            fleet.wait_until_counted(counter, scene.victim, at_least=by)
    finally:
        strike.mend(scene)
        fleet.heal()
        scene.open_gates()
        for name in fleet.names:
            fleet.engines[name].gates(load=0)
    fleet.wait_until_connected("p1")
    check_that_the_next_one_works(fleet)
    fleet.assert_nothing_leaks()
    fleet.d.ask("forget")


def bring_to(scene: Scene, *, held_at_queue: bool) -> None:
    """Send the request, and stop it at the moment."""
    fleet, moment = scene.fleet, scene.moment
    if moment == "queued" and held_at_queue:
        scene.p.gates(queue=True, load=8)  # not idle: an idle worker counts as started, and D allocates
        scene.p.state()
    elif moment == "streaming":
        scene.p.gates(tokens=HALF)
    elif moment == "landed":
        fleet.d.gates(decode=True)
    scene.request_id = fleet.send(TOKENS)
    if moment == "queued" and held_at_queue:
        eventually(lambda: scene.p.state()["prompts"], fleet.describe)
    elif moment == "streaming":
        wanted = HALF * TOKEN_BYTES
        eventually(lambda: fleet.risen("d.raw_bytes_received") >= wanted, fleet.describe)
    elif moment == "landed":
        job = fleet.wait_until(scene.request_id, "running")
        assert job["landed"] == TOKENS - 1, fleet.describe()


def check_outcome(scene: Scene, cell: Cell) -> None:
    fleet = scene.fleet
    if cell.outcome == "died":
        return
    ended = "aborted" if cell.outcome == "gone" else "finished"
    job = fleet.wait_until(scene.request_id, ended, timeout_s=DEADLINE_S + 5)
    assert fleet.d.state()["wrong"] == [], "KV that is not the prompt's"
    if cell.outcome == "gone":
        return
    from_elsewhere = job["landed"]
    if cell.outcome in ("offloaded", "elsewhere"):
        assert (from_elsewhere, job["locally"]) == (TOKENS - 1, 1), job
        assert fleet.fallbacks() == {}
        received = fleet.risen("d.raw_bytes_received")
        if cell.outcome == "elsewhere" and scene.moment == "streaming":
            assert received <= (TOKENS + 2 * 15) * TOKEN_BYTES, "what had landed was sent again"
        return
    if cell.outcome == "kept":
        assert 0 < from_elsewhere < TOKENS - 1, job
    else:
        assert from_elsewhere == 0, job
    assert job["locally"] == TOKENS - from_elsewhere
    if cell.reasons:
        ((reason, times),) = fleet.fallbacks().items()
        assert times == 1
        assert reason in cell.reasons
    else:
        assert fleet.fallbacks() == {}


def check_that_the_next_one_works(fleet: Fleet) -> None:
    """One of the next: a connection that was cut is found out by the first that uses it, in each direction."""
    jobs = []
    for _ in range(4):
        fleet.wait_until_connected("p1")
        jobs.append(fleet.wait_until(fleet.send(TOKENS), "finished"))
        if jobs[-1]["landed"] == TOKENS - 1:
            return
    raise AssertionError(f"{jobs}\n{fleet.describe()}")


def test_every_fault_has_a_strike_and_every_strike_a_fault() -> None:
    assert sorted(fault.strike for fault in FAULTS) == sorted(STRIKES)


def test_the_document_is_the_table() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "fault_matrix.py"), "--check"], check=False)
    assert done.returncode == 0, "run `python tools/fault_matrix.py`"


def test_the_tests_on_real_engines_that_the_table_names_exist() -> None:
    for fault in FAULTS:
        if fault.engines:
            path, _, name = fault.engines.partition("::")
            assert f"def {name}(" in (ROOT / path).read_text(), fault.engines
