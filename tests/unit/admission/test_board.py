"""API servers of one engine know of each other what they let in, without waiting for each other."""

import multiprocessing
from pathlib import Path

import pytest
from unit.admission.gates import gate, report

from disagg_plugin.admission.board import SILENT_S, SLOTS, Board, create_board
from disagg_plugin.admission.body import BodyFacts
from disagg_plugin.admission.engine_state import request_mark
from disagg_plugin.admission.gate import Gate, Ticket
from disagg_policies.admission_snapshots import QueuedWork


@pytest.fixture
def path(tmp_path: Path) -> Path:
    create_board(tmp_path / "board")
    return tmp_path / "board"


def server(path: Path) -> tuple[Gate, Board]:
    own, board = gate(), Board(path)
    own.also_count(board.work)
    return own, board


def admit(to: Gate, tokens: int = 1_000) -> Ticket:
    entered = to.enter("/v1/completions", {}, BodyFacts(prompt_tokens=tokens, priority=1))
    assert isinstance(entered, Ticket)
    return entered


def test_what_one_admits_the_others_count(path: Path) -> None:
    (one, its), (two, others) = server(path), server(path)
    one.update(report(1))
    ticket = admit(one)
    its.sync(one, 1.0)
    others.sync(two, 1.0)
    assert others.work() == [QueuedWork(1, 1, 1_000)]
    assert two.status()["reserved_elsewhere"] == [{"priority": 1, "requests": 1, "tokens": 1_000}]
    assert [getattr(admit(two), "reason", "") for _ in range(3)] == ["fits"] * 3  # it has heard the report as well
    refused = two.enter("/v1/completions", {}, BodyFacts(prompt_tokens=1_000, priority=1))
    assert not isinstance(refused, Ticket)
    one.left(ticket)
    its.sync(one, 2.0)
    others.sync(two, 2.0)
    assert others.work() == []


def test_a_report_that_another_one_heard_settles_ones_own_reservations(path: Path) -> None:
    (one, its), (two, others) = server(path), server(path)
    one.update(report(1))
    ticket = admit(one)
    one.exact(ticket, "id", 1_000)
    two.update(report(2, (1, 1_000), recent=(request_mark("id"),)))
    others.sync(two, 1.0)
    its.sync(one, 1.0)
    assert one.reservations() == []
    assert one.newest_reports()["0"].sequence == 2


def test_syncing_is_rare_and_a_silent_server_is_forgotten(path: Path) -> None:
    (one, its), (two, others) = server(path), server(path)
    admit(one)
    its.sync(one, 1.0)
    others.sync(two, 1.0)
    one.left(admit(one))
    admit(one)
    its.sync(one, 1.001)  # too soon: nothing is written
    others.sync(two, 1.1)
    assert others.work() == [QueuedWork(1, 1, 1_000)]
    others.sync(two, 1.0 + SILENT_S + 1)
    assert others.work() == []


def test_a_slot_is_given_back_and_that_of_a_dead_server_is_taken(path: Path) -> None:
    dead = multiprocessing.get_context("spawn").Process(target=int)
    dead.start()
    dead.join()
    assert dead.pid is not None
    boards = [Board(path, pid=dead.pid) for _ in range(3)]
    assert [board._slot for board in boards] == [0, 0, 0]
    living = [Board(path) for _ in range(SLOTS)]
    with pytest.raises(OSError, match="all 64 slots are taken"):
        Board(path)
    living[7].close()
    assert Board(path)._slot == 7


def test_garbage_in_the_file_harms_nobody(path: Path) -> None:
    one, its = server(path)
    with path.open("r+b") as file:
        file.seek(5 * (32 << 10))
        file.write(b"\x02" + b"\x00" * 7 + b"\xff\x00\x00\x00" + b"\xc1" * 300)
    its.sync(one, 1.0)
    assert its.work() == []


def test_what_one_is_told_about_draining_all_do(path: Path) -> None:
    (one, its), (two, others) = server(path), server(path)
    one.drain(at_s=1.0)
    its.sync(one, 1.0)
    others.sync(two, 1.0)
    assert two.draining
    two.drain(False, at_s=2.0)
    others.sync(two, 2.0)
    its.sync(one, 2.0)
    assert not one.draining, "the newest word counts"
