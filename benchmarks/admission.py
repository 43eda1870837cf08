"""What admission costs a request that is admitted: the middleware's own code around a stub app.

    python benchmarks/admission.py [--calls 100000] [--json]

Every call is one request through ``AdmissionMiddleware``: body read and looked at, class and API key resolved, snapshot
made of a busy engine's report (three classes queued, two prefill workers) and of a hundred reservations, policy asked,
priority written into the body, response passed on. Bodies are of four kinds in turn: chat of 2 kB, chat of 24 kB, 1,000
token ids, and a chat of 1 MB. The stub's own time, measured without the middleware, is subtracted.

CPU time of the thread counts, so that other processes on the machine do not; wall-clock time is printed beside it.

The last line with ``--json``: p50 and p99 over all calls, and per kind, in microseconds.
"""

import argparse
import asyncio
import json
import statistics
import time
from typing import Any

from disagg_plugin.admission.admitter import Admitter
from disagg_plugin.admission.engine_state import EngineState
from disagg_plugin.admission.gate import Gate
from disagg_plugin.admission.middleware import AdmissionMiddleware
from disagg_plugin.hookspecs import PolicyParameters
from disagg_plugin.plugins import choose, load_plugins
from disagg_plugin.qos_settings import QosSettings, key_digest
from disagg_policies.admission_snapshots import QueuedWork
from disagg_policies.snapshots import DecodeState, PrefillModel, WorkerState

KEY = "a-client's-key"
FAST = PrefillModel(per_token_s=1e-6, per_pair_s=0.0)


def busy_gate() -> Gate:
    settings = QosSettings.model_validate(
        {"enable_early_rejection": True, "api_keys": [{"service_class": "high", "sha256": key_digest(KEY)}]}
    )
    gate = Gate(settings, Admitter(choose(load_plugins()).admission, PolicyParameters()))
    workers = tuple(WorkerState(f"10.0.0.{at}:5600", True, at, 131_072, prefill=FAST) for at in range(2))
    queued = tuple(QueuedWork(priority, 8, 9_000) for priority in (-1, 0, 1))
    decode = DecodeState("d", running_decodes=64, decode_context_tokens=200_000, prefill=FAST)
    gate.update(EngineState(decode=decode, workers=workers, queued=queued, reorders=True, kv_capacity_tokens=10**7))
    return gate


def bodies() -> dict[str, bytes]:
    def chat(size: int) -> bytes:
        turns = [{"role": "user", "content": "How long does this take? " * 40}] * max(1, size // 1_000)
        return json.dumps({"messages": turns, "model": "m", "max_tokens": 200, "stream": True}).encode()

    ids = json.dumps({"model": "m", "prompt": [t * 37 % 50_000 for t in range(1_000)], "max_tokens": 200}).encode()
    return {"chat_2kB": chat(2_000), "chat_24kB": chat(24_000), "ids_1000": ids, "chat_1MB": chat(1_000_000)}


async def measure(app: Any, body: bytes) -> tuple[float, float]:
    """CPU seconds and seconds of one request."""
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "headers": [
            (b"host", b"localhost"),
            (b"content-length", b"%d" % len(body)),
            (b"authorization", b"Bearer " + KEY.encode()),
            (b"content-type", b"application/json"),
        ],
    }

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        pass

    started, cpu = time.perf_counter(), time.thread_time()
    await app(scope, receive, send)
    return time.thread_time() - cpu, time.perf_counter() - started


async def stub(_scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    for _ in range(3):
        await send({"type": "http.response.body", "body": b'data: {"choices": []}\n\n', "more_body": True})
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def run(calls: int) -> dict[str, dict[str, float]]:
    gate = busy_gate()
    gate.has_exact = True  # as in vLLM
    for _ in range(100):
        gate._ledger.reserve(0, 500, time.monotonic())
    app = AdmissionMiddleware(stub, gate, sets_priority=lambda: True)
    kinds = bodies()
    taken: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    bare = [await measure(stub, b"{}") for _ in range(2_000)]
    bare_cpu_s, bare_s = (statistics.median(clock) for clock in zip(*bare, strict=True))
    for _ in range(2_000):
        await measure(app, kinds["chat_2kB"])
    for _ in range(calls // len(kinds)):
        for kind, body in kinds.items():
            cpu_s, wall_s = await measure(app, body)
            taken[kind].append((cpu_s - bare_cpu_s, wall_s - bare_s))
    taken["all"] = [pair for kind in kinds for pair in taken[kind]]
    return {
        kind: quantiles([cpu for cpu, _ in pairs])
        | {"wall_" + k: v for k, v in quantiles([w for _, w in pairs]).items()}
        for kind, pairs in taken.items()
    }


def quantiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        f"p{share}_us": round(ordered[min(len(ordered) - 1, len(ordered) * share // 100)] * 1e6, 1)
        for share in (50, 99)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    arguments = parser.parse_args()
    measured = asyncio.run(run(arguments.calls))
    for kind, figures in measured.items():
        shown = "   ".join(f"{name[:-3]} {value:8.1f} us" for name, value in figures.items())
        print(f"{kind:>10}  {shown}")
    if arguments.json:
        print(json.dumps({**measured.pop("all"), "calls": arguments.calls, "by_body": measured}))


if __name__ == "__main__":
    main()
