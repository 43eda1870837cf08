"""What every section of the settings has in common: frozen, no unknown field, no infinity."""

from pydantic import BaseModel, ConfigDict


class SettingsSection(BaseModel):
    """Base of all sections."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
