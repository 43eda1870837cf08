"""The vLLM connector. Importing this loads neither torch nor vLLM; ``register`` is vLLM's entry point into it."""

import logging
import multiprocessing
import sys
from typing import NoReturn

CONNECTOR_NAMES = ("disagg", "DisaggConnector")  # the second one too: MultiConnector looks children up by class name

logger = logging.getLogger(__name__)


def register() -> None:
    """Make the connector and its flags known to vLLM; runs in each of its processes, any number of times.

    Nothing that a command without disagg sees is changed. Where this vLLM lacks something that the connector takes
    from it (``surface``), such commands go on.

    Raises:
        SystemExit: The same, and the command line asks for disagg: one line that names the release and what it lacks.
    """
    from vllm import __version__ as vllm_version

    from disagg_vllm.surface import SURFACE

    if (problem := SURFACE.check(vllm_version)) is not None:
        _stay_out(problem)
        return
    from vllm.config.kv_transfer import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.engine.arg_utils import EngineArgs

    from disagg_vllm import cli_flags

    if _is_first_process() and cli_flags.asks_for_disagg(sys.argv[1:]) and (line := SURFACE.unseen(vllm_version)):
        logger.warning("%s", line)
    for name in CONNECTOR_NAMES:
        if name not in KVConnectorFactory._registry:
            KVConnectorFactory.register_connector(name, "disagg_vllm.connector", "DisaggConnector")
    cli_flags.patch_transfer_config(KVTransferConfig)
    cli_flags.patch_engine_args(EngineArgs)


def _stay_out(problem: str) -> None:
    """Leave this vLLM as it is, unless it is asked for what it cannot have."""
    from disagg_plugin.errors import ConfigError
    from disagg_vllm import cli_flags

    if cli_flags.asks_for_disagg(sys.argv[1:]):
        raise SystemExit(problem)
    if _is_first_process():
        logger.warning("%s. It stays out of this vLLM.", problem)

    def refuse() -> NoReturn:
        raise ConfigError(problem)

    try:
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

        registry = KVConnectorFactory._registry
    except (ImportError, AttributeError):
        return
    if isinstance(registry, dict):  # for configs made in Python: this line, instead of "unsupported connector"
        registry.update(dict.fromkeys(CONNECTOR_NAMES, refuse))


def _is_first_process() -> bool:
    """Not one that an engine has started: what is said once is said here."""
    return multiprocessing.parent_process() is None
