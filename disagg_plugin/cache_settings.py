"""Settings of prefix reuse: the engine's own cache first, then LMCache, then a prefill worker for the rest."""

from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from disagg_plugin.settings_base import SettingsSection

LMCACHE_CONNECTOR = "LMCacheMPConnector"
IN_PROCESS_CONNECTOR = "LMCacheConnectorV1"
AUTOSTART = "lmcache.mp.autostart"

_OWN_FIELD = {
    "lmcache.mp.host": "cache.lmcache.url",
    "lmcache.mp.port": "cache.lmcache.url",
    "lmcache.mp.server_urls": "cache.lmcache.url",
    "lmcache.mp.mq_timeout": "cache.lmcache.request_timeout_s",
    "lmcache.mp.heartbeat_interval": "cache.lmcache.heartbeat_s",
}
_UNSUPPORTED = {
    "lmcache.mp.lazy_offload": "it keeps hold of blocks after a request ended, unknown to the offload decision",
    "lmcache.mp.eager_prefetch": "a look-up would begin before its deadline does",
    "lmcache.mp.transfer_intermediate_tensors": "it needs the per-layer hooks, which disagg leaves out",
}


class LMCacheSettings(SettingsSection):
    """One LMCache server, as this engine uses it."""

    url: str = Field(description="Where `lmcache server` listens, for example tcp://127.0.0.1:5555.")
    connector: str = Field(
        default=LMCACHE_CONNECTOR,
        description="LMCache's connector for vLLM; only the multi-process one. LMCacheConnectorV1 is refused.",
    )
    lookup_timeout_ms: float = Field(
        default=2000.0, gt=0, description="A look-up that takes longer counts as no hit; the request does not wait."
    )
    request_timeout_s: float = Field(
        default=5.0,
        gt=0,
        description="Longest wait of a worker for one answer of the server (lmcache.mp.mq_timeout; LMCache's own "
        "default is 300 s). Where the worker copies the KV itself, as on CPUs, the engine's step waits with it.",
    )
    heartbeat_s: float = Field(default=1.0, gt=0, description="How often the server's health is looked at.")
    on_unreachable: Literal["fail", "warn"] = Field(
        default="fail", description="Without an answer at start: do not start, or serve without LMCache and say so."
    )
    store_received: bool = Field(
        default=True, description="Store also what came from a prefill worker; false: only what this engine computed."
    )
    extra: dict[str, str | int | float | bool] = Field(
        default={}, description="Further settings of LMCache's connector, passed on as they are: lmcache.mp.NAME."
    )

    @field_validator("url")
    @classmethod
    def _url_is_an_address(cls, url: str) -> str:
        parts = urlsplit(url if "://" in url else f"tcp://{url}")
        if parts.scheme != "tcp" or not parts.hostname or not parts.port or parts.path.strip("/") or parts.query:
            raise ValueError("must be tcp://HOST:PORT of one `lmcache server`")
        return f"tcp://{parts.netloc}"

    @field_validator("connector")
    @classmethod
    def _multi_process_only(cls, connector: str) -> str:
        if connector == IN_PROCESS_CONNECTOR:
            raise ValueError(
                f"the in-process adapter is refused: it ignores cache_salt (one tenant would read another's KV), "
                "without a matching accelerator it delays every request by 3 s and never hits, and LMCache is "
                f"retiring it; start `lmcache server` and leave this out ({LMCACHE_CONNECTOR})"
            )
        if connector != LMCACHE_CONNECTOR:
            raise ValueError(f"must be {LMCACHE_CONNECTOR}")
        return connector

    @field_validator("extra")
    @classmethod
    def _extra_is_lmcaches(cls, extra: dict[str, str | int | float | bool]) -> dict[str, str | int | float | bool]:
        for name, value in extra.items():
            if not name.startswith("lmcache.mp."):
                raise ValueError(f"{name}: must begin with lmcache.mp.")
            if name in _OWN_FIELD:
                raise ValueError(f"{name}: set {_OWN_FIELD[name]}")
            if name in _UNSUPPORTED and value is not False:
                raise ValueError(f"{name} is not supported: {_UNSUPPORTED[name]}")
        return extra

    @model_validator(mode="after")
    def _our_deadline_comes_first(self) -> Self:
        if self.lookup_timeout_ms >= 1000 * self.request_timeout_s:
            raise ValueError(
                f"lookup_timeout_ms {self.lookup_timeout_ms:g} must be below request_timeout_s "
                f"{self.request_timeout_s:g}: LMCache would give up first, and leave what it found locked"
            )
        return self

    @property
    def host_and_port(self) -> tuple[str, int]:
        """Of ``url``."""
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        assert parts.port is not None
        return parts.hostname, parts.port

    @property
    def connector_extra_config(self) -> dict[str, str | int | float | bool]:
        """What LMCache's connector is given as its ``kv_connector_extra_config``."""
        host, port = self.host_and_port
        return {
            "lmcache.mp.host": f"tcp://[{host}]" if ":" in host else f"tcp://{host}",
            "lmcache.mp.port": port,
            "lmcache.mp.mq_timeout": self.request_timeout_s,
            "lmcache.mp.heartbeat_interval": self.heartbeat_s,
            **self.extra,
        }

    @property
    def starts_server(self) -> bool:
        """Whether LMCache's connector starts the server itself."""
        return bool(self.extra.get(AUTOSTART))


class CacheSettings(SettingsSection):
    """Reuse of prefixes."""

    reuse_prefix: bool = Field(
        default=False,
        description="Ask the server of cache.lmcache for prefixes that this engine does not hold.",
    )
    min_cache_hit_ratio: float | None = Field(
        default=None, gt=0, le=1, description="A prompt of which at least this share is cached stays; null: no limit."
    )
    lmcache: LMCacheSettings | None = Field(default=None, description="The LMCache server that reuse_prefix asks.")

    @property
    def active_lmcache(self) -> LMCacheSettings | None:
        """The server to use, or None: prefixes are reused within the engine's own cache only."""
        return self.lmcache if self.reuse_prefix else None
