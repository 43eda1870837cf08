"""Prefill on one engine, decode on the other: do they say what the decode engine alone says?

    .venv/bin/python benchmarks/cross_engine.py --json [--prompts 12] [--tokens 24] [--pairs NAME,...] [--codec int8]

SmolLM2-135M in float32, raw KV, three pairs one after another: vLLM → SGLang, SGLang → vLLM, SGLang → SGLang. Each
prompt is answered greedily twice by the decode engine: once offloaded, once prefilled by itself. ``top1_agreement`` is
the share of equal tokens up to the first difference of an answer; ``worst_gap`` is, at those differences, the largest
lead (in logprobs) that the local run's best token had over its second best.
"""

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from either_engine import Kind, agreement, start
from models import smollm2

ROOT = Path(__file__).resolve().parents[1]
PAIRS: dict[str, tuple[Kind, Kind]] = {
    "vllm_to_sglang": ("vllm", "sglang"),
    "sglang_to_vllm": ("sglang", "vllm"),
    "sglang_to_sglang": ("sglang", "sglang"),
}
PROMPT_TOKENS = 300


def prompts_of(count: int) -> list[list[int]]:
    """Pieces of this repository's own prose."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    text = "\n".join((ROOT / name).read_text() for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"))
    ids: list[int] = tokenizer.encode(text)
    stride = (len(ids) - PROMPT_TOKENS) // count
    return [ids[at : at + PROMPT_TOKENS - 7 * number] for number, at in enumerate(range(0, count * stride, stride))]


def measure(name: str, prompts: list[list[int]], tokens: int, codec: str) -> dict[str, object]:
    """One pair, started and ended."""
    prefill_kind, decode_kind = PAIRS[name]
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = Path(scratch)
        model = smollm2()
        prefill = start(
            stack,
            folder,
            f"{name}-prefill",
            prefill_kind,
            model,
            role="prefill",
            max_model_len=1024,
            transfer={"codec": codec, "guard_tokens": 256},
        )
        decode = start(
            stack,
            folder,
            f"{name}-decode",
            decode_kind,
            model,
            role="decode",
            workers=[prefill],
            core=1,
            max_model_len=1024,
            transfer={"codec": codec, "guard_tokens": 256},
        )
        decode.wait_for_workers()
        decode.generate(prompts[0], max_tokens=1)  # wires the NIXL agents up, and the guard measures the model's KV
        before = decode.landed()
        offloaded = [decode.generate(prompt, max_tokens=tokens, ignore_eos=True) for prompt in prompts]
        landed = decode.landed() - before
        local = [decode.generate(prompt, max_tokens=tokens, ignore_eos=True, local=True) for prompt in prompts]
        share, worst_gap = agreement(list(zip(offloaded, local, strict=True)))
        return {
            "requests": len(prompts),
            "offloaded": landed,
            "top1_agreement": round(share, 4),
            "worst_gap": round(worst_gap, 5),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--pairs", default=",".join(PAIRS))
    parser.add_argument("--codec", default="raw", choices=("raw", "int8", "int8c"))
    arguments = parser.parse_args()
    prompts = prompts_of(arguments.prompts)
    results = {}
    for name in arguments.pairs.split(","):
        results[name] = measure(name, prompts, arguments.tokens, arguments.codec)
        print(f"{name}: {results[name]}", flush=True)
    if arguments.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
