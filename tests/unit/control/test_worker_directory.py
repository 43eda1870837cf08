"""Workers behind a name come and go with its addresses; a look-up that fails changes nothing."""

import asyncio
import logging
from collections.abc import Sequence

import pytest

from disagg_plugin.config import PrefillWorkerSettings
from disagg_plugin.control.worker_directory import WorkerAddress, WorkerDirectory, resolve_all

FIXED = PrefillWorkerSettings(url="http://10.0.0.5:8000")
NAMED = PrefillWorkerSettings.model_validate("prefill.svc:8000")


class Names:
    """What a name server says now."""

    def __init__(self, addresses: Sequence[str] = ()) -> None:
        self.addresses = addresses
        self.asked: list[str] = []

    async def resolve(self, host: str) -> Sequence[str]:
        self.asked.append(host)
        if not self.addresses:
            raise OSError("Name or service not known")
        return self.addresses


def looked(directory: WorkerDirectory) -> list[str]:
    asyncio.run(directory.look())
    return list(directory.known())


def test_workers_of_the_settings_need_no_look() -> None:
    directory = WorkerDirectory([FIXED], default_port=5600)
    assert not directory.changes
    assert directory.known() == {
        "10.0.0.5:5600": WorkerAddress("10.0.0.5:5600", "10.0.0.5", 5600, "http://10.0.0.5:8000")
    }


def test_every_address_of_a_name_is_a_worker() -> None:
    names = Names(["10.1.0.9", "10.1.0.10", "10.1.0.9"])
    directory = WorkerDirectory([NAMED, FIXED], default_port=5600, resolve=names.resolve)
    assert looked(directory) == ["10.0.0.5:5600", "10.1.0.9:5600", "10.1.0.10:5600"]
    assert directory.known()["10.1.0.9:5600"].url == "http://10.1.0.9:8000"
    names.addresses = ["10.1.0.10", "10.1.0.11"]
    assert looked(directory) == ["10.0.0.5:5600", "10.1.0.10:5600", "10.1.0.11:5600"]


def test_a_name_may_have_its_own_side_channel_port_certificate_and_key() -> None:
    settings = PrefillWorkerSettings(
        url="https://prefill.svc:8443/api", side_channel="prefill.svc:7000", discover="dns", api_key_env="KEY"
    )
    directory = WorkerDirectory([settings], default_port=5600, resolve=Names(["fd00::1"]).resolve)
    assert looked(directory) == ["fd00::1:7000"]
    assert directory.known()["fd00::1:7000"] == WorkerAddress(
        "fd00::1:7000", "fd00::1", 7000, "https://[fd00::1]:8443/api", "KEY", tls_name="prefill.svc"
    )


def test_a_name_that_cannot_be_resolved_keeps_its_last_addresses_and_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    names = Names(["10.1.0.9"])
    directory = WorkerDirectory([NAMED], default_port=5600, resolve=names.resolve)
    looked(directory)
    names.addresses = []
    for _ in range(3):
        assert looked(directory) == ["10.1.0.9:5600"]
    assert directory.counters["look_ups_failed"] == 3
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    names.addresses = ["10.1.0.10"]
    assert looked(directory) == ["10.1.0.10:5600"]
    assert "can be resolved again" in caplog.messages[-1]


def test_a_worker_that_is_also_named_in_the_settings_is_one_worker() -> None:
    directory = WorkerDirectory([FIXED, NAMED], default_port=5600, resolve=Names(["10.0.0.5"]).resolve)
    assert looked(directory) == ["10.0.0.5:5600"]


def test_the_systems_resolver_is_asked() -> None:
    assert asyncio.run(resolve_all("127.0.0.1")) == ["127.0.0.1"]
