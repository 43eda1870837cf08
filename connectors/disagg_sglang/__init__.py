"""The SGLang connector. Importing this loads neither torch nor SGLang; ``register`` is SGLang's entry point into it."""

import sys
from collections.abc import Sequence

TESTED_SGLANG = "0.5.23"
BACKEND = "disagg"
BACKEND_FLAG = "--disaggregation-transfer-backend"


def register() -> None:
    """Make the backend, its flag and its hooks known to SGLang; runs in each of its processes.

    Nothing that a command without the backend sees is changed.

    Raises:
        ConfigError: SGLang's hooks are not as expected; SGLang logs it and goes on without us.
        SystemExit: The same, and the command line asks for disagg: SGLang must not start without it.
    """
    from sglang.version import __version__ as sglang_version

    from disagg_plugin.errors import ConfigError
    from disagg_sglang import hooks

    problem = hooks.find_unexpected()
    if problem is None:
        hooks.install()
        return
    line = f"disagg does not fit SGLang {sglang_version} (tested with {TESTED_SGLANG}): {problem}"
    if asks_for_disagg(sys.argv[1:]):
        raise SystemExit(line)
    raise ConfigError(line)


def asks_for_disagg(argv: Sequence[str]) -> bool:
    """Whether a command line chooses our backend."""
    following = zip(argv, [*argv[1:], ""], strict=True)
    return any(
        (flag == BACKEND_FLAG and value == BACKEND) or flag == f"{BACKEND_FLAG}={BACKEND}" for flag, value in following
    )
