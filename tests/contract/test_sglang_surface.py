"""The SGLang that is installed has all that the connector takes from it."""

from importlib.metadata import version
from pathlib import Path

from surface_uses import overrides

import disagg_sglang
from disagg_plugin.sources import Found, Sources, installed
from disagg_sglang.surface import SURFACE

SGLANG = version("sglang")


def test_the_installed_sglang_fits_and_nothing_is_lost() -> None:
    read = installed("sglang")
    assert SURFACE.check(SGLANG, read) is None
    assert SGLANG in SURFACE.run
    assert list(map(str, SURFACE.mismatches(read, SGLANG))) == []


def test_every_method_of_sglang_that_we_override_is_in_the_table() -> None:
    sources = Sources("sglang", installed("sglang"))
    table = {str(name) for name in SURFACE.names if name.match == "exact"}
    ours = overrides(Path(disagg_sglang.__file__).parent, "sglang")
    theirs = set()
    for base, method in ours:
        module, _, name = base.rpartition(".")
        if isinstance(sources.find(module, f"{name}.{method}"), Found):
            theirs.add(f"{base}.{method}")
    assert len(theirs) > 5
    assert theirs - table == set()
