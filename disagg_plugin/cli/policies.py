"""``disagg policies``: what could decide, and what does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from disagg_plugin.cli._exit import mistakes_in_one_line
from disagg_plugin.errors import ConfigError
from disagg_plugin.plugins import HOOKS, PolicySettings, choose, installed_policies, load_plugins
from disagg_plugin.settings_file import read_mapping


def policies(
    config: Annotated[Path | None, typer.Option(help="Settings, YAML or JSON; without it, the defaults.")] = None,
) -> None:
    """List the policies that are installed, and which of them are asked, in which order."""
    with mistakes_in_one_line():
        settings = _policy_settings(config) if config else PolicySettings()
        chosen = choose(load_plugins(settings), settings)
    table = Table(title="policies", title_justify="left")
    for heading in ("policy", "hook", "from", "asked"):
        table.add_column(heading, overflow="fold")
    broken = []
    for installed in installed_policies(module=settings.module):
        if installed.problem:
            broken.append(installed)
        for kind in installed.kinds:
            names = [policy.name for policy in chosen.of(kind)]
            place = names.index(installed.name) + 1 if installed.name in names else None
            asked = "" if place is None else "alone" if len(names) == 1 else f"{place} of {len(names)}"
            table.add_row(installed.name, HOOKS[kind], installed.source, asked)
    Console(width=max(100, Console().width)).print(table)
    for installed in broken:
        typer.echo(f"warning: {installed.source}: {installed.problem}", err=True)


def _policy_settings(path: Path) -> PolicySettings:
    """The ``policy`` section, and nothing else: the rest of the file may be meant for another version or machine."""
    section = read_mapping(path).get("policy") or {}
    if not isinstance(section, Mapping):
        raise ConfigError(f"{path}: policy must hold fields and values")
    try:
        return PolicySettings.model_validate(section)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in ("policy", *first["loc"]))
        known = ", ".join(PolicySettings.model_fields)
        raise ConfigError(f"{path}: {where} = {first['input']!r}: {first['msg']}; fields: {known}") from None
