"""The plugin's settings, from where vLLM keeps them."""

from pathlib import Path
from typing import Any

from disagg_plugin.config import DisaggSettings, load_settings


def settings_of(kv_transfer_config: Any) -> DisaggSettings:
    """Settings under ``kv_connector_extra_config``: a ``config_file``, single fields, or fields over a file.

    Raises:
        ConfigError: One line that names the field and what is allowed.
    """
    extra = dict(kv_transfer_config.kv_connector_extra_config or {})
    config_file = extra.pop("config_file", None)
    return load_settings(Path(config_file), extra) if config_file else load_settings(extra)
