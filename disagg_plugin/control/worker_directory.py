"""Which prefill workers there are: addresses of the settings, and names that are looked up again and again.

A name under ``discover: dns`` stands for all addresses that it has, as a Kubernetes headless service has one for each
ready pod. A look-up that fails changes nothing: the last known addresses stay.
"""

import asyncio
import ipaddress
import logging
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

from disagg_plugin.config import PrefillWorkerSettings

LOOK_AGAIN_S = 5.0
LOOK_UP_TIMEOUT_S = 4.0

logger = logging.getLogger(__name__)

Resolve = Callable[[str], Awaitable[Sequence[str]]]


@dataclass(frozen=True, slots=True)
class WorkerAddress:
    """How one prefill worker is reached.

    Attributes:
        name: ``host:port`` of its side channel; what decisions, logs and metrics call it.
        url: Base URL of its HTTP API; empty: only a router knows it, no prompt is posted to it.
        tls_name: Name in its certificate where ``url`` holds an address instead, or None.
    """

    name: str
    host: str
    port: int
    url: str
    api_key_env: str | None = None
    tls_name: str | None = None


async def resolve_all(host: str) -> Sequence[str]:
    """All addresses of a name, of the family that the system prefers: a dual-stack pod is one worker, not two.

    Raises:
        OSError: The name cannot be resolved now.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return [str(address[0]) for family, _, _, _, address in found if family == found[0][0]]


class WorkerDirectory:
    """The workers of one decode engine's settings; I/O thread.

    Args:
        default_port: Side-channel port of a worker that names none.
    """

    def __init__(
        self, workers: Iterable[PrefillWorkerSettings], *, default_port: int, resolve: Resolve = resolve_all
    ) -> None:
        workers = tuple(workers)
        self._fixed = tuple([_fixed(w, default_port) for w in workers if w.discover == "static"])
        self._named = tuple([w for w in workers if w.discover == "dns"])
        self._default_port = default_port
        self._resolve = resolve
        self._found: dict[str, tuple[str, ...]] = {}
        self._failing: set[str] = set()
        self.counters: Counter[str] = Counter()

    @property
    def changes(self) -> bool:
        """Whether looking again can make a difference."""
        return bool(self._named)

    def known(self) -> dict[str, WorkerAddress]:
        """Every worker by name, those of the settings first, in a stable order."""
        known = {address.name: address for address in self._fixed}
        for settings in self._named:
            host = urlsplit(settings.url).hostname or ""
            for address in self._found.get(host, ()):
                found = _at(settings, address, self._default_port)
                known.setdefault(found.name, found)
        return known

    @property
    def unresolved(self) -> list[str]:
        """Names that have no address, as of the last look."""
        return sorted(self._failing - self._found.keys())

    async def look(self) -> None:
        """Look every name up once."""
        hosts = dict.fromkeys(urlsplit(settings.url).hostname or "" for settings in self._named)
        await asyncio.gather(*(self._look_up(host) for host in hosts))

    async def _look_up(self, host: str) -> None:
        try:
            addresses = await asyncio.wait_for(self._resolve(host), LOOK_UP_TIMEOUT_S)
        except (OSError, UnicodeError, TimeoutError) as error:
            addresses, problem = (), str(error) or type(error).__name__
        else:
            problem = "no address"
        if addresses:
            self._found[host] = tuple(sorted(set(addresses), key=_sort_key))
            if host in self._failing:
                self._failing.discard(host)
                logger.info("disagg: prefill workers' name %s can be resolved again", host)
            return
        self.counters["look_ups_failed"] += 1
        if host not in self._failing:
            self._failing.add(host)
            logger.warning(
                "disagg: cannot resolve the prefill workers' name %s (%s); keeping the %d known, looking every %.0f s",
                *(host, problem, len(self._found.get(host, ())), LOOK_AGAIN_S),
            )

    def snapshot(self) -> dict[str, object]:
        """The debug view."""
        return {**self.counters, "found": dict(self._found), "failing": sorted(self._failing)}


def _fixed(settings: PrefillWorkerSettings, default_port: int) -> WorkerAddress:
    host, port = settings.side_channel_address(default_port)
    return WorkerAddress(f"{host}:{port}", host, port, settings.url, settings.api_key_env)


def _at(settings: PrefillWorkerSettings, address: str, default_port: int) -> WorkerAddress:
    """One of the workers behind a name."""
    _, port = settings.side_channel_address(default_port)
    parts = urlsplit(settings.url)
    bracketed = f"[{address}]" if ":" in address else address
    netloc = bracketed if parts.port is None else f"{bracketed}:{parts.port}"
    return WorkerAddress(
        name=f"{address}:{port}",
        host=address,
        port=port,
        url=urlunsplit((parts.scheme, netloc, parts.path, "", "")),
        api_key_env=settings.api_key_env,
        tls_name=parts.hostname if parts.scheme == "https" else None,
    )


def _sort_key(address: str) -> tuple[int, int, str]:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:  # a scoped IPv6 address, say
        return 9, 0, address
    return parsed.version, int(parsed), address
