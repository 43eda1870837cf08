"""``disagg status``: how an engine does, live: classes, queues, decisions, peers, transfers, fallbacks, cache hits."""

import asyncio
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from disagg_plugin.cli._exit import mistakes_in_one_line
from disagg_plugin.errors import ConfigError, DisaggError

if TYPE_CHECKING:
    from rich.console import RenderableType

View = Mapping[str, Any]


def status(
    url: Annotated[str, typer.Argument(metavar="URL", help="The engine's HTTP address, e.g. http://127.0.0.1:8000.")],
    once: Annotated[bool, typer.Option("--once", help="Print once and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print once, as JSON.")] = False,
    interval_s: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 2.0,
    side_channel: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Ask the side channel too: why a peer is not healthy.")
    ] = None,
    keys: Annotated[Path | None, typer.Option(help="Folder made by `disagg keygen`.")] = None,
) -> None:
    """Show how a running engine does, from its /metrics."""
    with mistakes_in_one_line():
        source = Source(url, side_channel, keys)
    if as_json:
        typer.echo(json.dumps(_first(source), indent=2))
        return
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 180)
    view = _first(source)
    if once:
        console.print(render(view))
        return
    _live(source, view, console, interval_s)


class Source:
    """Where the figures come from."""

    def __init__(self, url: str, side_channel: str | None, keys: Path | None) -> None:
        """
        Raises:
            ConfigError: An address is not one.
        """
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"{url!r} is no HTTP address: say http://HOST:PORT")
        self.url = url.rstrip("/").removesuffix("/metrics")
        self._keys = keys
        self._address: tuple[str, int] | None = None
        if side_channel is not None:
            host, _, port = side_channel.rpartition(":")
            if not port.isdigit():
                raise ConfigError(f"{side_channel!r} is not host:port")
            self._address = (host or "127.0.0.1", int(port))

    def view(self) -> View:
        """One look.

        Raises:
            ConfigError: The engine does not answer, or has nothing of the plugin.
        """
        from disagg_plugin.observability.status import Scrape, status_of, with_snapshot

        try:
            with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
                scrape = Scrape(answer.read().decode())
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            raise ConfigError(f"{self.url}/metrics: {getattr(error, 'reason', error)}") from None
        except ValueError as error:
            raise ConfigError(f"{self.url}/metrics: not Prometheus' text format: {error}") from None
        if not scrape.known:
            raise ConfigError(f"{self.url}/metrics has no disagg_ metrics: does this engine run with the plugin?")
        view = {"url": self.url, **status_of(scrape, now_s=time.time())}
        return view if self._address is None else with_snapshot(view, self._snapshot(self._address))

    def _snapshot(self, address: tuple[str, int]) -> View:
        """The debug view; an unreachable side channel only leaves its part out."""
        from disagg_plugin.control.keys import KeyRing
        from disagg_plugin.control.service import fetch_snapshot

        try:
            ring = KeyRing.load(self._keys) if self._keys else None
            return asyncio.run(fetch_snapshot(*address, ring, timeout_s=3.0))
        except (TimeoutError, DisaggError) as error:
            return {"engine": f"side channel: {error or 'no answer'}"}


def _first(source: Source) -> View:
    with mistakes_in_one_line():
        return source.view()


