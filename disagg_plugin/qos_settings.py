"""Settings of admission: early rejection, classes and their SLOs, API keys, fair share, degradation.

The three names that users of NVIDIA Dynamo know stand directly under ``qos``. An API key itself never stands in the
settings: its SHA-256, an environment variable, or a file that holds it does.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from disagg_plugin.errors import ConfigError
from disagg_plugin.settings_base import SettingsSection
from disagg_policies.admission_snapshots import NEVER_OFFLOAD, ONLY_OFFLOAD, ServiceClass

_STEP = re.compile(rf"max_tokens:[1-9]\d*|{NEVER_OFFLOAD}|{ONLY_OFFLOAD}")
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")  # a metric's label, and a header's value


class QosClassSettings(SettingsSection):
    """One class of requests and what it is promised."""

    ttft_slo_s: float = Field(gt=0, description="Seconds to the first token.")
    tpot_slo_s: float | None = Field(
        default=None, gt=0, description="Mean seconds per further token; null: nothing promised."
    )
    priority: int | None = Field(
        default=None,
        ge=-1000,
        le=1000,
        description="For the engine's scheduler, smaller is earlier; default: -1, 0, 1 for high, normal, low.",
    )
    degrade: tuple[str, ...] = Field(
        default=(),
        description="Steps before anybody is refused, in order: max_tokens:N, never_offload, only_offload.",
    )

    @field_validator("degrade")
    @classmethod
    def _steps_are_known(cls, steps: tuple[str, ...]) -> tuple[str, ...]:
        for step in steps:
            if not _STEP.fullmatch(step):
                raise ValueError(f"{step!r} is no step: must be max_tokens:N, {NEVER_OFFLOAD} or {ONLY_OFFLOAD}")
        if {NEVER_OFFLOAD, ONLY_OFFLOAD} <= set(steps):
            raise ValueError(f"{NEVER_OFFLOAD} and {ONLY_OFFLOAD} exclude each other")
        return steps


class ApiKeySettings(SettingsSection):
    """One API key, and whom it stands for; the key in exactly one of three forms."""

    service_class: str = Field(description="Its class.")
    tenant: str | None = Field(default=None, description="Who shares; default: each key for itself.")
    sha256: str | None = Field(default=None, description="Hexadecimal SHA-256 of the key.")
    env: str | None = Field(default=None, description="Environment variable that holds the key.")
    file: str | None = Field(default=None, description="File that holds the key in its first line.")

    @model_validator(mode="after")
    def _the_key_is_somewhere(self) -> Self:
        if sum(form is not None for form in (self.sha256, self.env, self.file)) != 1:
            raise ValueError("an API key needs exactly one of sha256, env and file")
        if self.sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", self.sha256):
            raise ValueError("sha256 must be 64 hexadecimal digits: `printf %s KEY | sha256sum`")
        return self

    def digest(self) -> str:
        """SHA-256 of the key, hexadecimal.

        Raises:
            ConfigError: The variable or the file is not there, or holds nothing.
        """
        if self.sha256 is not None:
            return self.sha256.lower()
        if self.env is not None:
            key, place = os.environ.get(self.env, ""), f"environment variable {self.env}"
        else:
            place = str(self.file)
            try:
                key = Path(place).read_text(encoding="utf-8").partition("\n")[0]
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"qos.api_keys: {place} cannot be read: {error}") from None
        if not key.strip():
            raise ConfigError(f"qos.api_keys: {place} holds no key")
        return key_digest(key.strip())


def key_digest(key: str) -> str:
    """What stands for a key wherever it is compared or stored."""
    return hashlib.sha256(key.encode()).hexdigest()


USUAL_PRIORITIES = {"high": -1, "normal": 0, "low": 1}  # by name: whatever writes a settings file may sort it
DEFAULT_CLASSES = {
    "high": QosClassSettings(ttft_slo_s=2.0, tpot_slo_s=0.1),
    "normal": QosClassSettings(ttft_slo_s=5.0, tpot_slo_s=0.2),
    "low": QosClassSettings(ttft_slo_s=15.0),
}


class QosSettings(SettingsSection):
    """Early rejection and priorities."""

    enable_early_rejection: bool = Field(
        default=False, description="Refuse what would miss its SLO before any work is done for it."
    )
    low_priority_threshold_ms: float | None = Field(
        default=None,
        gt=0,
        description="Predicted TTFT above which the lowest class is refused; null: above its SLO, like the others.",
    )
    reject_on_slo_violation: bool = Field(
        default=True, description="Refuse what would miss its class's SLO; otherwise serve it late."
    )
    classes: dict[str, QosClassSettings] = Field(
        default=DEFAULT_CLASSES, min_length=1, max_length=16, description="Classes by name."
    )
    default_class: str = Field(default="normal", description="Class of requests that say nothing.")
    api_keys: tuple[ApiKeySettings, ...] = Field(default=(), description="Keys of known clients, and their classes.")
    trust_priority_header: bool = Field(
        default=False, description="Believe x-disagg-priority; only behind a gateway that sets or strips it."
    )
    fair_share_burst_tokens: int | None = Field(
        default=32_768,
        gt=0,
        description="Tokens that a tenant may be ahead of others of its class under pressure; null: no fair share."
        " Off without api_keys.",
    )
    degrade_from: float = Field(default=0.7, gt=0, lt=1, description="Pressure at which the first step comes on.")
    degrade_hysteresis: float = Field(default=0.1, gt=0, lt=1, description="Fall of pressure until a step goes off.")
    exact_check: bool = Field(default=True, description="Check again with the exact length before queueing.")
    state_max_age_s: float = Field(
        default=30.0, gt=0, description="Age from which the engine's report is not believed, and everybody admitted."
    )

    @field_validator("classes")
    @classmethod
    def _class_names_are_words(cls, classes: dict[str, QosClassSettings]) -> dict[str, QosClassSettings]:
        for name in classes:
            if not _NAME.fullmatch(name):
                raise ValueError(f"class {name!r} must be a lower-case word of at most 32 characters")
        return classes

    @model_validator(mode="after")
    def _classes_are_known_and_apart(self) -> Self:
        known = "none of the classes: " + ", ".join(self.classes)
        if self.default_class not in self.classes:
            raise ValueError(f"default_class {self.default_class!r} is {known}")
        priorities = [self._priority(name) for name in self.classes]
        if None in priorities:
            unnamed = list(self.classes)[priorities.index(None)]
            raise ValueError(f"class {unnamed} needs a priority: only {', '.join(USUAL_PRIORITIES)} have one by name")
        if len(set(priorities)) < len(priorities):
            raise ValueError("each class needs a priority of its own")
        for index, key in enumerate(self.api_keys):
            if key.service_class not in self.classes:
                raise ValueError(f"api_keys.{index}: service_class {key.service_class!r} is {known}")
        return self

    def service_classes(self) -> tuple[ServiceClass, ...]:
        """For the policies, the most urgent first."""
        classes = [
            ServiceClass(name, self._priority(name) or 0, given.ttft_slo_s, given.tpot_slo_s, given.degrade)
            for name, given in self.classes.items()
        ]
        return tuple(sorted(classes, key=lambda service_class: service_class.priority))

    def _priority(self, name: str) -> int | None:
        given = self.classes[name].priority
        return USUAL_PRIORITIES.get(name) if given is None else given
