"""What transfers cost running decodes, on real engines: ``transfer.py --engines``.

Tiny model, raw KV, one core an engine. Four texts are being decoded on D, their gaps are measured at the client:

    quiet        nothing else happens
    control      P prefills prompts of 2,000 tokens that were sent to it directly: the same work, nothing is sent to D
    receiving    D offloads as many prompts of that length, two at a time
    killed       D has eight of them under way when P is killed: they are computed on D, at the repair's pace
    local        eight more, now that P is dead: plain chunked prefill on D

``tpot_ratio`` is the p99 gap of ``receiving`` over that of ``control``, ``tpot_ratio_killed`` that of ``killed`` over
``local``. ``worst_step_ms`` has the longest gap of each. ``handover_ms`` is measured by ``handover.py``, for stock from
the moment when its client has P's answer.
"""

import signal
import statistics
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import handover
import psutil
from real_pair import Client, DisaggPair, fresh_prompt, start_disagg_pair, tiny_model

LONG_TOKENS, TEXT_TOKENS = 2_000, 2_500
TEXTS, PROMPTS, KILLED = 4, 8, 8
QUIET_S = 4.0


class Texts:
    """What is being decoded on D: the gaps between tokens since somebody last asked."""

    def __init__(self, client: Client, url: str) -> None:
        self._gaps_s: list[float] = []
        self._over = threading.Event()
        self._pool = ThreadPoolExecutor(TEXTS)
        self._running = [self._pool.submit(self._decode, client, url) for _ in range(TEXTS)]

    def _decode(self, client: Client, url: str) -> None:
        while not self._over.is_set():
            client.stream(url, fresh_prompt(20), max_tokens=TEXT_TOKENS, on_gap=self._gaps_s.append, over=self._over)

    def gaps_during(self, work: Callable[[], object]) -> list[float]:
        self._gaps_s.clear()
        work()
        return sorted(self._gaps_s)

    def close(self) -> None:
        self._over.set()
        for text in self._running:
            text.result()


def each(client: Client, url: str, prompts: int, at_once: int) -> None:
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(lambda _: client.stream(url, fresh_prompt(LONG_TOKENS), max_tokens=1), range(prompts)))


def kill_p_meanwhile(client: Client, pair: DisaggPair) -> None:
    """P dies once it is sending."""
    view = pair.view("decode")["decode"]
    received = sum(rank["chunks_received"] for rank in view["ranks"].values())
    with ThreadPoolExecutor(1) as pool:
        prompts = pool.submit(each, client, pair.urls["decode"], KILLED, KILLED)
        while sum(r["chunks_received"] for r in pair.view("decode")["decode"]["ranks"].values()) <= received:
            pass
        port = pair.urls["prefill"].rsplit(":", 1)[1]
        (first,) = [process for process in psutil.Process().children() if port in process.cmdline()]
        for process in [*first.children(recursive=True), first]:
            process.send_signal(signal.SIGKILL)
        prompts.result()


def p99(ordered: list[float]) -> float:
    return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]


def decodes_beside_transfers(model: str, folder: Path) -> dict[str, Any]:
    with ExitStack() as stack:
        always = {"split_policy": {"prompt_length_threshold": 256}, "policy": {"offload": "threshold"}}
        pair = start_disagg_pair(stack, folder, model, decode=always, extra=["--max-num-batched-tokens", "512"])
        client, decode, prefill = Client(model), pair.urls["decode"], pair.urls["prefill"]
        each(client, decode, 4, 2)  # warm-up, on both engines
        texts = Texts(client, decode)
        stack.callback(texts.close)
        gaps = {"quiet": texts.gaps_during(lambda: threading.Event().wait(QUIET_S))}
        for prompts in (PROMPTS, 3 * PROMPTS):  # the first round warms up
            gaps["control"] = texts.gaps_during(partial(each, client, prefill, prompts, 2))
            gaps["receiving"] = texts.gaps_during(partial(each, client, decode, prompts, 2))
        before = pair.view("decode")["decode"]
        gaps["killed"] = texts.gaps_during(lambda: kill_p_meanwhile(client, pair))
        after = pair.view("decode")["decode"]
        gaps["local"] = texts.gaps_during(lambda: each(client, decode, KILLED, KILLED))
    return {
        "tpot_ratio": round(p99(gaps["receiving"]) / p99(gaps["control"]), 2),
        "tpot_ratio_killed": round(p99(gaps["killed"]) / p99(gaps["local"]), 2),
        "tpot_p99_ms": {name: round(1e3 * p99(found), 1) for name, found in gaps.items()},
        "tpot_p50_ms": {name: round(1e3 * statistics.median(found), 1) for name, found in gaps.items()},
        "worst_step_ms": {name: round(1e3 * found[-1], 1) for name, found in gaps.items()},
        "fallbacks": sum(after["fallbacks"].values()) - sum(before["fallbacks"].values()),
        "landed": before["totals"]["landed"],
    }


def measured(repeats: int) -> dict[str, Any]:
    """All figures of this module."""
    model = tiny_model()
    with tempfile.TemporaryDirectory(prefix="transfer-") as name:
        folder = Path(name)
        figures = decodes_beside_transfers(model, folder)
        ours = handover.disagg_pair(model, folder, [1_500], repeats)
        stock = handover.stock_pair(model, folder, [1_500], repeats)
    figures["handover_ms"] = {
        "disagg": round(ours["exposed_ms"]["p50"], 1),
        "stock": round(stock["exposed_ms"]["p50"], 1),
    }
    return figures
