"""The vLLM connector. Importing this loads neither torch nor vLLM; ``register`` is vLLM's entry point into it."""

import logging
import sys
from typing import NoReturn

TESTED_VLLM = "0.32.0"
CONNECTOR_NAMES = ("disagg", "DisaggConnector")  # the second one too: MultiConnector looks children up by class name

logger = logging.getLogger(__name__)


def register() -> None:
    """Make the connector and its flags known to vLLM; runs in each of its processes, any number of times.

    Nothing that a command without disagg sees is changed. Where this vLLM is not the one the connector was written
    for, such commands go on, and those that name disagg fail.

    Raises:
        disagg_plugin.errors.ConfigError: vLLM's hooks are not as expected, and the command line asks for disagg.
    """
    from vllm import __version__ as vllm_version
    from vllm.config.kv_transfer import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.engine.arg_utils import EngineArgs

    from disagg_plugin.errors import ConfigError
    from disagg_vllm import cli_flags

    problem = cli_flags.find_unexpected(EngineArgs, KVTransferConfig, KVConnectorFactory)
    if problem is not None:
        line = f"disagg does not fit vLLM {vllm_version} (tested with {TESTED_VLLM}): {problem}"
        if cli_flags.asks_for_disagg(sys.argv[1:]):
            raise ConfigError(line)
        logger.info("%s", line)

        def refuse() -> NoReturn:
            raise ConfigError(line)

        registry = getattr(KVConnectorFactory, "_registry", None)
        if isinstance(registry, dict):  # for configs made in Python: this line, instead of "unsupported connector"
            registry.update(dict.fromkeys(CONNECTOR_NAMES, refuse))
        return
    for name in CONNECTOR_NAMES:
        if name not in KVConnectorFactory._registry:
            KVConnectorFactory.register_connector(name, "disagg_vllm.connector", "DisaggConnector")
    cli_flags.patch_transfer_config(KVTransferConfig)
    cli_flags.patch_engine_args(EngineArgs)
