"""Settings of the observability part: section ``observability`` of the plugin's settings."""

from pydantic import Field

from disagg_plugin.settings_base import SettingsSection


class ObservabilitySettings(SettingsSection):
    """How the engine speaks about what the plugin does."""

    admin_route: bool = Field(
        default=False, description="Serve GET /disagg/status (JSON); with the API key, where the server has one."
    )
    stats_interval_s: float = Field(
        default=0.1, gt=0, le=60, description="Counters and gauges leave the scheduler process this often at most."
    )
    slo_objective: float = Field(
        default=0.95, gt=0, lt=1, description="Share of requests meant to meet their SLOs; burn rate 1 uses it up."
    )
