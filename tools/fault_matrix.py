"""Write docs/fault-matrix.md from the table that the tests run, tests/faults/matrix.py; --check only compares."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "fault-matrix.md"
sys.path.insert(0, str(ROOT / "tests"))

from faults.matrix import FAULTS, MOMENTS, OUTCOMES, CannotOccur, Cell, Fault  # noqa: E402

INTRODUCTION = """# What happens when

Made by `python tools/fault_matrix.py` from `tests/faults/matrix.py`, the table that `tests/faults/test_matrix.py` runs:
two or three processes with real NIXL, side channel and HTTP between them, every link through a TCP relay, and KV whose
every byte follows from the prompt. D is the decode engine, P a prefill engine.

- **queued**: P has the prompt and has not begun; D holds nothing.
- **streaming**: about half of the KV stands in D's cache.
- **landed**: all of it has landed, D decodes.

In every cell the test asserts: every byte of the request's KV is right; it ends within its deadline; its load is
reported to the engine exactly once; afterwards no block, slot, ticket, call or private buffer is in use on either side;
the counters named below say what happened; one of the next prompts is offloaded again. *italic* cells cannot occur.

"""


def described(cell: Cell | CannotOccur) -> str:
    """One cell of the document."""
    if isinstance(cell, CannotOccur):
        return f"*{cell.why}*"
    parts = [OUTCOMES[cell.outcome]]
    if cell.note:
        parts.append(cell.note)
    shown = [*(f"`{reason}`" for reason in cell.reasons)]
    if shown:
        parts.append("fallback: " + " or ".join(shown))
    if cell.counts:
        parts.append("counted: " + ", ".join(f"`{counter}`" for counter in cell.counts))
    return "; ".join(parts)


def row(fault: Fault) -> str:
    cells = " | ".join(described(fault.at(moment)) for moment in MOMENTS)
    engines = f"`{fault.engines.rpartition('::')[2]}`" if fault.engines else ""
    return f"| {fault.title} | {cells} | {engines} |"


def document() -> str:
    """The whole page."""
    tested = sum(isinstance(fault.at(moment), Cell) for fault in FAULTS for moment in MOMENTS)
    head = f"| what goes wrong | {' | '.join(MOMENTS)} | also on real engines |\n|---|---|---|---|---|\n"
    end = f"\n{len(FAULTS)} faults, {tested} cells with a test each: `pytest tests/faults -k NAME`.\n"
    return INTRODUCTION + head + "\n".join(row(fault) for fault in FAULTS) + "\n" + end


def main() -> int:
    text = document()
    if "--check" in sys.argv:
        return int(not DOCUMENT.is_file() or DOCUMENT.read_text() != text)
    DOCUMENT.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
