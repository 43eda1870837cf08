"""Write the tables of docs/metrics.md from the definitions.

python tools/metrics_table.py
"""

from pathlib import Path

from disagg_plugin.observability.metrics import METRICS, Metric, Scope

TARGET = Path(__file__).resolve().parents[1] / "docs/metrics.md"
BEGIN, END = "<!-- made by tools/metrics_table.py: begin -->", "<!-- end -->"
HEADINGS: dict[Scope, str] = {
    "engine": "### Of the scheduler process (labels `model_name`, `engine`)",
    "frontend": "### Of the API server (label `model_name`)",
}


def tables() -> str:
    """One table per scope, in the order of the definitions."""
    parts = []
    for scope, heading in HEADINGS.items():
        rows = [_row(metric) for metric in METRICS.values() if metric.scope == scope]
        parts.append("\n".join([heading, "", "| metric | kind | labels | meaning |", "|---|---|---|---|", *rows]))
    return "\n\n".join(parts)


def _row(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help} |"


def main() -> None:
    """Replace what stands between the two markers."""
    before, _, rest = TARGET.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    TARGET.write_text(f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}")


if __name__ == "__main__":
    main()
