"""``disagg decisions`` and ``disagg replay-decision``: why did this prompt go there?"""

import asyncio
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from disagg_plugin.cli._exit import mistakes_in_one_line
from disagg_plugin.errors import ConfigError, DisaggError

COLUMNS = ("time", "request", "prompt", "held", "decision", "reason", "local ms", "remote ms", "decided by", "took µs")


def decisions(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="The decode engine's side channel.")],
    last: Annotated[int, typer.Option(min=1, help="So many, the most recent ones.")] = 50,
    keys: Annotated[Path | None, typer.Option(help="Folder made by `disagg keygen`.")] = None,
    timeout_s: Annotated[float, typer.Option(help="Wait this long for an answer.")] = 5.0,
) -> None:
    """Print the latest decisions of a running decode engine, each with its reason and estimates."""
    from disagg_plugin.control.keys import KeyRing
    from disagg_plugin.control.service import fetch_snapshot

    host, _, port = address.rpartition(":")
    with mistakes_in_one_line():
        if not port.isdigit():
            raise ConfigError(f"{address!r} is not host:port")
        try:
            ring = KeyRing.load(keys) if keys else None
            view = asyncio.run(fetch_snapshot(host or "127.0.0.1", int(port), ring, timeout_s=timeout_s))
        except TimeoutError:
            typer.echo(
                f"disagg: no answer from {address} within {timeout_s} s: is it running, are the keys right?", err=True
            )
            raise typer.Exit(1) from None
        except DisaggError as error:
            raise ConfigError(str(error)) from None
    print_decisions(view, last=last)


def print_decisions(view: Mapping[str, object], *, last: int) -> None:
    """The table of a debug snapshot's ``decode.decision_log``, and which policies have failed."""
    decode = view.get("decode")
    rows = decode.get("decision_log") if isinstance(decode, Mapping) else None
    if not isinstance(rows, Sequence):
        typer.echo("disagg: this engine makes no decisions: its role is not decode or both", err=True)
        raise typer.Exit(1)
    if not rows:
        typer.echo("no decisions yet")
        return
    table = Table(*COLUMNS)
    for row in rows[-last:]:
        table.add_row(*_cells(row))
    Console(width=max(160, Console().width)).print(table)
    for row in rows[-last:]:
        for problem in row.get("problems", ()):
            typer.echo(f"{row['request_id']}: policy {problem}", err=True)


def replay_decision(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE|-]", help="A logged decision; the first one in it. -: stdin.")
    ] = None,
) -> None:
    """Make a logged decision again, and say whether it comes out the same (exit code 1: it does not)."""
    from disagg_plugin.serving.decision_record import replay

    with mistakes_in_one_line():
        replayed = replay(_first_record(file))
    record = replayed.record
    typer.echo(f"recorded  placement {record.placed_by:14} {record.snapshot.placement}")
    typer.echo(f"replayed  placement {record.placed_by:14} {replayed.placement}")
    typer.echo(f"recorded  offload   {record.decided_by:14} {record.decision}")
    typer.echo(f"replayed  offload   {record.decided_by:14} {replayed.decision}")
    typer.echo("equal" if replayed.equal else "not equal")
    if not replayed.equal:
        raise typer.Exit(1)


def _first_record(file: Path | None) -> str:
    try:
        text = sys.stdin.read() if file is None or str(file) == "-" else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None
    for line in text.splitlines():
        if '{"decision":' in line:
            return line[line.index('{"decision":') :]
    raise ConfigError(f"{file or 'stdin'}: holds no logged decision")


def _cells(row: Mapping[str, object]) -> tuple[str, ...]:
    at_s, workers = row.get("at_s"), row.get("workers")
    clock = time.strftime("%H:%M:%S", time.localtime(at_s)) if isinstance(at_s, int | float) else ""
    target = " ".join(str(worker) for worker in workers[:1]) if isinstance(workers, list) else ""
    by = row.get("decided_by")
    decided_by = f"{by}, {row.get('placed_by')}" if row.get("action") == "offload" else f"{by}"
    return (
        clock,
        str(row.get("request_id"))[:40],
        f"{row.get('prompt_tokens')}",
        f"{row.get('held_tokens')}",
        target or str(row.get("action")),
        str(row.get("reason")),
        _milliseconds(row.get("local_ttft_s")),
        _milliseconds(row.get("remote_ttft_s")),
        decided_by,
        f"{row.get('took_us')}",
    )


def _milliseconds(seconds: object) -> str:
    return f"{seconds * 1e3:.1f}" if isinstance(seconds, int | float) else "-"
