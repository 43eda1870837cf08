"""What is checked before a server starts, against the SGLang that is installed: no engine runs here."""

import os
import subprocess
import sys
from importlib.metadata import version

import pytest
from engines import sglang_env
from models import tiny

pytestmark = pytest.mark.timeout(600)

PYTHON = [sys.executable, "-W", "ignore"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python process in SGLang's surroundings."""
    environment = {**os.environ, **sglang_env()}
    command = [*PYTHON, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)


def test_what_the_table_says_of_each_hook_is_so_in_the_imported_sglang() -> None:
    """The table is checked against source files; SGLang makes some of its classes as it is imported."""
    script = (
        "import enum, inspect, pkgutil\n"
        "import sglang.srt.managers.scheduler\n"
        "from disagg_sglang import hooks\n"
        "from disagg_sglang.surface import SURFACE\n"
        "table = {str(name): name.parameters for name in SURFACE.names}\n"
        "wrong = []\n"
        "for hook in hooks.EVERYWHERE + hooks.IN_API_SERVER + hooks.IN_SCHEDULER:\n"
        "    target, parameters = pkgutil.resolve_name(hook.target), table[hook.target]\n"
        "    if hook.kind == 'replace':\n"
        "        wrong += [] if issubclass(target, enum.Enum) else [hook.target]\n"
        "    elif tuple(inspect.signature(target).parameters) != parameters:\n"
        "        wrong.append(hook.target)\n"
        "print(wrong)"
    )
    done = run("-c", script)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr[-2000:]


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        pytest.param(["--tp-size", "2"], "does not support --tp-size above 1", id="tensor parallelism"),
        pytest.param(["--disagg-config", "nowhere.yaml"], "nowhere.yaml", id="settings that are not there"),
    ],
)
def test_a_server_that_cannot_work_refuses_to_start_and_says_why(extra: list[str], said: str) -> None:
    backend = ["--disaggregation-transfer-backend", "disagg", "--disaggregation-mode", "decode"]
    server = ["-m", "sglang.launch_server", "--model-path", str(tiny()), "--device", "cpu", *backend, *extra]
    done = run(*server)
    assert done.returncode != 0
    assert said in done.stderr.splitlines()[-1], done.stderr[-2000:]


def test_another_version_with_our_backend_refuses_to_start_and_names_both() -> None:
    """As if a release had changed one function."""
    script = (
        "import sys\n"
        "sys.argv = ['sglang', '--disaggregation-transfer-backend', 'disagg']\n"
        "import disagg_sglang\n"
        "from dataclasses import replace\n"
        "from disagg_plugin.surface import calls\n"
        "from disagg_sglang import surface\n"
        "gone = calls('sglang.srt.constants', 'no_such_function(words)')\n"
        "surface.SURFACE = replace(surface.SURFACE, names=gone)\n"
        "disagg_sglang.register()"
    )
    done = run("-c", script)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if "disagg does not fit" in line]
    assert f"SGLang {version('sglang')} " in line
    assert line.endswith("sglang.srt.constants.no_such_function does not exist")


def test_importing_the_connector_loads_neither_sglang_nor_torch() -> None:
    done = run("-c", "import sys, disagg_sglang; print({'sglang', 'torch'} & set(sys.modules))")
    assert done.stdout.strip() == "set()"
