"""``--kv-connector``, ``--disagg-role`` and ``--disagg-config``: short forms of ``--kv-transfer-config``.

    vllm serve MODEL --kv-connector disagg --disagg-role decode --disagg-config disagg.yaml

is, to the engine, exactly

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "disagg", "kv_role": "kv_both",
      "kv_load_failure_policy": "recompute",
      "kv_connector_extra_config": {"config_file": "disagg.yaml", "role": "decode"}}'

Both ``kv_role`` and ``kv_load_failure_policy`` get these values by default wherever the connector is disagg, since
vLLM's own defaults would start no worker side, and fail requests whose transfer was lost. The flags are folded into
the JSON on the argument list, before vLLM makes a ``KVTransferConfig`` of it: that refuses half a config, and does not
remember what was said and what was a default.

Where Python code makes the config, ``patch_transfer_config`` supplies the defaults. There is one gap: ``LLM(...)``
makes a ``KVTransferConfig`` of a dict before it loads plugins. A dict without ``kv_role`` is then refused by vLLM, and
``kv_load_failure_policy`` is put right by ``settle_failure_policy`` at the connector's start.
``disagg_vllm.register()``, called before ``LLM(...)``, closes the gap.
"""

import argparse
import functools
import json
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from disagg_plugin.errors import ConfigError
from disagg_vllm import CONNECTOR_NAMES

if TYPE_CHECKING:  # every process of every vLLM command imports this file: load what disagg needs when it is used
    from disagg_plugin.config import DisaggSettings

