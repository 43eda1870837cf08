"""Without ``cache.lmcache`` nothing of LMCache is imported, and no step carries anything for it."""

import subprocess
import sys
import textwrap

import pytest

from disagg_plugin.config import DisaggSettings


def test_connector_core_and_commands_load_where_lmcache_cannot_be_imported() -> None:
    program = """
        import sys, warnings

        class Refuses:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "lmcache":
                    raise ImportError(name)

        sys.meta_path.insert(0, Refuses())
        warnings.simplefilter("ignore")
        import pkgutil, importlib
        import disagg_plugin, disagg_vllm, disagg_vllm.connector

        for package in (disagg_plugin, disagg_vllm):
            for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
                importlib.import_module(module.name)
        assert not [name for name in sys.modules if name.partition(".")[0] in ("lmcache", "disagg_lmcache")]
        """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2_000:]


@pytest.mark.parametrize("cache", [{}, {"reuse_prefix": True}, {"lmcache": {"url": "tcp://127.0.0.1:5555"}}])
def test_it_takes_both_settings_to_switch_it_on(cache: dict[str, object]) -> None:
    assert DisaggSettings.model_validate({"cache": cache}).cache.active_lmcache is None
