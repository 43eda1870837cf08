"""What is checked before a server starts, against the SGLang that is installed: no engine runs here."""

import os
import subprocess
import sys

import pytest
from engines import sglang_env
from models import tiny

from disagg_sglang import hooks

pytestmark = pytest.mark.timeout(600)

PYTHON = [sys.executable, "-W", "ignore"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python process in SGLang's surroundings."""
    environment = {**os.environ, **sglang_env()}
    command = [*PYTHON, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)


def test_every_hook_fits_the_installed_sglang() -> None:
    script = (
        "import sglang.srt.managers.scheduler\n"
        "from disagg_sglang import hooks\n"
        "every = hooks.EVERYWHERE + hooks.IN_API_SERVER + hooks.IN_SCHEDULER\n"
        "print([p for p in map(hooks.mismatch, every) if p])"
    )
    done = run("-c", script)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr[-2000:]


@pytest.mark.parametrize(
    ("hook", "named"),
    [
        (hooks.Hook("argparse.ArgumentParser.parse", "after", (), ""), "argparse.ArgumentParser.parse"),
        (hooks.Hook("no_such_module.Thing", "after", (), ""), "no_such_module"),
        (hooks.Hook("textwrap.dedent", "after", ("words",), ""), "takes ('text',), not ('words',)"),
        (hooks.Hook("textwrap.TextWrapper", "replace", None, ""), "is no enum"),
    ],
)
def test_a_target_that_is_gone_or_changed_is_named(hook: hooks.Hook, named: str) -> None:
    assert named in (hooks.mismatch(hook) or "")


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
    """As if a release had changed one signature."""
    script = (
        "import sys\n"
        "sys.argv = ['sglang', '--disaggregation-transfer-backend', 'disagg']\n"
        "import disagg_sglang\n"
        "from disagg_sglang import hooks\n"
        "hooks.EVERYWHERE = (hooks.Hook('textwrap.dedent', 'after', ('words',), ''),)\n"
        "disagg_sglang.register()"
    )
    done = run("-c", script)
    assert done.returncode != 0
    assert "tested with 0.5.23" in done.stderr
    assert "textwrap.dedent" in done.stderr


def test_importing_the_connector_loads_neither_sglang_nor_torch() -> None:
    done = run("-c", "import sys, disagg_sglang; print({'sglang', 'torch'} & set(sys.modules))")
    assert done.stdout.strip() == "set()"
