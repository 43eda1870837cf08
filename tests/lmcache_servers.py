"""Real `lmcache server` processes for e2e tests, and what they say about themselves."""

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import psutil
from engines import free_port, serving

CHUNK = 64  # tokens


@dataclass
class LMCacheServer:
    """One server, which can be ended and started again at the same address."""

    name: str
    folder: Path
    port: int = field(default_factory=free_port)
    http_port: int = field(default_factory=free_port)
    pid: int = 0
    life: ExitStack = field(default_factory=ExitStack)

    @property
    def url(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def start(
        self, *, l2: Path | None = None, serde: str = "", l1_gb: float = 0.25, chunk: int = CHUNK, shm: str = ""
    ) -> None:
        """Start it; with ``serde`` by our launcher, with ``shm`` sharing its memory under this name."""
        if serde:
            argv = [sys.executable, "-m", "disagg_lmcache.server"]
        else:
            # SGLang's environment has what LMCache's client needs, not its server
            argv = [os.environ.get("DISAGG_LMCACHE_PYTHON", sys.executable), "-m", "lmcache.cli.main", "server"]
        flags = f"--host 127.0.0.1 --port {self.port} --http-host 127.0.0.1 --http-port {self.http_port}"
        flags += f" --chunk-size {chunk} --l1-size-gb {l1_gb} --no-l1-use-lazy"
        flags += " --eviction-policy LRU --supported-transfer-mode auto"
        argv += [*flags.split(), *(("--shm-name", shm) if shm else ())]
        if l2 is not None:
            l2.mkdir(exist_ok=True)
            adapter: dict[str, Any] = {"type": "fs", "base_path": str(l2)}
            argv += ["--l2-adapter", json.dumps(adapter | ({"serde": {"type": serde}} if serde else {}))]
        process = self.life.enter_context(
            serving(
                argv,
                f"http://127.0.0.1:{self.http_port}/healthcheck",
                self.folder / f"lmcache-{self.name}.log",
                start_s=180,
                env={"LMCACHE_TRACK_USAGE": "false"},
            )
        )
        self.pid = process.pid

    def stop(self) -> None:
        """End it; what it held in memory is lost."""
        self.life.close()
        self.life = ExitStack()
        self.pid = 0

    @property
    def runs(self) -> bool:
        return self.pid != 0

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """It is there, and does not answer."""
        os.kill(self.pid, signal.SIGSTOP)
        stands_still(self.pid)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = httpx.get(f"http://127.0.0.1:{self.http_port}/status", timeout=20).json()
        return {**status, **status["storage_manager"]}

    def when(self, condition: Callable[[dict[str, Any]], bool], within_s: float = 30.0) -> dict[str, Any]:
        """The first status that fulfils ``condition``."""
        status: dict[str, Any] = {}
        for _ in range(int(within_s / 0.2)):
            if condition(status := self.status()):
                return status
            Event().wait(0.2)
        raise AssertionError(f"not within {within_s} s: {json.dumps(status['l1_manager'])}")

    def clear(self) -> None:
        """Empty its first tier."""
        httpx.post(f"http://127.0.0.1:{self.http_port}/cache/clear", timeout=20).raise_for_status()


def holds_nothing_locked(status: dict[str, Any]) -> bool:
    """No look-up of anybody keeps chunks from being evicted, and none is under way."""
    l1 = status["l1_manager"]
    return not (l1["read_locked_count"] or l1["write_locked_count"] or status["active_prefetch_jobs"])


def is_written(status: dict[str, Any]) -> bool:
    """Whatever was stored has reached the second tier."""
    store = status["store_controller"]
    return holds_nothing_locked(status) and not (store["pending_keys_count"] or store["in_flight_task_count"])


def prompt_tokens_by_source(metrics: str) -> dict[str, float]:
    """Prompt tokens of an engine by where their KV came from, as vLLM itself counts them."""
    found: dict[str, float] = {}
    for name, key in (("prompt_tokens_by_source", "source"), ("prompt_tokens_cached_by_source", "source")):
        for labels, value in re.findall(rf"^vllm:{name}_total{{(.*)}} (\S+)$", metrics, re.MULTILINE):
            source = dict(re.findall(r'(\w+)="([^"]*)"', labels))[key]
            found[source] = found.get(source, 0) + float(value)
    return found


def stands_still(pid: int) -> None:
    """Wait until a stopped process has stopped: one of its threads must run for that, and on a busy machine the others
    go on meanwhile."""
    for _ in range(2_000):
        if psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
            return
        Event().wait(0.005)
    raise AssertionError(f"process {pid} goes on")
