"""The demo: a prefill and a decode engine on this machine, requests of several lengths, and what happened to each.

    .venv/bin/python examples/01_two_engines/run.py [--model DIR]

Without --model it serves SmolLM2-135M-Instruct on the CPU (made and cached on first use).
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))  # engine launcher and models are shared with the tests

from engines import free_port, serving, vllm_command, vllm_env  # noqa: E402
from models import smollm2  # noqa: E402

from disagg_plugin.control.service import fetch_snapshot  # noqa: E402

MAX_TOKENS = 24
CLOSE_CALL = 0.05  # nats: where the local run's best two tokens are this close, int8 may choose the other one
TOPICS = ("the history of the printing press", "how tides work", "what a compiler does", "why the sky is blue")
FILLER = (
    "Consider every relevant detail, name the people and places involved, explain the causes and the consequences, "
    "and compare the situation before with the situation after. "
)
LENGTHS = (20, 300, 60, 420, 200, 100, 520, 360, 40, 250)  # tokens, about


@dataclass
class Outcome:
    """One request, as its row of the table needs it."""

    prompt_tokens: int
    ttft_s: float
    text: str
    logprobs: dict[str, Any]
    transfer: dict[str, Any] | None
    where: str
    why: str
    verdict: str = ""


class Demo:
    """Both engines and the requests."""

    def __init__(self, model: str, folder: Path) -> None:
        self.model = model
        self.folder = folder
        self.ports = {role: free_port() for role in ("prefill", "decode")}
        self.side = {role: free_port() for role in ("prefill", "decode")}
        self.http = httpx.Client(timeout=600)

    def start(self, stack: ExitStack, role: str, core: int) -> None:
        """Start one engine with this folder's YAML file, on free ports."""
        settings = yaml.safe_load((HERE / f"{role}.yaml").read_text())
        settings["side_channel"]["port"] = self.side[role]
        for worker in settings.get("prefill_workers", ()):
            worker["url"] = f"http://127.0.0.1:{self.ports['prefill']}"
            worker["side_channel"] = f"127.0.0.1:{self.side['prefill']}"
        config = self.folder / f"{role}.yaml"
        config.write_text(yaml.safe_dump(settings))
        argv = vllm_command(
            self.model,
            self.ports[role],
            core=core,
            extra=["--kv-connector", "disagg", "--disagg-role", role, "--disagg-config", str(config)],
        )
        print("$", " ".join(argv), flush=True)
        stack.enter_context(
            serving(
                argv,
                f"http://127.0.0.1:{self.ports[role]}/health",
                self.folder / f"{role}.log",
                start_s=600,
                env=vllm_env(core=core),
            )
        )

    def snapshot(self) -> dict[str, Any]:
        return asyncio.run(fetch_snapshot("127.0.0.1", self.side["decode"], None))

    def wait_for_peer(self) -> None:
        """Until the decode engine has met the prefill engine."""
        for _ in range(100):
            if any(w["healthy"] for w in self.snapshot()["prefill_workers"]["workers"].values()):
                return
            time.sleep(0.2)
        raise SystemExit("the decode engine did not find the prefill engine; see the logs in " + str(self.folder))

    def ask(self, role: str, prompt: str, salt: str) -> tuple[float, str, dict[str, Any], int]:
        """One streamed greedy request: (TTFT seconds, text, logprobs, prompt tokens)."""
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 2,
            "stream": True,
            "stream_options": {"include_usage": True},
            "cache_salt": salt,
        }
        started = time.perf_counter()
        first_s, text, tokens, tops, usage = 0.0, "", [], [], {}
        url = f"http://127.0.0.1:{self.ports[role]}/v1/completions"
        with self.http.stream("POST", url, json=body) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                part = json.loads(line.removeprefix("data: "))
                usage = part.get("usage") or usage
                for choice in part["choices"]:
                    first_s = first_s or time.perf_counter() - started
                    text += choice["text"]
                    tokens += choice["logprobs"]["tokens"]
                    tops += choice["logprobs"]["top_logprobs"]
        return first_s, text, {"tokens": tokens, "tops": tops}, usage["prompt_tokens"]

    def run_one(self, prompt: str, salt: str) -> Outcome:
        """Send one request to the decode engine and find out from its snapshot what became of it."""
        before = self.snapshot()["decode"]
        ttft_s, text, logprobs, prompt_tokens = self.ask("decode", prompt, salt)
        after = self.snapshot()["decode"]
        known = {t["transfer_id"] for t in before["recent"]}
        transfers = [t for t in after["recent"] if t["transfer_id"] not in known]
        (why,) = [r for r, n in after["decisions"].items() if n > before["decisions"].get(r, 0)]
        if not transfers:
            return Outcome(prompt_tokens, ttft_s, text, logprobs, None, "decode", why)
        (transfer,) = transfers
        if transfer["state"] == "landed":
            return Outcome(prompt_tokens, ttft_s, text, logprobs, transfer, "prefill", why)
        return Outcome(prompt_tokens, ttft_s, text, logprobs, transfer, "decode", f"fallback: {transfer['failure']}")


