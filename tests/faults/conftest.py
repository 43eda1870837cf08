"""One zygote for all tests of a module; fleets live until one of their tests fails, or the module ends."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from faults.harness import Fleet, Zygote

from disagg_plugin.control.keys import generate


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    one = Zygote(tmp_path_factory.mktemp("z"))
    yield one
    one.close()


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rings of keys that do not know each other: ``fleet`` and ``other``."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("fleet", "other"):
        generate(folder / name, fleet=True)
    return folder


class Fleets:
    """Fleets by kind, started when first asked for; one that a test left in a bad state is replaced."""

    def __init__(self, zygote: Zygote, keys: Path) -> None:
        self._zygote, self._keys = zygote, keys
        self._running: dict[tuple[str, bool], Fleet] = {}

    @contextmanager
    def lent(self, kind: str, *, patient: bool) -> Iterator[Fleet]:
        fleet = self._running.pop((kind, patient), None)
        with ExitStack() as unless_all_was_well:
            if fleet is None:
                fleet = Fleet(
                    self._zygote,
                    prefills=1 if kind == "one" else 2,
                    keys=dict.fromkeys(("p1", "p2", "d"), str(self._keys / "fleet")),
                    transfer={"ring_max_bytes": 4 * 4096} if kind == "tight" else None,
                    patient=patient,
                    connect=False,
                )
            unless_all_was_well.callback(fleet.close)
            fleet.wait_until_connected("p1", *(["p2"] if kind == "two" else []))
            yield fleet
            unless_all_was_well.pop_all()
            self._running[kind, patient] = fleet

    def close(self) -> None:
        for fleet in self._running.values():
            fleet.close()


@pytest.fixture(scope="module")
def fleets(zygote: Zygote, keys: Path) -> Iterator[Fleets]:
    all_of_them = Fleets(zygote, keys)
    yield all_of_them
    all_of_them.close()
