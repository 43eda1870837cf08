"""The one settings tree: parsed once at the edge, frozen, passed down.

Units stand in the names: ``_s`` seconds, ``_ms`` milliseconds, ``_bytes``, ``_tokens``. A misspelt field is an error.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Role = Literal["prefill", "decode", "both"]
CodecChoice = Literal["auto", "raw", "int8", "int8c"]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PrefillWorkerSettings(_Settings):
    """One prefill engine, as its decode engines reach it."""

    url: str = Field(description="Base URL of its OpenAI HTTP API, for example http://10.0.0.5:8000.")
    side_channel: str | None = Field(
        default=None, description="host:port of its side channel; default: the URL's host and side_channel.port."
    )
    api_key_env: str | None = Field(
        default=None, description="Environment variable that holds its API key, if it asks for one."
    )


class SideChannelSettings(_Settings):
    """The authenticated control channel between schedulers."""

    host: str = Field(default="127.0.0.1", description="Address to bind to; anything but loopback needs keys_dir.")
    port: int = Field(default=5600, ge=0, le=65535, description="Port of DP rank 0; rank r binds to port + r.")
    keys_dir: str | None = Field(default=None, description="Folder made by `disagg keygen`.")
    insecure: bool = Field(default=False, description="Allow a bind beyond loopback without keys. Not for production.")
    heartbeat_s: float = Field(default=0.5, gt=0, description="Interval of heartbeats to each peer.")
    peer_timeout_s: float = Field(default=3.0, gt=0, description="A peer silent for longer is lost.")


class NixlSettings(_Settings):
    """How NIXL is set up in each worker."""

    backend: str = Field(default="UCX", description="NIXL backend.")
    net_devices: str | None = Field(
        default=None, description="UCX_NET_DEVICES; default: lo while the side channel is on loopback, else UCX's own."
    )
    progress_thread: bool = Field(
        default=False, description="NIXL's own spinning thread: one core per worker, always. For RDMA nodes only."
    )


class TransferSettings(_Settings):
    """Chunks, slots, deadlines."""

    codec: CodecChoice = Field(default="auto", description="auto: raw on one host, int8 (guarded) between hosts.")
    compile: bool = Field(default=True, description="Compile the codec with Inductor at start (5-20 s the first time).")
    guard_tokens: int = Field(default=1024, ge=0, description="Tokens of real KV a layer is measured on before int8.")
    guard_limit: float = Field(
        default=0.01, gt=0, description="Quantization noise over variance, per channel, above which a layer goes raw."
    )
    slot_bytes: int = Field(default=16 << 20, ge=4096, description="Size of one landing slot.")
    region_slots: int = Field(default=8, ge=1, le=4096, description="Slots of each peer's region: its credit window.")
    ring_max_bytes: int = Field(default=1 << 30, ge=4096, description="All regions of one worker rank together.")
    scatter_budget_ms: float = Field(default=2.0, gt=0, description="Decode and scatter per busy engine step.")
    scatter_idle_budget_ms: float = Field(
        default=20.0, gt=0, description="The same in a step that computes nothing else."
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
    alloc_lead_s: float = Field(default=0.05, ge=0, description="Allocate when the prefill is to start this soon.")
    linger_s: float = Field(default=2.0, ge=0, description="Keep polling this long after the last transfer.")


class SplitPolicySettings(_Settings):
    """When to offload."""

    prompt_length_threshold: int = Field(
        default=256, ge=0, description="Offload when more uncached prompt tokens than this."
    )
    prefill_queue_max: int = Field(default=32, ge=1, description="Queue length at which a prefill worker refuses.")


class DisaggSettings(_Settings):
    """Everything; stands in a YAML or JSON file, or under ``kv_connector_extra_config`` (vLLM)."""

    role: Role = Field(default="both", description="What this engine does for others: prefill, decode, or both.")
    prefill_workers: tuple[PrefillWorkerSettings, ...] = Field(
        default=(), description="Prefill engines that this decode engine may use."
    )
    split_policy: SplitPolicySettings = Field(default=SplitPolicySettings(), description="When to offload.")
    transfer: TransferSettings = Field(default=TransferSettings(), description="Chunks, slots, deadlines.")
    side_channel: SideChannelSettings = Field(default=SideChannelSettings(), description="Control channel.")
    nixl: NixlSettings = Field(default=NixlSettings(), description="Data channel.")
    model_revision_id: str | None = Field(
        default=None, description="Stands in for the weights digest where weight files cannot be read."
    )
