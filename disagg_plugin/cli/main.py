"""The command ``disagg``. Importing it loads neither torch nor nixl nor an engine; commands load what they need.

A user's mistake is one line on stderr and exit code 2, never a traceback.
"""

import typer

from disagg_plugin.cli import config, decisions, doctor, keygen, policies, snapshot, status

app = typer.Typer(
    name="disagg",
    help="Disaggregated prefill and decode: settings, keys, and what a running engine does.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(doctor.doctor)
app.command()(keygen.keygen)
app.command()(snapshot.snapshot)
app.command()(status.status)
app.command()(policies.policies)
app.command()(decisions.decisions)
app.command()(decisions.replay_decision)
app.add_typer(config.app, name="config")

if __name__ == "__main__":
    app()
