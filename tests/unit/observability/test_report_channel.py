"""Figures cross from one process to the other, whoever is late; nothing waits, and nothing is counted twice."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from disagg_plugin.meeting_folder import VARIABLE, make_meeting_folder, meeting_folder
from disagg_plugin.observability.deltas import Deltas
from disagg_plugin.observability.report_channel import UNSENT_MESSAGES, ReportReceiver, ReportSender, address_in


@pytest.fixture
def address(tmp_path: Path) -> str:
    return address_in(tmp_path)


@pytest.fixture
def sender(address: str) -> Iterator[ReportSender]:
    sender = ReportSender(address)
    yield sender
    sender.close()


def counted(by: float) -> Deltas:
    deltas = Deltas()
    deltas.count("disagg_fallbacks_total", "peer_lost", by=by)
    return deltas


def heard(address: str, until: float) -> Deltas:
    """What arrives, until the one counter has reached a value."""
    total = Deltas()

    async def listen() -> None:
        done = asyncio.Event()

        def add(deltas: Deltas) -> None:
            total.merge(deltas)
            if sum(total.counters.values()) >= until:
                done.set()

        task = asyncio.create_task(ReportReceiver(address).run(add))
        async with asyncio.timeout(20):
            await done.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(listen())
    return total


def test_a_report_arrives_as_it_was_sent(address: str, sender: ReportSender) -> None:
    deltas = counted(2)
    deltas.note("r", "offloaded", 0.5)
    deltas.set_engine_state({"sequence": 7})
    sender.send(deltas)
    got = heard(address, 2)
    assert (got.counters, dict(got.notes()), got.engine_state) == (
        deltas.counters,
        {"r": ["offloaded", 0.5]},
        {"sequence": 7},
    )


def test_before_anybody_listens_the_sender_goes_on_and_loses_no_count(address: str, sender: ReportSender) -> None:
    reports = 4 * UNSENT_MESSAGES
    for _ in range(reports):
        sender.send(counted(1))
    assert sender._unsent is not None
    waiting = sum(sender._unsent.counters.values())
    assert sum(heard(address, reports - waiting).counters.values()) == reports - waiting


def test_a_report_that_cannot_be_used_ends_nothing(
    address: str, sender: ReportSender, caplog: pytest.LogCaptureFixture
) -> None:
    sender._socket.send(b"\xc1 no msgpack")
    sender._socket.send(b"\xc1 no msgpack")
    sender.send(counted(1))
    assert sum(heard(address, 1).counters.values()) == 1
    assert len(caplog.records) == 1


def test_the_place_is_only_this_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    folder = make_meeting_folder()
    assert folder.stat().st_mode & 0o077 == 0
    assert meeting_folder() == make_meeting_folder() == folder
