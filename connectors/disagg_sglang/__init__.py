"""The SGLang connector. Importing this loads neither torch nor SGLang; ``register`` is SGLang's entry point into it."""

import logging
import multiprocessing
import sys
from collections.abc import Sequence

BACKEND = "disagg"
BACKEND_FLAG = "--disaggregation-transfer-backend"

logger = logging.getLogger(__name__)


def register() -> None:
    """Make the backend, its flag and its hooks known to SGLang; runs in each of its processes.

    Nothing that a command without the backend sees is changed.

    Raises:
        ConfigError: This SGLang is not as ``surface.py`` has it; SGLang logs it and goes on without us.
        SystemExit: The same, and the command line asks for disagg: SGLang must not start without it.
    """
    from sglang.version import __version__ as sglang_version

    from disagg_plugin.errors import ConfigError
    from disagg_sglang.surface import SURFACE

    asked = asks_for_disagg(sys.argv[1:])
    if (line := SURFACE.check(sglang_version)) is not None:
        if asked:
            raise SystemExit(line)
        raise ConfigError(line)
    if asked and SURFACE.is_newer(sglang_version) and multiprocessing.parent_process() is None:
        logger.warning(
            "disagg: SGLang %s is newer than %s, which is tested; its names are as expected",
            *(sglang_version, SURFACE.newest),
        )
    from disagg_sglang import hooks

    hooks.install()


def asks_for_disagg(argv: Sequence[str]) -> bool:
    """Whether a command line chooses our backend."""
    following = zip(argv, [*argv[1:], ""], strict=False)
    return any(
        (flag == BACKEND_FLAG and value == BACKEND) or flag == f"{BACKEND_FLAG}={BACKEND}" for flag, value in following
    )
