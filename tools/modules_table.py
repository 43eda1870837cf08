"""Write the table of modules at the end of ARCHITECTURE.md from the first paragraph of each module's docstring.

python tools/modules_table.py
"""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (
    "connectors/disagg_sglang",
    "connectors/disagg_vllm",
    "connectors/disagg_lmcache",
    "disagg_plugin",
    "disagg_plugin/admission",
    "disagg_plugin/control",
    "disagg_plugin/kv",
    "disagg_plugin/serving",
    "disagg_plugin/observability",
    "disagg_plugin/cli",
    "policies/disagg_policies",
)
HEADING = "## Modules"


def main() -> None:
    """Replace the table; modules are in the order of the folders above."""
    rows = [f"{HEADING}\n", "| module | what it holds |", "|---|---|"]
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).glob("*.py")):
            if path.name != "__init__.py":
                name = str(path.relative_to(ROOT)).removeprefix("connectors/").removeprefix("policies/")
                text = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0]
                rows.append(f"| `{name}` | {' '.join(text.split())} |")
    target = ROOT / "ARCHITECTURE.md"
    before = target.read_text().partition(HEADING)[0]
    target.write_text(before + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