def make_prompts() -> list[str]:
    """Instructions of about the wanted lengths; no two share a prefix."""
    prompts = []
    for index, length in enumerate(LENGTHS):
        topic = TOPICS[index % len(TOPICS)]
        filler = (FILLER * (length // 28 + 1)).split()
        prompts.append(f"{index + 1}. Write about {topic}. " + " ".join(filler[: max(0, int(length * 0.85) - 8)]))
    return prompts


def compare(got: dict[str, Any], local: dict[str, Any]) -> str:
    """ "same", "close call at i" (int8 chose the other of two almost equal tokens), or "MISMATCH at i"."""
    for position, (ours, theirs) in enumerate(zip(got["tokens"], local["tokens"], strict=True)):
        if ours != theirs:
            best = sorted(local["tops"][position].values(), reverse=True)
            gap = best[0] - best[1]
            return f"close call at {position} ({gap:.3f})" if gap < CLOSE_CALL else f"MISMATCH at {position}"
    return "same"


def show(outcomes: list[Outcome], half_bytes_per_token: int) -> None:
    """The table."""
    table = Table(title="What happened to each request")
    for column in ("#", "prompt tokens", "prefilled on", "why", "codec"):
        table.add_column(column)
    for column in ("wire KiB", "of raw", "of 16-bit", "TTFT s"):
        table.add_column(column, justify="right")
    table.add_column("text against local")
    for number, o in enumerate(outcomes, 1):
        sizes, codecs = ["–"] * 3, "–"
        if o.transfer is not None and o.transfer.get("wire_bytes"):
            wire, raw = o.transfer["wire_bytes"], o.transfer["raw_bytes"]
            tokens = o.transfer["end_token"] - o.transfer["first_token"]
            codecs = "+".join(o.transfer["codecs"])
            sizes = [f"{wire / 1024:.0f}", f"{wire / raw:.2f}", f"{wire / (tokens * half_bytes_per_token):.2f}"]
        where = (str(number), str(o.prompt_tokens), o.where, o.why, codecs)
        table.add_row(*where, *sizes, f"{o.ttft_s:.2f}", o.verdict)
    Console(width=140).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a model folder; default SmolLM2-135M-Instruct")
    options = parser.parse_args()
    model = options.model or str(smollm2())
    config = json.loads((Path(model) / "config.json").read_text())
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    half_bytes = config["num_hidden_layers"] * 2 * config["num_key_value_heads"] * head_dim * 2
    with tempfile.TemporaryDirectory(prefix="disagg-demo-") as folder, ExitStack() as stack:
        demo = Demo(model, Path(folder))
        demo.start(stack, "prefill", 0)
        demo.start(stack, "decode", 1)
        demo.wait_for_peer()
        outcomes = [demo.run_one(prompt, f"demo-{i}") for i, prompt in enumerate(make_prompts())]
        for prompt, outcome in zip(make_prompts(), outcomes, strict=True):
            # the reference: the prefill engine asked directly is an ordinary engine; its own salt shares no cache
            *_, local, _ = demo.ask("prefill", prompt, "local")
            outcome.verdict = compare(outcome.logprobs, local)
        totals = demo.snapshot()["decode"]
    show(outcomes, half_bytes)
    offloaded = [o for o in outcomes if o.where == "prefill"]
    wire = sum(o.transfer["wire_bytes"] for o in offloaded if o.transfer)
    raw = sum(o.transfer["raw_bytes"] for o in offloaded if o.transfer)
    summary = {
        "requests": len(outcomes),
        "offloaded": len(offloaded),
        "local": len(outcomes) - len(offloaded),
        "fallbacks": sum(totals["fallbacks"].values()),
        "mismatches": sum(o.verdict.startswith("MISMATCH") for o in outcomes),
        "wire_bytes": wire,
        "raw_bytes": raw,
        "wire_ratio": round(wire / raw, 4) if raw else None,
    }
    print(json.dumps(summary))
    return 1 if summary["mismatches"] or not offloaded else 0


if __name__ == "__main__":
    sys.exit(main())
