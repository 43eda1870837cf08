"""Fuzz everything that peers and clients can send, for as long as is given; CI runs a fixed selection of the same.

    .venv/bin/python benchmarks/fuzzing.py --json [--seconds 600] [--target decode_role]

Prints one JSON object: values tried per target, failures (the smallest value that fails each), growth of memory.
"""

import argparse
import json
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import psutil
from fuzz.targets import TARGETS, quiet
from hypothesis import HealthCheck, given, seed, settings

BATCH = 200
WARM_UP_BATCHES = 3  # imports, caches and pools are filled; what grows after that is a leak


def fuzz(name: str, seconds: float) -> dict[str, Any]:
    """One target, batch after batch, each with another seed."""
    strategy, check = TARGETS[name]
    tried = batches = 0
    failure, process, start_bytes = "", psutil.Process(), 0
    ends_s = time.monotonic() + seconds
    while time.monotonic() < ends_s and not failure:

        @seed(batches)
        @settings(max_examples=BATCH, database=None, deadline=None, suppress_health_check=list(HealthCheck))
        @given(strategy)
        def batch(value: object) -> None:
            nonlocal tried
            tried += 1
            check(value)

        # what a batch raises is what we look for, whatever it is: a future keeps it, and the next target has its turn
        with ThreadPoolExecutor(1) as pool:
            failure = "".join(traceback.format_exception(found)) if (found := pool.submit(batch).exception()) else ""
        batches += 1
        if batches == WARM_UP_BATCHES:
            start_bytes = process.memory_info().rss
    grown = process.memory_info().rss - start_bytes if batches > WARM_UP_BATCHES else 0
    return {"values": tried, "grown_mib": round(grown / 2**20, 1), "failure": failure}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the last line alone")
    parser.add_argument("--seconds", type=float, default=600.0, help="all targets together")
    parser.add_argument("--target", choices=sorted(TARGETS), help="only this one")
    arguments = parser.parse_args()
    quiet()
    names = [arguments.target] if arguments.target else list(TARGETS)
    found = {}
    for name in names:
        found[name] = fuzz(name, arguments.seconds / len(names))
        if not arguments.json or found[name]["failure"]:
            print(f"{name}: {found[name]['values']} values, {found[name]['grown_mib']} MiB more", file=sys.stderr)
            print(found[name]["failure"], file=sys.stderr)
    print(json.dumps(found))
    sys.exit(any(target["failure"] for target in found.values()))


if __name__ == "__main__":
    main()
