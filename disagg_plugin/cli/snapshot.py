"""``disagg snapshot``: what a running engine's plugin knows."""

import asyncio
import json
from pathlib import Path
from typing import Annotated

import typer

from disagg_plugin.errors import DisaggError


def snapshot(
    address: Annotated[str, typer.Argument(help="host:port of the engine's side channel, or just the port.")],
    keys: Annotated[Path | None, typer.Option(help="Folder made by `disagg keygen`.")] = None,
    timeout_s: Annotated[float, typer.Option(help="Wait this long for an answer.")] = 5.0,
) -> None:
    """Print the debug view of a running engine as JSON."""
    from disagg_plugin.control.keys import KeyRing
    from disagg_plugin.control.service import fetch_snapshot

    host, _, port = address.rpartition(":")
    if not port.isdigit():
        typer.echo(f"disagg: {address!r} is not host:port", err=True)
        raise typer.Exit(2)
    try:
        ring = KeyRing.load(keys) if keys else None
        view = asyncio.run(fetch_snapshot(host or "127.0.0.1", int(port), ring, timeout_s=timeout_s))
    except TimeoutError:
        typer.echo(
            f"disagg: no answer from {address} within {timeout_s} s: is it running, and are the keys right?", err=True
        )
        raise typer.Exit(1) from None
    except DisaggError as error:
        typer.echo(f"disagg: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(json.dumps(view, indent=2))
