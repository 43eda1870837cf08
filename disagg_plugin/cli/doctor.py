"""``disagg doctor``: what a user needs to know before starting an engine."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from disagg_plugin.cli._exit import mistakes_in_one_line
from disagg_plugin.config import DisaggSettings, load_settings

COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def doctor(
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="Settings, YAML or JSON.")] = None,
    role: Annotated[str | None, typer.Option(help="As --disagg-role: overrides the file.")] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel size of this engine.")] = 1,
    engine: Annotated[
        str | None, typer.Option(help="host:port of a running engine's side channel: peers are compared with it.")
    ] = None,
    timeout_s: Annotated[float, typer.Option(help="Wait this long for each peer.")] = 3.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Check versions, NIXL, devices, ports, keys, memory and peers. Exit code 1 if anything will not work."""
    with mistakes_in_one_line():
        overrides = {"role": role} if role else None
        settings = load_settings(file if file is not None else {}, overrides)
        if engine is not None and not engine.rpartition(":")[2].isdigit():
            typer.echo(f"disagg: {engine!r} is not host:port", err=True)
            raise typer.Exit(2)
        _show(settings, tp, engine, timeout_s, as_json=as_json)


def _show(settings: DisaggSettings, tp: int, engine: str | None, timeout_s: float, *, as_json: bool) -> None:
    from disagg_plugin.doctor import Verdict, examine, interpreter, worst

    findings = examine(settings, tensor_parallel=tp, engine=engine, timeout_s=timeout_s)
    verdict = worst(findings)
    if as_json:
        typer.echo(json.dumps({"verdict": verdict, "findings": [asdict(finding) for finding in findings]}))
    else:
        table = Table(title=f"disagg doctor ({settings.role}, {interpreter()})", title_justify="left")
        for heading in ("check", "", "what", "to do"):
            table.add_column(heading, overflow="fold")
        for finding in findings:
            colour = COLOURS[finding.verdict]
            table.add_row(finding.check, f"[{colour}]{finding.verdict}[/]", finding.what, finding.advice)
        Console(width=max(120, Console().width)).print(table)
    if verdict is Verdict.FAIL:
        raise typer.Exit(1)
