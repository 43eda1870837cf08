"""Which hosts a client's request may make us connect to: names and addresses as written, networks by address only."""

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass

DP_RANKS = 64  # side-channel ports of one engine, counted from its first

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class _Entry:
    host: str  # lower case, or "" for a network
    network: Network | None
    port: int | None


class AllowedHosts:
    """The allow-list of one engine; empty: nothing is allowed.

    Args:
        default_port: First port that an entry without one allows.

    Raises:
        ValueError: An entry is none.
    """

    def __init__(self, entries: Iterable[str], *, default_port: int) -> None:
        self._entries = tuple([_parse(entry) for entry in entries])
        self._default_ports = range(default_port, default_port + DP_RANKS)

    def allows(self, host: str, port: int) -> bool:
        """Whether ``host``, as a request names it, may be connected to. No name is ever looked up to find out."""
        address = _address(host)
        for entry in self._entries:
            same = host.lower() == entry.host
            if entry.network is not None:
                same = address is not None and address.version == entry.network.version and address in entry.network
            if same and (port == entry.port if entry.port is not None else port in self._default_ports):
                return True
        return False


def _parse(entry: str) -> _Entry:
    host, port = entry, None
    bracketed = entry.startswith("[")
    if bracketed or entry.count(":") == 1:
        host, _, digits = entry.rpartition(":")
        if not digits.isascii() or not digits.isdigit() or not 1 <= int(digits) <= 65535:
            raise ValueError(f"{entry!r}: must end with a port from 1 to 65535, or have none")
        port = int(digits)
    host = host.removeprefix("[").removesuffix("]")
    if not host or any(character.isspace() for character in host):
        raise ValueError(f"{entry!r}: must be HOST, HOST:PORT, NETWORK/BITS or NETWORK/BITS:PORT")
    if "/" in host:
        return _Entry("", ipaddress.ip_network(host), port)
    return _Entry(host.lower(), None, port)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