DEFAULTS = {"kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
LONG_FLAG = "--kv-transfer-config"
_EXTRA = "kv_connector_extra_config"
_MARK = "_disagg_defaults_applied"


class _Flag(NamedTuple):
    """A flag of ours and where its value goes in the JSON."""

    name: str
    path: tuple[str, ...]
    options: dict[str, Any]

    @property
    def dest(self) -> str:
        return "disagg_flag_" + self.path[-1]


FLAGS = (
    _Flag("--kv-connector", ("kv_connector",), {"metavar": "NAME", "help": "KV connector, for example disagg."}),
    _Flag(
        "--disagg-role",
        (_EXTRA, "role"),
        {"choices": ["prefill", "decode", "both"], "help": "What this engine does for others."},
    ),
    _Flag(
        "--disagg-config",
        (_EXTRA, "config_file"),
        {"metavar": "FILE", "help": "YAML or JSON file with disagg's settings."},
    ),
)
_BY_NAME = {flag.name: flag for flag in FLAGS}


class FlagError(Exception):
    """What the user typed does not fit together; the message is for ``parser.error``."""


def fold(args: Sequence[str], flags: Sequence[_Flag] = FLAGS) -> list[str]:
    """The argument list with everything that our flags say moved into one ``--kv-transfer-config``.

    Our flags stay in the list, for argparse to check and to forget. A list that neither has one of them nor a JSON
    that names disagg is returned as it is. Of several ``--kv-transfer-config`` the last one counts, as in vLLM.

    Raises:
        FlagError: A flag contradicts the JSON, or another flag.
    """
    args = list(args)
    ours = {flag.name: flag for flag in flags}
    said, places = _scan(args, ours)
    text = said.pop(LONG_FLAG, None)
    config = _parse_object(text)
    if config is None:
        if said:
            raise FlagError(f"argument {LONG_FLAG}: not a JSON object, cannot be combined with {', '.join(said)}")
        return args  # vLLM says what is wrong with it
    if not said and config.get("kv_connector") not in CONNECTOR_NAMES:
        return args
    for name, value in said.items():
        _put(config, ours[name], value)
    connector = config.setdefault("kv_connector", "disagg")
    if connector in CONNECTOR_NAMES:
        config = {**config, **{key: value for key, value in DEFAULTS.items() if config.get(key) is None}}
    elif given := [name for name in said if name.startswith("--disagg-")]:
        raise FlagError(f"{given[0]} is for --kv-connector disagg, not for {connector}")
    dropped = {at for first, count in places for at in range(first, first + count)}
    kept = [argument for at, argument in enumerate(args) if at not in dropped]
    end = kept.index("--") if "--" in kept else len(kept)
    return [*kept[:end], LONG_FLAG, json.dumps(config), *kept[end:]]


def check_startup(settings: "DisaggSettings", ranks: Sequence[int] = (0,)) -> None:
    """Find before the engine starts what would stop it minutes later: keys, LMCache, the side channel's ports.

    Args:
        ranks: Data-parallel ranks that this command starts here; rank r binds to ``side_channel.port + r``.

    Raises:
        ConfigError: In one line.
    """
    from disagg_plugin.control.keys import KeyRing
    from disagg_plugin.lmcache_check import check_lmcache

    channel = settings.side_channel
    if channel.keys_dir is not None:
        KeyRing.load(Path(channel.keys_dir))
    if (lmcache := settings.cache.active_lmcache) is not None:
        check_lmcache(lmcache)
    if channel.port == 0:
        return
    for rank in ranks:
        try:
            with socket.create_server((channel.host, channel.port + rank)):
                pass
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            address = f"{channel.host}:{channel.port + rank}"
            raise ConfigError(
                f"side channel: cannot bind to {address} ({reason}): set another side_channel.port"
            ) from None


def asks_for_disagg(args: Sequence[str]) -> bool:
    """Whether a command line names our connector or has one of our flags."""
    return any(
        argument in CONNECTOR_NAMES
        or argument.startswith(("--disagg-", "--disagg_"))
        or ("disagg" in argument.lower() and re.search("kv[-_]connector", argument) is not None)
        for argument in args
    )


def patch_engine_args(engine_args: Any) -> None:
    """Add our flags to every parser that ``EngineArgs.add_cli_args`` fills from now on; once."""
    original = engine_args.add_cli_args
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def add_cli_args(parser: Any) -> Any:
        return add_flags(original(parser))

    setattr(add_cli_args, _MARK, True)
    engine_args.add_cli_args = staticmethod(add_cli_args)


def add_flags(parser: Any) -> Any:
    """Add those flags that ``parser`` lacks (a later vLLM may have some), and fold them whenever it parses."""
    flags = tuple(flag for flag in FLAGS if flag.name not in parser._option_string_actions)
    group = parser.add_argument_group("disagg", "Disaggregated prefill and decode: short forms of " + LONG_FLAG + ".")
    for flag in flags:
        group.add_argument(flag.name, dest=flag.dest, default=argparse.SUPPRESS, **flag.options)
    original = parser.parse_known_args

    def parse_known_args(args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        args = list(sys.argv[1:] if args is None else args)
        try:
            folded = fold(args, flags)
            namespace, rest = original(folded, namespace)
            _forget_flags(namespace, flags, args)
            _check(namespace, args)
        except (FlagError, ConfigError) as error:
            parser.error(str(error))
        return namespace, rest

    parser.parse_known_args = parse_known_args
    return parser


def patch_transfer_config(transfer_config: Any) -> None:
    """Let ``KVTransferConfig(...)`` have our defaults where its connector is disagg; once.

    A default cannot be told from a choice once the object exists, so this looks at the constructor's arguments.
    Every object made from now on is marked, in whichever way it is made (the mark survives pickling), for
    ``settle_failure_policy``.
    """
    if hasattr(transfer_config.__init__, _MARK):
        return
    init, post_init = transfer_config.__init__, transfer_config.__post_init__

    @functools.wraps(init)
    def init_with_defaults(self: Any, *args: Any, **kwargs: Any) -> None:
        if (args[0] if args else kwargs.get("kv_connector")) in CONNECTOR_NAMES:
            positional = list(transfer_config.__dataclass_fields__)[: len(args)]
            missing = {key: value for key, value in DEFAULTS.items() if key not in positional}
            kwargs |= {key: value for key, value in missing.items() if kwargs.get(key) is None}
        init(self, *args, **kwargs)

    @functools.wraps(post_init)
    def mark(self: Any) -> None:
        post_init(self)
        if self.kv_connector in CONNECTOR_NAMES:
            setattr(self, _MARK, True)

    setattr(init_with_defaults, _MARK, True)
    transfer_config.__init__ = init_with_defaults
    transfer_config.__post_init__ = mark


def settle_failure_policy(transfer_config: Any) -> str | None:
    """Set ``recompute`` where ``fail`` may be vLLM's default, and return a line to log; for the connector's start.

    vLLM's scheduler reads the policy after it made its connector. ``fail`` stands where it was chosen, which only a
    config made after ``register()`` can say.
    """
    if getattr(transfer_config, _MARK, False) or transfer_config.kv_load_failure_policy != "fail":
        return None
    transfer_config.kv_load_failure_policy = "recompute"
    return (
        "kv_load_failure_policy set to 'recompute': this config was made before plugins were loaded, where 'fail' is "
        "also what is left unsaid; call disagg_vllm.register() before LLM(...) to choose 'fail'"
    )


def _scan(args: list[str], ours: Mapping[str, _Flag]) -> tuple[dict[str, str], list[tuple[int, int]]]:
    """What our flags and the long flag say (the last time counts), and where the long flag stands."""
    said: dict[str, str] = {}
    places = []
    at = 0
    while at < len(args) and args[at] != "--":
        name, has_value, value = args[at].partition("=")
        count = 1
        if name == LONG_FLAG or name in ours:
            if not has_value:
                if at + 1 == len(args):
                    break  # argparse reports the missing value
                value, count = args[at + 1], 2
            said[name] = value
            if name == LONG_FLAG:
                places.append((at, count))
        at += count
    return said, places


def _parse_object(text: str | None) -> dict[str, Any] | None:
    """A JSON object, empty where nothing was said; None if the text is anything else."""
    if text is None or text in ("", "None"):
        return {}
    try:
        config = json.loads(text)
    except ValueError:
        return None
    extra_ok = isinstance(config, dict) and isinstance(config.get(_EXTRA, {}), dict)
    return config if extra_ok else None


def _put(config: dict[str, Any], flag: _Flag, value: str) -> None:
    target = config
    for key in flag.path[:-1]:
        target = target.setdefault(key, {})
    if target.get(flag.path[-1], value) != value:
        raise FlagError(f"{flag.name} {value} contradicts {flag.path[-1]} {target[flag.path[-1]]} in {LONG_FLAG}")
    target[flag.path[-1]] = value


def _forget_flags(namespace: Any, flags: Sequence[_Flag], args: Sequence[str]) -> None:
    """Leave the namespace as the long form does; argparse also takes abbreviations, which ``fold`` has not seen."""
    for flag in flags:
        if hasattr(namespace, flag.dest):
            delattr(namespace, flag.dest)
            if not any(argument.partition("=")[0] == flag.name for argument in args):
                raise FlagError(f"{flag.name} cannot be abbreviated")


def _check(namespace: Any, args: Sequence[str]) -> None:
    transfer: Any = getattr(namespace, "kv_transfer_config", None)
    if transfer is None or transfer.kv_connector not in CONNECTOR_NAMES:
        return
    from disagg_vllm.admin_route import wanted_middleware
    from disagg_vllm.admission import prepare
    from disagg_vllm.settings import settings_of

    settings = settings_of(transfer)
    check_startup(settings, _local_ranks(namespace))
    prepare(namespace, settings, args)
    if hasattr(namespace, "middleware"):
        wanted = [one for one in wanted_middleware(settings) if one not in (namespace.middleware or ())]
        namespace.middleware = [*(namespace.middleware or ()), *wanted]


def _local_ranks(namespace: Any) -> range:
    """Data-parallel ranks whose schedulers this command starts on this machine."""
    rank = getattr(namespace, "data_parallel_rank", None)
    if rank is not None:
        return range(rank, rank + 1)
    first = getattr(namespace, "data_parallel_start_rank", None) or 0
    count = getattr(namespace, "data_parallel_size_local", None)
    if count is None:
        count = getattr(namespace, "data_parallel_size", None) or 1
    return range(first, first + count)
