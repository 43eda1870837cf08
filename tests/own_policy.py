"""``examples/own_policy``, built and installed into a folder, without the network."""

import shutil
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "own_policy"


def install_own_policy(folder: Path) -> Path:
    """The folder to put on ``PYTHONPATH``; ``folder`` must be empty."""
    source = shutil.copytree(EXAMPLE, folder / "source")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", folder / "site", source], check=True, timeout=120)
    return folder / "site"
