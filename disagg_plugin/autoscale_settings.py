"""Settings of scaling advice; the names are those that users of NVIDIA Dynamo know. Nothing here starts machines."""

from typing import Self

from pydantic import Field, model_validator

from disagg_plugin.settings_base import SettingsSection


class ScaleLimits(SettingsSection):
    """Load at which replicas are added or removed; what is left out does not count."""

    queue_length: int | None = Field(default=None, ge=0, description="Requests that wait, a replica.")
    gpu_utilization: float | None = Field(default=None, ge=0, le=100, description="Busy GPU time, percent.")
    kv_cache_usage: float | None = Field(default=None, ge=0, le=100, description="Used KV cache, percent.")


class ReplicaSettings(SettingsSection):
    """How many engines of one role, and when more or fewer."""

    min_replicas: int = Field(default=1, ge=0, description="Never fewer.")
    max_replicas: int = Field(default=1, ge=1, description="Never more.")
    scale_up: ScaleLimits = Field(default=ScaleLimits(), description="Above any of these: one more.")
    scale_down: ScaleLimits = Field(default=ScaleLimits(), description="Below all of these: one fewer.")

    @model_validator(mode="after")
    def _limits_are_in_order(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}")
        for name in ScaleLimits.model_fields:
            up, down = getattr(self.scale_up, name), getattr(self.scale_down, name)
            if up is not None and down is not None and down >= up:
                raise ValueError(f"scale_down.{name} {down} is not below scale_up.{name} {up}: it would flap")
        return self


class AutoscaleSettings(SettingsSection):
    """Scaling advice for both roles."""

    prefill: ReplicaSettings = Field(default=ReplicaSettings(), description="Prefill engines.")
    decode: ReplicaSettings = Field(default=ReplicaSettings(), description="Decode engines.")
