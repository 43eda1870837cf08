"""``disagg config``: what a settings file means, before an engine is started with it."""

import json
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.console import Console
from rich.table import Table

from disagg_plugin import config as settings_module
from disagg_plugin.cli._exit import mistakes_in_one_line
from disagg_plugin.cli._model import MemoryPlan, geometry_of, plan_memory
from disagg_plugin.config import DisaggSettings, load_settings, not_active_yet, settings_json_schema
from disagg_plugin.errors import ConfigError
from disagg_plugin.kv.geometry import KVGeometry
from disagg_plugin.settings_file import read_mapping

app = typer.Typer(help="Check a settings file, or print its schema.", no_args_is_help=True)


@app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Settings, YAML or JSON.")],
    role: Annotated[str | None, typer.Option(help="As --disagg-role: overrides the file.")] = None,
    model_config: Annotated[
        Path | None, typer.Option(help="The model's config.json, or its folder: print the ring's size for it.")
    ] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel size of this engine.")] = 1,
    kv_dtype: Annotated[str, typer.Option(help="As --kv-cache-dtype; auto: the model's.")] = "auto",
) -> None:
    """Print the effective settings, warnings, and the size of the landing ring for a model."""
    with mistakes_in_one_line():
        settings = load_settings(file, {"role": role} if role else None)
        geometry = plan = None
        if model_config is not None:
            path = model_config / "config.json" if model_config.is_dir() else model_config
            geometry = geometry_of(read_mapping(path), kv_dtype, origin=str(path))
            plan = plan_memory(settings, geometry, tp)
    typer.echo(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False).rstrip())
    for line in [*settings_module.warnings(settings), *_problems_of_this_machine(settings)]:
        typer.echo(f"warning: {line}", err=True)
    for line in not_active_yet(settings):
        typer.echo(line, err=True)
    if geometry is not None and plan is not None:
        _print_plan(settings, geometry, plan, tp)


@app.command()
def schema() -> None:
    """Print the JSON schema of the settings file."""
    typer.echo(json.dumps(settings_json_schema(), indent=2))


def _problems_of_this_machine(settings: DisaggSettings) -> list[str]:
    """The file may be meant for another machine: what is missing on this one is only a warning."""
    from disagg_plugin.control.keys import KeyRing

    if settings.side_channel.keys_dir is None:
        return []
    try:
        KeyRing.load(Path(settings.side_channel.keys_dir))
    except ConfigError as error:
        return [f"on this machine: {error}"]
    return []


def _print_plan(settings: DisaggSettings, geometry: KVGeometry, plan: MemoryPlan, tp: int) -> None:
    sides = "1 latent vector" if geometry.sides == 1 else "K and V"
    table = Table(title=f"landing ring, each of {tp} rank(s)", title_justify="left", show_header=False)
    table.add_row(
        "KV on a rank",
        f"{geometry.layers} layers, {sides}, {plan.heads} heads of {geometry.head_dim}, {geometry.dtype}",
    )
    table.add_row("bytes per token, raw", f"{plan.raw_token_bytes:,}")
    int8 = "raw: only 16- and 32-bit caches are quantized"
    if plan.int8_token_bytes is not None:
        int8 = f"{plan.int8_token_bytes:,} ({plan.raw_token_bytes / plan.int8_token_bytes:.2f}x smaller)"
    table.add_row("bytes per token, int8", int8)
    table.add_row("tokens per slot, raw", f"{plan.raw_slot_tokens:,}")
    if plan.int8_slot_tokens is not None:
        table.add_row("tokens per slot, int8", f"{plan.int8_slot_tokens:,}")
    transfer = settings.transfer
    region = transfer.slot_bytes * transfer.region_slots
    table.add_row("a peer's region", f"{transfer.region_slots} slots of {transfer.slot_bytes:,} = {region:,} bytes")
    table.add_row("the whole ring", f"{plan.ring_bytes:,} bytes, room for {plan.regions} peers' regions")
    Console(width=max(100, Console().width)).print(table)