def _live(source: Source, view: View, console: "Any", interval_s: float) -> None:
    from rich.live import Live
    from rich.text import Text

    try:
        with Live(render(view), console=console, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(interval_s)
                try:
                    before, view = view, source.view()
                    live.update(render(view, before), refresh=True)
                except ConfigError as error:  # it may come back
                    live.update(Text(f"disagg: {error}", style="red"), refresh=True)
    except KeyboardInterrupt:
        pass


def render(view: View, before: View | None = None) -> "RenderableType":
    """The view as tables; counters that moved since ``before`` carry their increment."""
    from rich.columns import Columns
    from rich.console import Group

    earlier = before or {}
    transfers, past = view["transfers"], earlier.get("transfers", {})
    return Group(
        _headline(view),
        _classes(view["classes"]),
        Columns(
            [
                _pairs("decisions", view["decisions"], earlier.get("decisions")),
                _pairs("fallbacks", view["fallbacks"], earlier.get("fallbacks")),
                _pairs("policy errors", view["policy_errors"], earlier.get("policy_errors")),
                _pairs("transfers", transfers["events"], past.get("events")),
                _pairs("bytes on the wire", transfers["wire_bytes"], past.get("wire_bytes"), form=_bytes),
                _pairs("troubles", transfers["troubles"], past.get("troubles")),
                _pairs("admission", _admission(view), _admission(earlier) if earlier else None),
            ]
        ),
        _peers(view["peers"], view["peer_states"]),
    )


def _headline(view: View) -> "RenderableType":
    from rich.text import Text

    if view["draining"]:
        text = Text("draining: takes no more prompts for others", style="bold yellow")
    elif view["active"]:
        text = Text("active", style="bold green")
    elif view["active"] is None:
        text = Text("no figures yet: the engine has not run a step", style="yellow")
    else:
        text = Text(f"NOT ACTIVE: {'; '.join(view['inactive_reasons']) or 'no reason given'}", style="bold red")
    queues, hits = view["queues"], view["cache_hits"]
    facts = [view["url"]]
    facts += [f"{name} {queues[name]}" for name in ("running", "waiting") if name in queues]
    if "kv_cache_usage" in queues:
        facts.append(f"KV cache {queues['kv_cache_usage']:.0%}")
    facts += [f"hits {what} {share:.0%}" for what, share in hits.items()]
    if tokens := view["prefix_tokens"]:
        facts.append("prefix tokens " + ", ".join(f"{tier} {n:,}" for tier, n in tokens.items()))
    if view["stats_age_s"] is not None:
        facts.append(f"figures {view['stats_age_s']:.0f} s old")
    return text.append(f"   {' · '.join(facts)}", style="default not bold")


def _classes(classes: View) -> "RenderableType":
    from rich.table import Table

    columns = ("class", "SLO ttft/tpot", "attained 5m", "1h", "with refused 5m", "burn 5m", "1h")
    table = Table(*columns, "met/missed/refused", "path", "TTFT p50/p99", "TPOT p50/p99", title="classes")
    for name, figures in classes.items():
        targets, outcomes = figures["targets_s"], figures["outcomes"]
        row = [
            name,
            f"{_seconds(targets.get('ttft'))}/{_seconds(targets.get('tpot'))}",
            _share(figures["attainment"].get("5m")),
            _share(figures["attainment"].get("1h")),
            _share(figures["attainment_with_refused"].get("5m")),
            _number(figures["burn_rate"].get("5m")),
            _number(figures["burn_rate"].get("1h")),
            "/".join(str(outcomes.get(outcome, 0)) for outcome in ("met", "missed", "refused")),
        ]
        paths = figures["quantiles_s"] or {"": {}}
        for path, whats in paths.items():
            times = [
                f"{_seconds(whats.get(what, {}).get('0.5'))}/{_seconds(whats.get(what, {}).get('0.99'))}"
                for what in ("ttft", "tpot")
            ]
            table.add_row(*row, path, *times)
            row = [""] * len(row)
    return table


def _pairs(title: str, values: View, before: View | None, *, form: "Any" = str) -> "RenderableType":
    from rich.markup import escape
    from rich.table import Table

    table = Table(title, "", show_edge=False)
    for name, value in sorted(values.items(), key=lambda item: str(item[0])):
        moved = value - before.get(name, 0) if before is not None else 0
        table.add_row(escape(name), form(value) + (f" [green]+{form(moved)}[/]" if moved else ""))
    if not values:
        table.add_row("none", "")
    return table


def _peers(peers: list[View], states: View) -> "RenderableType":
    from rich.markup import escape
    from rich.table import Table

    counts = "; ".join(f"{role} {', '.join(f'{n} {s}' for s, n in by.items())}" for role, by in states.items() if by)
    table = Table("peer", "up", "queued", "problem", title=f"peers: {counts}" if counts else "peers", min_width=60)
    for peer in peers:
        up = "[green]yes[/]" if peer["up"] else "[red]no[/]"
        table.add_row(escape(peer["peer"]), up, str(peer["queued"]), escape(peer.get("problem", "")))
    return table


def _admission(view: View) -> dict[str, int]:
    return {
        " ".join(filter(None, (row["slo_class"], row["outcome"], row["reason"]))): row["requests"]
        for row in view["admission"]
    }


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.2f} s"
