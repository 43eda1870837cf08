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

    Where this SGLang is not as ``surface.py`` has it, such commands go on, and one line says so.

    Raises:
        SystemExit: The same, and the command line asks for disagg: SGLang must not start without it.
    """
    from sglang.version import __version__ as sglang_version

    from disagg_sglang.surface import SURFACE

    asked, is_first_process = asks_for_disagg(sys.argv[1:]), multiprocessing.parent_process() is None
    if (problem := SURFACE.check(sglang_version)) is not None:
        if asked:
            raise SystemExit(problem)
        if is_first_process:
            logger.warning("%s. It stays out of this SGLang.", problem)
        return
    if asked and is_first_process and (line := SURFACE.unseen(sglang_version)):
        logger.warning("%s", line)
    from disagg_sglang import hooks

    hooks.install()


def asks_for_disagg(argv: Sequence[str]) -> bool:
    """Whether a command line chooses our backend."""
    following = zip(argv, [*argv[1:], ""], strict=False)
    return any(
        (flag == BACKEND_FLAG and value == BACKEND) or flag == f"{BACKEND_FLAG}={BACKEND}" for flag, value in following
    )
