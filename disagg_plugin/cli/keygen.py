"""``disagg keygen``: keys of the side channel."""

from pathlib import Path
from typing import Annotated

import typer

from disagg_plugin.cli._exit import mistakes_in_one_line
from disagg_plugin.errors import ConfigError


def keygen(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write to; made if it does not exist.")],
    fleet: Annotated[
        bool, typer.Option("--fleet", help="One folder for all engines, instead of one per node.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace secrets that are there; locks out old peers.")
    ] = False,
    next_server: Annotated[
        bool, typer.Option("--next", help="Begin a rotation: make the server pair that will follow.")
    ] = False,
) -> None:
    """Make the keys with which engines recognise each other."""
    from disagg_plugin.control.keys import generate, generate_next_server

    with mistakes_in_one_line():
        try:
            if next_server:
                generate_next_server(directory, force=force)
            else:
                generate(directory, fleet=fleet, force=force)
        except OSError as error:
            raise ConfigError(f"cannot write keys to {directory}: {error.strerror}") from None
    if next_server:
        typer.echo(f"{directory}/server-next.pub: bring it to all clients, then swap the pairs and restart the servers")
        return
    typer.echo(f"keys written to {directory}: set side_channel.keys_dir to it")
    if fleet:
        typer.echo("bring the whole folder to every engine; *.key are secret")
    else:
        typer.echo("each node has its own folder: bring client.pub to allowed/ of the nodes that this one connects to,")
        typer.echo("and server.pub to servers/HOST.pub of the nodes that connect to this one; *.key never leave it")
