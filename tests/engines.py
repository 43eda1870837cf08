"""Real engines for tests, examples and benchmarks: start, wait for health, end exactly what was started."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from models import cache_dir

POLL_S = 0.25
END_S = 30.0  # from SIGTERM to SIGKILL
LOG_LINES = 60


class Timing(NamedTuple):
    """How long something took that the session's summary should show."""

    what: str
    seconds: float


TIMINGS: list[Timing] = []  # printed by tests/conftest.py at the end of the session


class EngineFailed(Exception):
    """The engine ended, or did not become healthy in time; the message ends with its log's last lines."""


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Record how long the body takes, also when it fails."""
    started = time.monotonic()
    try:
        yield
    finally:
        TIMINGS.append(Timing(what, time.monotonic() - started))


@contextmanager
def serving(
    argv: Sequence[str],
    health_url: str,
    log_path: Path,
    start_s: float = 600.0,
    env: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server for the body: from its first HTTP 200 on ``health_url`` until its process group has ended.

    Args:
        log_path: Gets its output, appended, so that a restarted engine keeps the log of its first life.
        env: Laid over this process's environment.

    Raises:
        EngineFailed: It did not become healthy within ``start_s``.
    """
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            # a group that can be ended without ending us; not a session: each would be scheduled as one (autogroup),
            # and processes that spin with sched_yield in two sessions starve each other for seconds
            process_group=0,
        )
    try:
        with timed(f"start {log_path.stem}"):
            _wait_until_healthy(process, health_url, log_path, start_s)
        yield process
    except EngineFailed:
        raise
    except BaseException as error:  # not swallowed: a test's failure, or its time-out, with the engine's log
        error.add_note(f"--- {log_path}\n{_tail(log_path)}")
        raise
    finally:
        _end_group(process)


def vllm_command(
    model: str,
    port: int,
    *,
    core: int,  # noqa: ARG001  bound by vllm_env: named in both, so that the two calls of a start read alike
    extra: Sequence[str] = (),
) -> list[str]:
    """The command line of a small CPU engine; ``extra`` comes last and wins."""
    vllm = Path(sys.executable).with_name("vllm")
    flags = "--host 127.0.0.1 --dtype float32 --enforce-eager --block-size 32 --max-model-len 4096"
    return [str(vllm), "serve", model, "--port", str(port), *flags.split(), *extra]


def vllm_env(*, core: int) -> dict[str, str]:
    """Its environment: offline, 1 GiB of KV, all of its math on one core of those that we may use."""
    cores = sorted(os.sched_getaffinity(0))
    return {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": str(cores[core % len(cores)]),
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
        "UCX_TLS": "tcp,self,sm,cma",
        "TORCHINDUCTOR_CACHE_DIR": str(cache_dir() / "inductor"),
    }


def sglang_command(
    model: str,
    port: int,
    *,
    extra: Sequence[str] = (),
    python: str = sys.executable,
) -> list[str]:
    """The command line of a small SGLang CPU engine; ``python`` is an interpreter that has SGLang."""
    flags = (
        "--host 127.0.0.1 --device cpu --dtype float32 --attention-backend torch_native --sampling-backend pytorch "
        "--cuda-graph-backend-decode disabled --cuda-graph-backend-prefill disabled --disable-overlap-schedule "
        "--skip-server-warmup --mem-fraction-static 0.1 --max-total-tokens 16384 --page-size 16 --watchdog-timeout 600"
    )
    command = [python, "-m", "sglang.launch_server", "--model-path", model, "--port", str(port)]
    command += ["--nccl-port", str(free_port())]  # its own choice may be one that we gave to somebody else
    return [*command, *flags.split(), *extra]


def sglang_env() -> dict[str, str]:
    """Its environment: offline, no CUDA, and stand-ins for what only images and CUDA need."""
    standins = str(Path(__file__).with_name("sglang_standins"))
    return {
        "SGLANG_USE_CPU_ENGINE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "UCX_TLS": "tcp,self,sm,cma",
        "PYTHONPATH": os.pathsep.join(filter(None, [standins, os.environ.get("PYTHONPATH")])),
        "TORCHINDUCTOR_CACHE_DIR": str(cache_dir() / "inductor"),
    }


def free_port() -> int:
    """A TCP port on loopback that nobody listens on, never the same twice.

    Below the range of ephemeral ports: otherwise an outgoing connection may take it while its engine still starts.
    Test processes that run side by side take turns in it.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    for _ in range(1000):
        port = random.SystemRandom().randrange(20_000 + worker, 32_000, workers)
        if port in _handed_out:
            continue
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            _handed_out.add(port)
            return port
    raise RuntimeError("no free TCP port between 20000 and 32000")


_handed_out: set[int] = set()
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxy this machine uses


def _wait_until_healthy(process: subprocess.Popen[bytes], url: str, log_path: Path, start_s: float) -> None:
    deadline = time.monotonic() + start_s
    while not _is_healthy(url):
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(POLL_S)  # the pause between two looks, cut short when it ends
            raise EngineFailed(f"ended with exit code {code} before it was healthy: {log_path}\n{_tail(log_path)}")
        if time.monotonic() > deadline:
            raise EngineFailed(f"not healthy within {start_s:.0f} s: {log_path}\n{_tail(log_path)}")


def _is_healthy(url: str) -> bool:
    try:
        with _direct.open(url, timeout=5.0) as response:
            return int(response.status) == 200
    except urllib.error.HTTPError as error:
        error.close()
        return False
    except OSError:
        return False


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM lets vLLM end its workers; SIGKILL takes whatever of the group is left, hung or orphaned."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(log_path: Path) -> str:
    return "\n".join(log_path.read_text(errors="replace").splitlines()[-LOG_LINES:])
