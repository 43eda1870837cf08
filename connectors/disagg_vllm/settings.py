"""The plugin's settings, from where vLLM keeps them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from disagg_plugin.config import DisaggSettings, load_settings
from disagg_vllm import CONNECTOR_NAMES


def settings_of(kv_transfer_config: Any) -> DisaggSettings:
    """Settings under ``kv_connector_extra_config``: a ``config_file``, single fields, or fields over a file.

    Raises:
        ConfigError: One line that names the field and what is allowed.
    """
    extra = dict(kv_transfer_config.kv_connector_extra_config or {})
    config_file = extra.pop("config_file", None)
    return load_settings(Path(config_file), extra) if config_file else load_settings(extra)


def names_disagg(vllm_config: Any) -> bool:
    """Whether this engine uses the connector, alone or as a child of a MultiConnector."""
    transfer = getattr(vllm_config, "kv_transfer_config", None)
    if transfer is None:
        return False
    extra = getattr(transfer, "kv_connector_extra_config", None) or {}
    children = (extra.get("connectors") or ()) if isinstance(extra, Mapping) else ()
    names = [getattr(transfer, "kv_connector", None), *(child.get("kv_connector") for child in children)]
    return any(name in CONNECTOR_NAMES for name in names)
