"""The tests that failed first and passed then, in all pytest sessions of one run. Exit status 1: too many.

    python tools/flaky.py --clear    before the run
    python tools/flaky.py            after it

Their records lie in ``.flaky``, or where ``DISAGG_FLAKY_DIR`` says.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from second_try import FLAKY_AT_MOST, FLAKY_LIST, flaky_dir, too_many  # noqa: E402  found by the line before


def clear(folder: Path) -> None:
    """Only what second_try has put there: the folder's name comes from outside."""
    for record in folder.glob("*/first.txt"):
        shutil.rmtree(record.parent)
    (folder / FLAKY_LIST).unlink(missing_ok=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clear", action="store_true", help="delete all records")
    folder = flaky_dir(ROOT)
    if parser.parse_args().clear:
        clear(folder)
        return 0
    flaky_list = folder / FLAKY_LIST
    tests = [json.loads(line) for line in flaky_list.read_text().splitlines()] if flaky_list.exists() else []
    if not tests:
        print("no flaky tests")
        return 0
    print("FLAKY")
    for test in tests:
        print(f"  {test['test']}: {test['error']}\n    {test['record']}")
    if len(tests) <= FLAKY_AT_MOST:
        return 0
    print(too_many(len(tests)))
    return 1


if __name__ == "__main__":
    sys.exit(main())
