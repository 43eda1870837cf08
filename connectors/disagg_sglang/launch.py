"""Command line and argument resolution: what an SGLang server with our backend is started as, and what is refused.

A decode server is started with ``--disaggregation-mode decode`` and *runs* as a plain engine, mode "null": see
ARCHITECTURE.md, "SGLang". The raw arguments keep what the operator asked for, and ``role_of`` reads those.
"""

import argparse
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from disagg_plugin.admission.classes import ClassBook
from disagg_plugin.config import DisaggSettings, load_settings
from disagg_plugin.errors import ConfigError
from disagg_plugin.lmcache_check import check_lmcache
from disagg_plugin.meeting_folder import make_meeting_folder
from disagg_sglang import BACKEND

logger = logging.getLogger(__name__)

CONFIG_FLAG = "--disagg-config"
CONFIG_VARIABLE = "DISAGG_CONFIG"

Role = Literal["prefill", "decode"]


class _RememberConfig(argparse.Action):
    """SGLang's arguments have no field of ours; its child processes inherit the environment."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        os.environ[CONFIG_VARIABLE] = str(values)


def add_flag(parser: argparse.ArgumentParser) -> None:
    """Teach SGLang's parser ``--disagg-config``."""
    parser.add_argument(
        CONFIG_FLAG,
        action=_RememberConfig,
        default=argparse.SUPPRESS,
        metavar="FILE",
        help=f"Settings of --disaggregation-transfer-backend {BACKEND}; also environment variable {CONFIG_VARIABLE}.",
    )


def role_of(server_args: Any) -> Role | None:
    """What the operator asked for; None if this server is none of ours."""
    if server_args.disaggregation_transfer_backend != BACKEND:
        return None
    mode = server_args.disaggregation_mode
    return mode if mode in ("prefill", "decode") else None


def settings_for(role: Role) -> DisaggSettings:
    """The settings file's content; the role is the command line's.

    Raises:
        ConfigError: One line that names file, field and value.
    """
    path = os.environ.get(CONFIG_VARIABLE)
    overrides = {"role": role}
    settings = load_settings(Path(path), overrides) if path else load_settings(overrides)
    if (lmcache := settings.cache.active_lmcache) is not None:
        if role != "prefill":
            raise ConfigError("cache.lmcache: on SGLang for prefill servers only; see docs/sglang-lmcache.md")
        if lmcache.extra:
            raise ConfigError("cache.lmcache.extra: for LMCache's vLLM connector; SGLang prefill servers have none")
    if settings.router.model_fields_set:
        raise ConfigError("router: vLLM engines only; SGLang's routers are served without settings, leave it out")
    return settings


def resolve(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Around SGLang's own step for PD arguments.

    Raises:
        ConfigError: Something of the command line or of the settings cannot be served with this backend.
    """
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    role = role_of(server_args)
    if role is not None:
        if problem := unsupported_arguments(role, resolving_view(server_args), os.environ):
            raise ConfigError(f"--disaggregation-transfer-backend {BACKEND} does not support {problem}")
        settings = settings_for(role)  # a mistake in the file is said here, before a model is loaded
        make_meeting_folder()
        if settings.qos.enable_early_rejection:
            ClassBook(settings.qos)  # as is an API key that cannot be read
            if fields := priority_arguments(resolving_view(server_args)):
                declare_resolution(server_args, BACKEND, **fields)
        if (lmcache := settings.cache.active_lmcache) is not None:
            if resolving_view(server_args).disable_radix_cache:
                raise ConfigError("--disable-radix-cache: prefixes from cache.lmcache enter through it")
            check_lmcache(lmcache)
        if resolving_view(server_args).enable_lmcache:
            logger.warning("disagg: decisions do not count what LMCache holds: see docs/sglang-lmcache.md")
        if role == "decode":
            declare_resolution(server_args, BACKEND, disaggregation_mode="null")
    previous(server_args)


def priority_arguments(args: Any) -> dict[str, object]:
    """So that classes are served in their order, lower numbers first; nothing where the operator has a say in it."""
    if args.enable_priority_scheduling or args.schedule_policy not in ("fcfs", "lof"):
        return {}
    return {
        "enable_priority_scheduling": True,
        "schedule_low_priority_values_first": True,
        "default_priority_value": 0,
        "disable_priority_preemption": True,  # whoever was let in is served to the end
    }


def unsupported_arguments(role: Role, args: Any, environ: Any) -> str | None:
    """The first argument that this backend cannot serve with, by its flag; None if there is none."""
    checks = (
        ("--tp-size above 1", args.tp_size > 1),
        ("--pp-size above 1", args.pp_size > 1),
        ("--dp-size above 1", args.dp_size > 1),
        ("--dcp-size above 1", args.dcp_size > 1),
        ("--attn-cp-size above 1", args.attn_cp_size > 1),
        ("--nnodes above 1", args.nnodes > 1),
        ("--tokenizer-worker-num above 1: its workers load no plugins", args.tokenizer_worker_num > 1),
        ("SGLANG_RUST_SERVER: it loads no plugins", environ.get("SGLANG_RUST_SERVER", "0").lower() in ("1", "true")),
        ("--speculative-algorithm", args.speculative_algorithm is not None),
        ("--enable-hierarchical-cache", args.enable_hierarchical_cache),
        ("--enable-hisparse", args.enable_hisparse),
        (
            "--enable-lmcache on a prefill server: set cache.lmcache",
            role == "prefill" and args.enable_lmcache,
        ),
        ("--enable-pd-role-switch", args.enable_pd_role_switch),
        ("--disaggregation-enable-kv-checksum: chunks carry their own", args.disaggregation_enable_kv_checksum),
        ("--optimistic-prefill-attempts", args.optimistic_prefill_attempts > 0),
        ("--disable-radix-cache: transferred KV enters through it", role == "decode" and args.disable_radix_cache),
        ("--encoder-only", args.encoder_only),
    )
    return next((what for what, holds in checks if holds), None)
