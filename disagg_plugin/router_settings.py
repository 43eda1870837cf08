"""Settings of the classical flow, in which a router chooses the prefill engine and tells the decode engine where."""

from pydantic import Field, field_validator

from disagg_plugin.allowed_hosts import AllowedHosts
from disagg_plugin.settings_base import SettingsSection


class RouterSettings(SettingsSection):
    """Requests with ``do_remote_decode`` and ``do_remote_prefill``, as NixlConnector's routers send them."""

    allowed_hosts: tuple[str, ...] = Field(
        default=(),
        description="Decode: prefill engines beyond prefill_workers that a request may name: HOST, HOST:PORT, "
        "NETWORK/BITS or NETWORK/BITS:PORT; without a port: side_channel.port and the 63 after it. Any client can name "
        "a host, so whatever is allowed here will be connected to.",
    )
    advertise_host: str | None = Field(
        default=None,
        description="Prefill: the host that decode engines are told; default: side_channel.host, or this machine's "
        "name where that is a wildcard.",
    )

    @field_validator("allowed_hosts")
    @classmethod
    def _entries_can_be_read(cls, entries: tuple[str, ...]) -> tuple[str, ...]:
        AllowedHosts(entries, default_port=1)
        return entries
