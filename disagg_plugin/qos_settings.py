"""Settings of admission and priorities; the names are those that users of NVIDIA Dynamo know."""

from pydantic import Field

from disagg_plugin.settings_base import SettingsSection


class QosSettings(SettingsSection):
    """Early rejection and priorities."""

    enable_early_rejection: bool = Field(default=False, description="Refuse what would miss its SLO before any work.")
    low_priority_threshold_ms: float = Field(
        default=500.0, gt=0, description="Predicted TTFT above which low priority is refused."
    )
    reject_on_slo_violation: bool = Field(default=True, description="Refuse what would miss its class's SLO.")
