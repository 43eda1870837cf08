"""Whether an LMCache server can be used from here; found out before the engine needs it. Imports no LMCache."""

import importlib.util
import os
import socket

from disagg_plugin.cache_settings import LMCacheSettings
from disagg_plugin.errors import ConfigError

INSTALL = "pip install disagg-plugin[lmcache]"
CONNECT_S = 3.0


def require_installed() -> None:
    """Without the package there is nothing to compose.

    Raises:
        ConfigError: With the line that installs it.
    """
    if importlib.util.find_spec("lmcache") is None:
        raise ConfigError(f"cache.reuse_prefix needs LMCache, which is not installed: {INSTALL}")


def unreachable_reason(settings: LMCacheSettings, *, within_s: float = CONNECT_S) -> str:
    """Why nobody can be reached at ``url``, or an empty text; whether it is LMCache shows later."""
    if settings.starts_server:
        return ""
    try:
        with socket.create_connection(settings.host_and_port, timeout=within_s):
            return ""
    except OSError as error:
        return str(getattr(error, "strerror", None) or error)


def check_lmcache(settings: LMCacheSettings) -> None:
    """Before an engine starts: LMCache is there, and its server too where it has to be.

    Raises:
        ConfigError: In one line.
    """
    require_installed()
    if settings.on_unreachable == "fail" and (reason := unreachable_reason(settings)):
        raise unreachable(settings, reason)


def unreachable(settings: LMCacheSettings, reason: str) -> ConfigError:
    """The error of a server that does not answer."""
    return ConfigError(
        f"cache.lmcache.url: no LMCache server at {settings.url} ({reason}): start `lmcache server`, or set "
        "cache.lmcache.on_unreachable to warn"
    )


def ignored_environment() -> str:
    """What the environment says to the in-process adapter, which is not used; an empty text if nothing."""
    name = "LMCACHE_CONFIG_FILE"
    return f"{name} is set: it is for LMCache's in-process adapter and has no effect here" if name in os.environ else ""
