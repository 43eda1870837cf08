"""What a command line with our backend means, without SGLang: which arguments are refused, and whose settings count."""

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from disagg_plugin.config import DisaggSettings
from disagg_plugin.errors import ConfigError
from disagg_sglang import asks_for_disagg, launch

ARGUMENTS: dict[str, Any] = {
    **dict.fromkeys(("tp_size", "pp_size", "dp_size", "dcp_size", "attn_cp_size", "nnodes", "tokenizer_worker_num"), 1),
    **dict.fromkeys(("enable_hierarchical_cache", "enable_hisparse", "enable_lmcache", "enable_pd_role_switch"), False),
    **dict.fromkeys(("disaggregation_enable_kv_checksum", "disable_radix_cache", "encoder_only"), False),
    "speculative_algorithm": None,
    "optimistic_prefill_attempts": 0,
}


@pytest.mark.parametrize(
    ("argv", "asks"),
    [
        pytest.param(["--disaggregation-transfer-backend", "disagg"], True, id="two words"),
        pytest.param(["--disaggregation-transfer-backend=disagg"], True, id="one word"),
        pytest.param(["--disaggregation-transfer-backend", "nixl"], False, id="another backend"),
        pytest.param(["--model-path", "disagg"], False, id="another flag"),
        pytest.param(["--disaggregation-transfer-backend"], False, id="cut short"),
        pytest.param([], False, id="nothing"),
    ],
)
def test_whether_a_command_line_is_ours(argv: list[str], asks: bool) -> None:
    assert asks_for_disagg(argv) is asks


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_plain_server_is_supported(role: launch.Role) -> None:
    assert launch.unsupported_arguments(role, SimpleNamespace(**ARGUMENTS), {}) is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tp_size": 2}, "--tp-size"),
        ({"pp_size": 2}, "--pp-size"),
        ({"dp_size": 2}, "--dp-size"),
        ({"tokenizer_worker_num": 2}, "--tokenizer-worker-num"),
        ({"speculative_algorithm": "EAGLE"}, "--speculative-algorithm"),
        ({"enable_hierarchical_cache": True}, "--enable-hierarchical-cache"),
        ({"enable_pd_role_switch": True}, "--enable-pd-role-switch"),
        ({"disable_radix_cache": True}, "--disable-radix-cache"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_flag(change: dict[str, Any], named: str) -> None:
    problem = launch.unsupported_arguments("decode", SimpleNamespace(**{**ARGUMENTS, **change}), {})
    assert problem is not None
    assert problem.startswith(named)


def test_the_rust_server_is_refused_by_its_variable() -> None:
    problem = launch.unsupported_arguments("prefill", SimpleNamespace(**ARGUMENTS), {"SGLANG_RUST_SERVER": "1"})
    assert problem is not None
    assert problem.startswith("SGLANG_RUST_SERVER")


def test_a_prefill_server_may_do_without_a_prefix_cache() -> None:
    arguments = SimpleNamespace(**{**ARGUMENTS, "disable_radix_cache": True})
    assert launch.unsupported_arguments("prefill", arguments, {}) is None


@pytest.mark.parametrize(
    ("backend", "mode", "role"),
    [
        ("disagg", "decode", "decode"),
        ("disagg", "prefill", "prefill"),
        ("disagg", "null", None),
        ("nixl", "decode", None),
    ],
)
def test_the_role_is_the_command_lines(backend: str, mode: str, role: str | None) -> None:
    arguments = SimpleNamespace(disaggregation_transfer_backend=backend, disaggregation_mode=mode)
    assert launch.role_of(arguments) == role


def test_the_settings_file_comes_by_flag_through_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(launch.CONFIG_VARIABLE, "nowhere")
    config = tmp_path / "disagg.yaml"
    config.write_text("role: prefill\nmodel_revision_id: abc\n")
    parser = argparse.ArgumentParser()
    launch.add_flag(parser)
    assert vars(parser.parse_args(["--disagg-config", str(config)])) == {}, "SGLang's record has no such field"
    settings = launch.settings_for("decode")
    assert (settings.role, settings.model_revision_id) == ("decode", "abc"), "the role is the mode's"


def test_a_mistake_in_the_settings_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "disagg.yaml"
    config.write_text("prefill_worker: []\n")
    monkeypatch.setenv(launch.CONFIG_VARIABLE, str(config))
    with pytest.raises(ConfigError, match="did you mean prefill_workers"):
        launch.settings_for("decode")


@pytest.mark.parametrize(
    ("change", "set_too"),
    [
        pytest.param({}, True, id="nothing was said of it"),
        pytest.param({"enable_priority_scheduling": True}, False, id="the operator chose priorities"),
        pytest.param({"schedule_policy": "lpm"}, False, id="the operator chose another order"),
    ],
)
def test_early_rejection_brings_priorities_unless_the_operator_has_a_say_in_it(
    change: dict[str, Any], set_too: bool
) -> None:
    args = {"enable_priority_scheduling": False, "schedule_policy": "fcfs", **change}
    fields = launch.priority_arguments(SimpleNamespace(**args))
    assert bool(fields) is set_too
    if set_too:
        assert fields["schedule_low_priority_values_first"], "as vLLM does, and as the classes' numbers are"


@pytest.mark.parametrize(("role", "refused"), [("prefill", True), ("decode", False)])
def test_lmcache_is_for_decode_servers_which_run_as_plain_engines(role: launch.Role, refused: bool) -> None:
    problem = launch.unsupported_arguments(role, SimpleNamespace(**{**ARGUMENTS, "enable_lmcache": True}), {})
    assert (problem is not None) is refused


def settings_of(role: launch.Role, line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> DisaggSettings:
    config = folder / "disagg.yaml"
    config.write_text(f"{line}\n")
    monkeypatch.setenv(launch.CONFIG_VARIABLE, str(config))
    return launch.settings_for(role)


LMCACHE = "cache: {reuse_prefix: true, lmcache: {url: 'tcp://127.0.0.1:5555'}}"


@pytest.mark.parametrize(
    ("role", "line", "named"),
    [
        ("decode", LMCACHE, r"cache\.lmcache: on SGLang for prefill servers only"),
        (
            "prefill",
            LMCACHE[:-2] + ", extra: {lmcache.mp.x: 1}}}",
            r"cache\.lmcache\.extra: for LMCache's vLLM connector",
        ),
        ("decode", "router: {allowed_hosts: [10.0.0.0/8]}", "router: vLLM engines only"),
    ],
)
def test_settings_that_only_vllm_has_a_use_for_are_refused_not_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: launch.Role, line: str, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        settings_of(role, line, tmp_path, monkeypatch)


def test_a_prefill_server_takes_prefixes_from_lmcache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings_of("prefill", LMCACHE, tmp_path, monkeypatch).cache.active_lmcache is not None
