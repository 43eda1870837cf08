"""Take CPU time away from every core in irregular turns, as neighbours on a shared machine do. Linux, as root.

    python tools/steal_cpu.py --share 0.35 -- make test

A test that waits for events passes under it, only later; one that believes in the machine's speed does not. SCHED_FIFO,
because a busy process of normal priority only makes the scheduler share more finely, and what breaks tests is a whole
tenth of a second in which nobody runs on a core.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing import Process

TURN_S = (0.02, 0.6)  # taken and given back, together


def steal(core: int, share: float) -> None:
    """Until terminated."""
    os.sched_setaffinity(0, {core})
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
    while True:
        turn_s = random.uniform(*TURN_S)
        until_s = time.monotonic() + share * turn_s
        while time.monotonic() < until_s:
            pass
        time.sleep((1 - share) * turn_s)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.35, help="of each core's time, 0 to 0.9 (default 0.35)")
    parser.add_argument("command", nargs="+", help="what to run meanwhile, after --")
    asked = parser.parse_args()
    if not 0 < asked.share <= 0.9:
        parser.error(f"--share {asked.share} is not above 0 and at most 0.9: the machine would not answer any more")
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    except PermissionError:
        parser.error("no CPU time can be taken: SCHED_FIFO needs root")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command
    thieves = [
        Process(target=steal, args=(core, asked.share), daemon=True, name=f"steal-{core}")
        for core in sorted(os.sched_getaffinity(0))
    ]
    for thief in thieves:
        thief.start()
    try:
        heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 - what is ignored is inherited
        return subprocess.run(asked.command, check=False, preexec_fn=heard).returncode
    finally:
        for thief in thieves:
            thief.terminate()


if __name__ == "__main__":
    sys.exit(main())
