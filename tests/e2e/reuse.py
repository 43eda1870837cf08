"""Two engines with an LMCache server each, and what the tests of prefix reuse do to them."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import psutil
from e2e.client import Answer, Engine
from e2e.conftest import is_quiet
from engine_processes import end_tree
from lmcache_servers import LMCacheServer, is_written, prompt_tokens_by_source, stands_still

LOOKUP_MS = 3000


def cache(server: LMCacheServer, **more: Any) -> dict[str, Any]:
    lmcache = {"url": server.url, "lookup_timeout_ms": LOOKUP_MS, "request_timeout_s": 10, "heartbeat_s": 5, **more}
    return {"reuse_prefix": True, "lmcache": lmcache}


@dataclass
class Reuse:
    """A prefill engine, a decode engine, and their servers."""

    prefill: Engine
    decode: Engine
    store_p: LMCacheServer
    store_d: LMCacheServer
    folder: Path

    def forget(self, engine: Engine | None = None) -> None:
        """Empty D's own prefix cache, or another engine's, and nothing else."""
        engine = engine or self.decode
        engine.when(is_quiet)  # what is being stored is held
        for _ in range(200):
            if engine.http.post(f"{engine.url}/reset_prefix_cache").raise_for_status().json()["success"]:
                return
            Event().wait(0.05)
        raise AssertionError(f"something holds blocks: {engine.snapshot()}")

    def local(self, prompt: list[int], **params: Any) -> Answer:
        """What an ordinary engine says: P, asked directly, under a salt that nobody else uses."""
        return self.prefill.complete(prompt, cache_salt=f"local-{os.urandom(4).hex()}", **params)

    def count(self) -> "Counted":
        return Counted(self.decode)


class Counted:
    """What an engine counted while a block of code ran."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._before = self._read()

    def _read(self) -> dict[str, float]:
        view = self._engine.snapshot()
        metrics = self._engine.http.get(f"{self._engine.url}/metrics").text
        sources = {f"source_{name}": number for name, number in prompt_tokens_by_source(metrics).items()}
        return {**view.get("decode", view.get("prefill"))["totals"], **view["lmcache"]["totals"], **sources}

    def __call__(self, *names: str) -> tuple[float, ...]:
        after = self._read()
        return tuple(after.get(name, 0) - self._before.get(name, 0) for name in names)


def is_stored(engine: Engine, server: LMCacheServer) -> None:
    """Wait until all that the engine computed is in its server's second tier."""
    engine.when(is_quiet)
    server.when(is_written)


@contextmanager
def held_still(engine: Engine) -> Iterator[None]:
    """None of its processes runs meanwhile."""
    _stop(engine)
    try:
        yield
    finally:
        end_tree(engine, signal.SIGCONT)


def _stop(engine: Engine) -> None:
    end_tree(engine, signal.SIGSTOP)
    root = psutil.Process(engine.pid)
    for process in [*root.children(recursive=True), root]:
        stands_still(process.pid)
