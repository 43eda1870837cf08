"""Which share of a real trace would be offloaded? The threshold policy alone, with an ideal prefix cache.

    .venv/bin/python benchmarks/replay_offload.py /path/to/conversation_trace.jsonl --json

One line of the trace is ``{"input_length": tokens, "hash_ids": [one per 512-token block, equal ids = equal prefix]}``
(Mooncake's format). The cache is infinite and belongs to one decode engine: of each prompt, the leading blocks that
any earlier prompt had are cached. One prefill worker takes everything, so the length rule alone decides.

``offloaded`` is the share of all requests, ``of long`` that of the requests whose whole prompt exceeds the threshold:
what it lacks to 1 is the work of the cache.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from disagg_policies.offload import threshold
from disagg_policies.snapshots import Offload, Placement, Prompt, WorkerState

BLOCK_TOKENS = 512
THRESHOLDS = (256, 512, 1000, 2048)
WORKER = WorkerState("p", healthy=True, queued_requests=0, max_prompt_tokens=1 << 31)
PLACEMENT = Placement(("p",), "ideal")


@dataclass(frozen=True, slots=True)
class Replayed:
    """What one threshold made of a trace."""

    requests: int
    long: int
    reasons: Counter[str]

    @property
    def offloaded(self) -> float:
        """Share of all requests."""
        return self.reasons["over_threshold"] / self.requests

    @property
    def offloaded_of_long(self) -> float:
        """Share of the requests that are longer than the threshold."""
        return self.reasons["over_threshold"] / self.long if self.long else 0.0


def prompts(lines: Iterable[str]) -> Iterator[Prompt]:
    """The trace's requests in order, with what an infinite cache holds of each."""
    seen: set[int] = set()
    for number, line in enumerate(lines):
        request = json.loads(line)
        tokens, blocks = request["input_length"], request["hash_ids"]
        cached = 0
        for block in blocks:
            if block not in seen:
                break
            cached += BLOCK_TOKENS
        seen.update(blocks)
        yield Prompt(str(number), tokens, min(cached, tokens))


def replay(trace: Sequence[Prompt], prompt_length_threshold: int) -> Replayed:
    """Decide every request."""
    reasons: Counter[str] = Counter()
    for prompt in trace:
        decision = threshold(
            prompt,
            (WORKER,),
            prompt_length_threshold=prompt_length_threshold,
            prefill_queue_max=1,
            placement=PLACEMENT,
        )
        assert isinstance(decision, Offload) == (decision.reason == "over_threshold")
        reasons[decision.reason] += 1
    return Replayed(len(trace), sum(p.prompt_tokens > prompt_length_threshold for p in trace), reasons)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, metavar="PATH", help="JSON lines with input_length and hash_ids")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object, last")
    parser.add_argument("--thresholds", type=int, nargs="+", default=THRESHOLDS, help="tokens")
    args = parser.parse_args()

    with args.trace.open(encoding="utf-8") as lines:
        trace = list(prompts(lines))
    total, cached = sum(p.prompt_tokens for p in trace), sum(p.cached_tokens for p in trace)
    results = {limit: replay(trace, limit) for limit in args.thresholds}

    print(f"{len(trace):,} requests, {total:,} prompt tokens, {cached / total:.1%} of them cached by an ideal cache")
    print(f"{'threshold':>10}{'offloaded':>12}{'of long':>10}{'short':>10}{'cached':>10}")
    for limit, result in results.items():
        short, enough = (result.reasons[word] / result.requests for word in ("short_prompt", "cached_enough"))
        print(f"{limit:>10,}{result.offloaded:>12.1%}{result.offloaded_of_long:>10.1%}{short:>10.1%}{enough:>10.1%}")
    if args.json:
        shares = {
            str(limit): {"offloaded": r.offloaded, "offloaded_of_long": r.offloaded_of_long, "reasons": dict(r.reasons)}
            for limit, r in results.items()
        }
        print(json.dumps({"requests": len(trace), "cached_share": cached / total, "by_threshold": shares}))


if __name__ == "__main__":
    main()
