"""Several API servers of one engine: what one admits is known to the others without a further event."""

import asyncio
from pathlib import Path

import pytest

from disagg_plugin.admission.board import SYNC_S, create_board
from disagg_plugin.admission.body import BodyFacts
from disagg_plugin.admission.gate import Ticket
from disagg_plugin.admission.site import Site
from disagg_plugin.config import DisaggSettings
from disagg_policies.admission_snapshots import QueuedWork

pytestmark = pytest.mark.timeout(60)
LOOKS = 1_000
SETTINGS = DisaggSettings(qos={"enable_early_rejection": True, "classes": {"normal": {"ttft_slo_s": 1.0}}})


def site(board: Path) -> Site:
    return Site(SETTINGS, by_priority=True, caches_prefixes=False, board=board)


def enter(at: Site, tokens: int) -> Ticket:
    ticket = at.gate.enter("/v1/completions", {}, BodyFacts(prompt_tokens=tokens))
    assert isinstance(ticket, Ticket)
    return ticket


async def hears(at: Site, work: list[QueuedWork]) -> None:
    """Only this one is asked again; nothing more happens at the others."""
    assert at.board is not None
    for _ in range(LOOKS):
        at.sync()
        if at.board.work() == work:
            return
        await asyncio.sleep(SYNC_S)
    raise AssertionError(at.board.work())


@pytest.fixture
def board(tmp_path: Path) -> Path:
    create_board(tmp_path / "board")
    return tmp_path / "board"


def test_the_last_request_of_a_burst_is_told_as_well(board: Path) -> None:
    async def run() -> None:
        one, two = site(board), site(board)
        for number in range(4):  # of which the board takes the first at once, and the others are too soon
            one.sync()
            assert one.exact(enter(one, 100), f"id-{number}", range(100)) is None
        await hears(two, [QueuedWork(0, 4, 400)])

    asyncio.run(run())


def test_a_report_in_between_does_not_keep_it_back(board: Path) -> None:
    async def run() -> None:
        one, two = site(board), site(board)
        ticket = enter(one, 100)
        one.sync_soon()
        await hears(two, [QueuedWork(0, 1, 100)])
        one.sync_soon()
        await asyncio.sleep(SYNC_S / 2)
        one.sync()  # as with a report: now the one that is to come is too soon
        one.gate.left(ticket)
        await hears(two, [])

    asyncio.run(run())


def test_a_single_server_tells_nobody() -> None:
    alone = Site(SETTINGS, by_priority=True, caches_prefixes=False)
    assert alone.exact(enter(alone, 100), "id", range(100)) is None  # there is not even an event loop here
    assert alone.sync()
