"""How commands end on a mistake."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from disagg_plugin.errors import ConfigError


@contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """Turn a ``ConfigError`` of the body into one line on stderr and exit code 2."""
    try:
        yield
    except ConfigError as error:
        typer.echo(f"disagg: {error}", err=True)
        raise typer.Exit(2) from None
