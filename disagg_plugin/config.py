"""The one settings tree: parsed once at the edge, frozen, passed down.

Units stand in the names: ``_s`` seconds, ``_ms`` milliseconds, ``_bytes``, ``_tokens``. A misspelt field is an error.

``load_settings`` reads a file or a mapping, ``warnings`` lists what is allowed but hardly meant. Every mistake of the
user is one ``ConfigError`` of one line: file, field, value, what is allowed.
"""

import difflib
import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self, get_args
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from disagg_plugin.autoscale_settings import AutoscaleSettings
from disagg_plugin.cache_settings import CacheSettings
from disagg_plugin.errors import ConfigError
from disagg_plugin.observability.settings import ObservabilitySettings
from disagg_plugin.plugins import PolicySettings, choose, load_plugins
from disagg_plugin.qos_settings import QosSettings
from disagg_plugin.router_settings import RouterSettings
from disagg_plugin.settings_base import SettingsSection
from disagg_plugin.settings_file import merge, one_line, read_mapping

Role = Literal["prefill", "decode", "both"]
CodecChoice = Literal["auto", "raw", "int8", "int8c"]
Discover = Literal["static", "dns"]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``; a name other than localhost counts as reachable by others."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class PrefillWorkerSettings(SettingsSection):
    """One prefill engine, or all behind a DNS name, as decode engines reach them.

    A plain text is short for one field: ``http://10.0.0.5:8000`` is a URL, ``prefill.default.svc:8000`` a name whose
    every address is a prefill engine (``url: http://prefill.default.svc:8000``, ``discover: dns``).
    """

    url: str = Field(description="Base URL of its OpenAI HTTP API, for example http://10.0.0.5:8000.")
    side_channel: str | None = Field(
        default=None, description="host:port of its side channel; default: the URL's host and side_channel.port."
    )
    discover: Discover = Field(
        default="static",
        description="static: one engine at that URL. dns: one at each address that the URL's host name has, looked up "
        "again every few seconds (a Kubernetes headless service).",
    )
    api_key_env: str | None = Field(
        default=None, description="Environment variable that holds its API key, if it asks for one."
    )

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        return {"url": value} if "://" in value else {"url": f"http://{value}", "discover": "dns"}

    @field_validator("url")
    @classmethod
    def _url_is_a_base_url(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be http://HOST:PORT or https://HOST:PORT")
        if parts.port == 0:  # urlsplit itself refuses what is above 65535 or no number
            raise ValueError("port must be 1 to 65535")
        if parts.username is not None or parts.query or parts.fragment:
            raise ValueError("must be a base URL: no user, no query, no fragment (a key goes to api_key_env)")
        if parts.path.rstrip("/").endswith("/v1"):
            raise ValueError("must be a base URL: leave out /v1")
        return url.rstrip("/")

    @field_validator("side_channel")
    @classmethod
    def _side_channel_is_an_address(cls, address: str | None) -> str | None:
        if address is not None:
            _split_address(address)
        return address

    @model_validator(mode="after")
    def _a_name_to_look_up(self) -> Self:
        if self.discover == "dns":
            host = urlsplit(self.url).hostname or ""
            if _is_address(host):
                raise ValueError(f"discover: dns needs a name to look up, {host} is an address: leave discover out")
            if self.side_channel is not None and _split_address(self.side_channel)[0] != host:
                raise ValueError(
                    f"side_channel {self.side_channel} must have the host of url, {host}: with discover: dns both are "
                    "looked up together"
                )
        return self

    def side_channel_address(self, default_port: int) -> tuple[str, int]:
        """Where this worker's scheduler listens: ``side_channel``, or the URL's host and ``default_port``."""
        if self.side_channel is not None:
            return _split_address(self.side_channel)
        return urlsplit(self.url).hostname or "", default_port


class SideChannelSettings(SettingsSection):
    """The authenticated control channel between schedulers."""

    host: str = Field(default="127.0.0.1", description="Address to bind to; anything but loopback needs keys_dir.")
    port: int = Field(default=5600, ge=0, le=65535, description="Port of DP rank 0; rank r binds to port + r.")
    keys_dir: str | None = Field(default=None, description="Folder made by `disagg keygen`.")
    insecure: bool = Field(default=False, description="Allow a bind beyond loopback without keys. Not for production.")
    heartbeat_s: float = Field(default=0.5, gt=0, description="Interval of heartbeats to each peer.")
    peer_timeout_s: float = Field(default=3.0, gt=0, description="A peer silent for longer is lost.")

    @model_validator(mode="after")
    def _beyond_loopback_needs_keys(self) -> Self:
        if not (is_loopback(self.host) or self.keys_dir or self.insecure):
            raise ValueError(
                f"host {self.host} can be reached by other machines: set keys_dir (`disagg keygen DIR`), "
                "or host to 127.0.0.1, or insecure to true"
            )
        return self

    @model_validator(mode="after")
    def _a_peer_may_miss_a_heartbeat(self) -> Self:
        if self.peer_timeout_s <= self.heartbeat_s:
            raise ValueError(
                f"peer_timeout_s {self.peer_timeout_s} is not above heartbeat_s {self.heartbeat_s}: "
                "every peer would be lost between two heartbeats"
            )
        return self


class NixlSettings(SettingsSection):
    """How NIXL is set up in each worker."""

    backend: str = Field(default="UCX", description="NIXL backend.")
    net_devices: str | None = Field(
        default=None, description="UCX_NET_DEVICES; default: lo while the side channel is on loopback, else UCX's own."
    )
    progress_thread: bool = Field(
        default=False, description="NIXL's own spinning thread: one core per worker, always. For RDMA nodes only."
    )


class TransferSettings(SettingsSection):
    """Chunks, slots, deadlines."""

    codec: CodecChoice = Field(default="auto", description="auto: raw on one host, int8 (guarded) between hosts.")
    compile: bool = Field(default=True, description="Compile the codec with Inductor at start (5-20 s the first time).")
    guard_tokens: int = Field(default=1024, ge=0, description="Tokens of real KV a layer is measured on before int8.")
    guard_limit: float = Field(
        default=2e-3,
        gt=0,
        description="Quantization noise over variance, per channel, above which a layer steps down to int8c, then raw;"
        " attention KL is about half of it.",
    )
    slot_bytes: int = Field(default=16 << 20, ge=4096, description="Size of one landing slot.")
    region_slots: int = Field(default=8, ge=1, le=4096, description="Slots of each peer's region: its credit window.")
    ring_max_bytes: int = Field(default=1 << 30, ge=4096, description="All regions of one worker rank together.")
    scatter_budget_ms: float = Field(default=2.0, gt=0, description="Decode and scatter per busy engine step.")
    scatter_share: float = Field(
        default=0.05, ge=0, le=1, description="The same as a share of the step's time, where that is more."
    )
    scatter_idle_budget_ms: float = Field(
        default=5.0, gt=0, description="The same in a step that computes nothing else."
    )
    offer_timeout_s: float = Field(default=1.0, gt=0, description="Wait for Accepted or Refused.")
    start_timeout_s: float = Field(default=60.0, gt=0, description="Wait in the prefill worker's queue.")
    stall_timeout_s: float = Field(default=20.0, gt=0, description="Longest silence between chunks of a transfer.")
    deadline_s: float = Field(default=300.0, gt=0, description="Longest life of a transfer, all together.")
    hold_s: float = Field(default=30.0, gt=0, description="Prefill: longest wait for Ready or credits, then drop.")
    hold_kv_fraction: float = Field(
        default=0.5, gt=0, le=1, description="Prefill: share of the KV cache that finished prompts may hold."
    )
    held_kv_fraction: float = Field(
        default=0.5, gt=0, le=1, description="Decode: share of the KV cache that transfers under way may hold."
    )
    fallback_local_tokens_per_step: int = Field(
        default=1024,
        ge=1,
        description="Decode: prompt tokens that failed offloads may bring back a step, on average, to be computed.",
    )
    alloc_lead_s: float = Field(default=0.05, ge=0, description="Allocate when the prefill is to start this soon.")
    shared_prefix_wait_s: float = Field(
        default=10.0,
        ge=0,
        description="Longest wait of a prompt for another one's transfer that brings most of what it needs; 0: none.",
    )
    linger_s: float = Field(default=2.0, ge=0, description="Keep polling this long after the last transfer.")

    @model_validator(mode="after")
    def _ring_holds_a_region(self) -> Self:
        region_bytes = self.slot_bytes * self.region_slots
        if self.ring_max_bytes < region_bytes:
            raise ValueError(
                f"ring_max_bytes {self.ring_max_bytes} is less than one peer's region, slot_bytes {self.slot_bytes} * "
                f"region_slots {self.region_slots} = {region_bytes}: raise the first or lower the others"
            )
        return self


class SplitPolicySettings(SettingsSection):
    """Numbers of the built-in policies; ``disagg_policies`` has the formulas."""

    prompt_length_threshold: int = Field(
        default=256, ge=0, description="Offload when more uncached prompt tokens than this; see policy.offload."
    )
    prefill_queue_max: int = Field(default=32, ge=1, description="Queue length at which a prefill worker refuses.")
    prefix_cache_weight: float = Field(default=10.0, ge=0, description="Placement: prefix that a worker holds.")
    queue_length_weight: float = Field(default=1.5, ge=0, description="Placement: queued prefill tokens.")
    decode_load_weight: float = Field(default=0.5, ge=0, description="Placement: KV usage.")
    link_weight: float = Field(default=1.0, ge=0, description="Placement: speed of the wire.")
    enable_hotspot_prevention: bool = Field(
        default=True, description="Placement: a worker above its fair share loses its prefix bonus."
    )
    decode_harm_weight: float = Field(
        default=0.1, ge=0, description="Seconds of TTFT that a second of stall of one running decode is worth."
    )
    offload_hysteresis: float = Field(
        default=0.05, ge=0, lt=1, description="Share by which a worker has to win once prompts of that size stayed."
    )
    suspect_after_s: float = Field(
        default=1.0, ge=0.5, description="Age from which a worker's report is not believed; one comes every 0.5 s."
    )


class DisaggSettings(SettingsSection):
    """Everything; stands in a YAML or JSON file, or under ``kv_connector_extra_config`` (vLLM)."""

    role: Role = Field(default="both", description="What this engine does for others: prefill, decode, or both.")
    prefill_workers: tuple[PrefillWorkerSettings, ...] = Field(
        default=(), description="Prefill engines that this decode engine may use."
    )
    model: str | None = Field(default=None, description="Compared with the engine's served name: a warning, no more.")
    split_policy: SplitPolicySettings = Field(default=SplitPolicySettings(), description="When to offload, and where.")
    policy: PolicySettings = Field(default=PolicySettings(), description="Who decides.")
    cache: CacheSettings = Field(default=CacheSettings(), description="Reuse of prefixes.")
    qos: QosSettings = Field(default=QosSettings(), description="Early rejection and priorities.")
    autoscale: AutoscaleSettings = Field(default=AutoscaleSettings(), description="Scaling advice.")
    transfer: TransferSettings = Field(default=TransferSettings(), description="Chunks, slots, deadlines.")
    side_channel: SideChannelSettings = Field(default=SideChannelSettings(), description="Control channel.")
    nixl: NixlSettings = Field(default=NixlSettings(), description="Data channel.")
    router: RouterSettings = Field(default=RouterSettings(), description="Requests that a router sends to P, then D.")
    observability: ObservabilitySettings = Field(
        default=ObservabilitySettings(), description="Metrics, SLO tracking, traces."
    )
    model_revision_id: str | None = Field(
        default=None, description="Stands in for the weights digest where weight files cannot be read."
    )

    @model_validator(mode="after")
    def _prefill_workers_are_distinct(self) -> Self:
        by_url: dict[str, int] = {}
        by_address: dict[tuple[str, int], int] = {}
        for index, worker in enumerate(self.prefill_workers):
            host, port = address = worker.side_channel_address(self.side_channel.port)
            if port == 0:
                raise ValueError(
                    f"prefill_workers.{index} needs its own side_channel, host:port, as side_channel.port is 0 (any)"
                )
            if self.role != "prefill" and is_loopback(host) and port == self.side_channel.port:
                raise ValueError(
                    f"prefill_workers.{index} has {host}:{port} as its side channel, which is this engine's own: "
                    f"set prefill_workers.{index}.side_channel, or another side_channel.port"
                )
            twin = by_url.setdefault(worker.url, index)
            # data-parallel ranks of one engine share the URL and have a side channel each
            if twin != index and None in (worker.side_channel, self.prefill_workers[twin].side_channel):
                raise ValueError(f"prefill_workers.{twin} and .{index} are the same, {worker.url}: remove one")
            twin = by_address.setdefault(address, index)
            if twin != index:
                raise ValueError(
                    f"prefill_workers.{twin} and .{index} have the same side channel, {host}:{port}: "
                    f"set prefill_workers.{index}.side_channel"
                )
        return self


def load_settings(source: Path | Mapping[str, object], overrides: Mapping[str, object] | None = None) -> DisaggSettings:
    """Read the settings from a YAML or JSON file, or a mapping that was parsed already.

    Args:
        overrides: Laid over ``source`` as by ``merge``.

    Raises:
        ConfigError: One line that names file, field and value, and what is allowed.
    """
    values = read_mapping(source) if isinstance(source, Path) else source
    try:
        settings = DisaggSettings.model_validate(merge(values, overrides or {}))
    except ValidationError as error:
        first, *others = error.errors(include_url=False)
        origin = str(source) if isinstance(source, Path) else "settings"
        if overrides and _holds(overrides, first["loc"]):
            origin = f"settings over {origin}"
        more = f" (and {len(others)} more)" if others else ""
        raise ConfigError(f"{origin}: {one_line(_describe(first))}{more}") from None
    if settings.role != "prefill":
        choose(load_plugins(settings.policy), settings.policy)  # a policy that is not there is a mistake of today
    return settings


def warnings(settings: DisaggSettings) -> list[str]:
    """What is allowed and hardly meant; one line each, to be shown at start."""
    found = []
    channel = settings.side_channel
    if settings.role == "decode" and not settings.prefill_workers:
        found.append("role decode without prefill_workers: every prompt is prefilled locally")
    if settings.role == "prefill" and settings.prefill_workers:
        found.append("role prefill with prefill_workers: they are not used; did you mean role both?")
    if channel.insecure and not channel.keys_dir and not is_loopback(channel.host):
        found.append(
            f"side_channel.insecure: whoever reaches {channel.host}:{channel.port} can take part; set keys_dir instead"
        )
    if settings.cache.lmcache is not None and not settings.cache.reuse_prefix:
        found.append("cache.lmcache without cache.reuse_prefix: LMCache is not used")
    if settings.role != "prefill":
        remote = [
            worker.url
            for worker in settings.prefill_workers
            if not is_loopback(worker.side_channel_address(channel.port)[0])
        ]
        if remote and not channel.keys_dir and not channel.insecure:
            found.append(f"no side_channel.keys_dir: {remote[0]} is another host and will refuse us without keys")
        if remote and is_loopback(channel.host) and settings.nixl.net_devices is None:
            found.append(
                f"side_channel.host is loopback, so KV travels over lo only, but {remote[0]} is another host: "
                "set nixl.net_devices or side_channel.host"
            )
    found += [
        f"transfer.{name} is above transfer.deadline_s: it will never be reached"
        for name in ("start_timeout_s", "stall_timeout_s")
        if getattr(settings.transfer, name) > settings.transfer.deadline_s
    ]
    return found


def not_active_yet(settings: DisaggSettings) -> list[str]:
    """What the settings say and this version does not do; one line each, to be shown by every start."""
    found = []
    if settings.cache.reuse_prefix and settings.cache.lmcache is None:
        found.append("cache.reuse_prefix: without cache.lmcache.url it is each engine's own prefix cache alone")
    if settings.autoscale.model_fields_set:
        found.append("autoscale: no advice is given")
    return [f"accepted, not active yet: {line}" for line in found]


def settings_json_schema() -> dict[str, object]:
    """JSON schema of the settings file."""
    return DisaggSettings.model_json_schema()


def _split_address(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 1 <= int(port) <= 65535 or "/" in address:
        raise ValueError("must be host:port, port 1 to 65535")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _describe(error: ErrorDetails) -> str:
    path = ".".join(str(part) for part in error["loc"])
    value = repr(error["input"])
    shown = value if len(value) <= 80 else f"{value[:77]}..."
    if error["type"] == "extra_forbidden":
        return f"{path}: unknown field; {_suggest(error['loc'])}"
    if error["type"] == "missing":
        return f"{path}: missing: {_model_at(error['loc'][:-1]).model_fields[str(error['loc'][-1])].description}"
    if error["type"] == "value_error":
        problem = str(error["ctx"]["error"])
        # a rule over several fields names them itself
        return f"{path} = {shown}: {problem}" if isinstance(error["input"], str) else f"{path}: {problem}".lstrip(": ")
    return f"{path} = {shown}: {error['msg'].replace('Input should be', 'must be')}"


def _suggest(loc: tuple[int | str, ...]) -> str:
    name = str(loc[-1])
    allowed = list(_model_at(loc[:-1]).model_fields)
    sections = [section for section in DisaggSettings.model_fields if name in _model_at((section,)).model_fields]
    if sections and name not in allowed:
        return f"it stands under {' and '.join(sections)}"
    if close := difflib.get_close_matches(name, allowed, n=1):
        return f"did you mean {close[0]}?"
    return f"known here: {', '.join(allowed)}"


def _model_at(loc: tuple[int | str, ...]) -> type[BaseModel]:
    """The settings class whose fields stand at ``loc``; for a plain field, the class that holds it."""
    model: type[BaseModel] = DisaggSettings
    for part in loc:
        if isinstance(part, str):
            annotation = model.model_fields[part].annotation
            candidates = [annotation, *get_args(annotation)]
            model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), model)
    return model


def _holds(values: object, loc: tuple[int | str, ...]) -> bool:
    for part in loc:
        if not isinstance(values, Mapping):
            return True  # a list or a value replaces everything below it
        if part not in values:
            return False
        values = values[part]
    return bool(loc)
