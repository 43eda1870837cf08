"""However disagg is asked for, vLLM gets one configuration; mistakes end in one line, not in a traceback."""

import argparse
import inspect
import json
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import disagg_vllm
from disagg_vllm import cli_flags
from disagg_vllm.cli_flags import FlagError, asks_for_disagg, fold, settle_failure_policy

# torch's own, when vLLM imports its compiler
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")

DEFAULTS = {"kv_role": "kv_both", "kv_load_failure_policy": "recompute"}


def folded_json(args: list[str]) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kv-transfer-config", type=json.loads)
    return parser.parse_known_args(fold(args))[0].kv_transfer_config


@pytest.mark.parametrize(
    "args",
    [
        pytest.param(["model", "--port", "8000"], id="no word of it"),
        pytest.param(["--kv-transfer-config", '{"kv_connector": "NixlConnector"}'], id="another connector"),
        pytest.param(["--kv-transfer-config", "not json"], id="not JSON"),
        pytest.param(["--kv-transfer-config"], id="a value is missing"),
        pytest.param(["model", "--", "--kv-connector", "disagg"], id="after the end of options"),
        pytest.param([], id="nothing"),
    ],
)
def test_what_does_not_concern_us_stays_as_it_is(args):
    assert fold(args) == args


@pytest.mark.parametrize(
    ("args", "config"),
    [
        pytest.param(["--kv-connector", "disagg"], {"kv_connector": "disagg", **DEFAULTS}, id="connector alone"),
        pytest.param(["--kv-connector=disagg"], {"kv_connector": "disagg", **DEFAULTS}, id="with an equals sign"),
        pytest.param(["--kv-connector", "NixlConnector"], {"kv_connector": "NixlConnector"}, id="another connector"),
        pytest.param(
            ["--disagg-role", "decode", "--disagg-config", "d.yaml"],
            {
                "kv_connector": "disagg",
                "kv_connector_extra_config": {"config_file": "d.yaml", "role": "decode"},
                **DEFAULTS,
            },
            id="our flags imply our connector",
        ),
        pytest.param(
            ["--kv-transfer-config", '{"kv_connector": "DisaggConnector", "kv_load_failure_policy": "fail"}'],
            {"kv_connector": "DisaggConnector", "kv_role": "kv_both", "kv_load_failure_policy": "fail"},
            id="what the user says stands",
        ),
        pytest.param(
            ["--kv-transfer-config", '{"kv_role": "kv_consumer"}', "--kv-connector", "disagg"],
            {"kv_connector": "disagg", "kv_role": "kv_consumer", "kv_load_failure_policy": "recompute"},
            id="long and short form together",
        ),
        pytest.param(
            ["--kv-connector", "NixlConnector", "--kv-connector", "disagg"],
            {"kv_connector": "disagg", **DEFAULTS},
            id="the last time counts",
        ),
    ],
)
def test_flags_are_folded_into_the_long_form(args, config):
    assert folded_json(args) == config


@pytest.mark.parametrize(
    ("args", "said"),
    [
        pytest.param(
            ["--kv-connector", "disagg", "--kv-transfer-config", '{"kv_connector": "NixlConnector"}'],
            "contradicts kv_connector NixlConnector",
            id="two connectors",
        ),
        pytest.param(
            [
                "--disagg-role",
                "decode",
                "--kv-transfer-config",
                '{"kv_connector": "disagg", "kv_connector_extra_config": {"role": "prefill"}}',
            ],
            "contradicts role prefill",
            id="two roles",
        ),
        pytest.param(
            ["--kv-connector", "NixlConnector", "--disagg-role", "both"], "not for NixlConnector", id="not ours"
        ),
        pytest.param(["--kv-connector", "disagg", "--kv-transfer-config", "{"], "not a JSON object", id="half a JSON"),
    ],
)
def test_contradictions_are_refused(args, said):
    with pytest.raises(FlagError, match=said):
        fold(args)


@pytest.mark.parametrize(
    ("args", "asks"),
    [
        (["serve", "m", "--kv-connector", "disagg"], True),
        (["serve", "m", "--kv_connector=disagg"], True),
        (["serve", "m", "--disagg-role", "decode"], True),
        (["serve", "m", "--kv-transfer-config", '{"kv_connector":"disagg"}'], True),
        (["serve", "m", "--kv-transfer-config.kv_connector", "disagg"], True),
        (["serve", "disagg-7b", "--served-model-name=disagg"], False),
        (["serve", "m", "--kv-connector", "NixlConnector"], False),
    ],
)
def test_whether_a_command_line_asks_for_disagg(args, asks):
    assert asks_for_disagg(args) is asks


# -- with vLLM's own parser ----------------------------------------------------------------------------------------


@pytest.fixture
def serve():
    """Parse ``vllm serve tiny ...`` as the command does, up to the engine's arguments."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    disagg_vllm.register()
    parser = FlexibleArgumentParser(prog="vllm")
    ServeSubcommand().subparser_init(parser.add_subparsers())
    return lambda *args: parser.parse_args(["serve", "tiny", *args])


@pytest.fixture
def settings_file(tmp_path: Path) -> Path:
    path = tmp_path / "disagg.yaml"
    path.write_text("side_channel:\n  port: 0\n")
    return path


def comparable(config) -> dict[str, object]:
    """A config without the id that vLLM draws for each."""
    from dataclasses import asdict

    return {key: value for key, value in asdict(config).items() if key != "engine_id"}


def test_every_way_to_ask_for_disagg_gives_one_configuration(serve, settings_file, tmp_path):
    from vllm.config import KVTransferConfig

    extra = {"config_file": str(settings_file), "role": "decode"}
    flags = tmp_path / "flags.yaml"
    flags.write_text(f"kv-connector: disagg\ndisagg-role: decode\ndisagg-config: {settings_file}\n")
    nested = tmp_path / "nested.yaml"
    nested.write_text(
        "kv-transfer-config:\n  kv_connector: disagg\n  kv_connector_extra_config:\n"
        f"    config_file: {settings_file}\n    role: decode\n"
    )
    dotted = "--kv-transfer-config.kv_connector_extra_config"
    ways = [
        serve("--kv-connector", "disagg", "--disagg-role", "decode", "--disagg-config", str(settings_file)),
        serve("--kv_connector=disagg", "--disagg_role=decode", f"--disagg_config={settings_file}"),
        serve("--disagg-role", "decode", "--disagg-config", str(settings_file)),
        serve("--kv-transfer-config", json.dumps({"kv_connector": "disagg", "kv_connector_extra_config": extra})),
        serve(
            *("--kv-transfer-config.kv_connector", "disagg"),
            *(f"{dotted}.config_file", str(settings_file), f"{dotted}.role", "decode"),
        ),
        serve("--kv-connector", "disagg", f"{dotted}.config_file", str(settings_file), "--disagg-role", "decode"),
        serve("--config", str(flags)),
        serve("--config", str(nested)),
    ]
    configs = [namespace.kv_transfer_config for namespace in ways]
    configs.append(KVTransferConfig(kv_connector="disagg", kv_connector_extra_config=extra))
    configs.append(KVTransferConfig(**{"kv_connector": "disagg", "kv_connector_extra_config": extra, **DEFAULTS}))
    stock = {"kv_connector": "disagg", "kv_connector_extra_config": extra, **DEFAULTS}
    assert comparable(configs[-1]).items() >= stock.items()
    assert all(comparable(config) == comparable(configs[0]) for config in configs)
    assert len({frozenset(vars(namespace)) for namespace in ways}) == 1  # no attribute of ours is left behind


def test_without_our_flags_the_parsed_arguments_are_vllms_own(serve):
    from vllm.engine.arg_utils import EngineArgs

    namespace = serve("--kv-transfer-config", '{"kv_connector": "NixlConnector", "kv_role": "kv_producer"}')
    assert namespace.kv_transfer_config.kv_load_failure_policy == "fail"
    assert serve().kv_transfer_config is EngineArgs.kv_transfer_config
    assert not [name for name in vars(namespace) if "disagg" in name]


def test_another_connector_is_only_folded(serve):
    namespace = serve("--kv-connector", "NixlConnector", "--kv-transfer-config.kv_role", "kv_consumer")
    config = namespace.kv_transfer_config
    assert (config.kv_connector, config.kv_role, config.kv_load_failure_policy) == (
        "NixlConnector",
        "kv_consumer",
        "fail",
    )


def test_the_flags_are_in_the_help_in_a_group_of_their_own(serve, capsys):
    with pytest.raises(SystemExit):
        serve("--help=disagg")
    text = capsys.readouterr().out
    assert all(flag.name in text for flag in cli_flags.FLAGS)


def parse_error(serve, capsys, *args: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        serve(*args)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_settings_file_that_is_missing_or_wrong_is_one_line(serve, capsys, tmp_path):
    missing = tmp_path / "missing.yaml"
    assert str(missing) in parse_error(serve, capsys, "--disagg-config", str(missing))
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("side_chanel: {}\n")
    assert "side_chanel" in parse_error(serve, capsys, "--kv-connector", "disagg", "--disagg-config", str(wrong))


def test_settings_beside_the_file_are_checked_and_win_over_it(serve, capsys, settings_file):
    from disagg_vllm.settings import settings_of

    extra = {"config_file": str(settings_file), "split_policy": {"prompt_length_threshold": 7}}
    settings = settings_of(SimpleNamespace(kv_connector_extra_config=extra))
    assert settings.split_policy.prompt_length_threshold == 7
    assert settings.side_channel.port == 0
    config = json.dumps({"kv_connector": "disagg", "kv_connector_extra_config": {**extra, "rolle": "decode"}})
    assert "rolle" in parse_error(serve, capsys, "--kv-transfer-config", config)


def test_keys_that_are_missing_or_readable_by_all_are_one_line(serve, capsys, tmp_path):
    from disagg_plugin.control import keys

    folder = tmp_path / "keys"
    path = tmp_path / "disagg.yaml"
    path.write_text(f"side_channel:\n  port: 0\n  keys_dir: {folder}\n")
    assert str(folder) in parse_error(serve, capsys, "--disagg-config", str(path))
    keys.generate(folder, fleet=True)
    serve("--disagg-config", str(path))
    (folder / "server.key").chmod(0o644)
    assert "chmod 600" in parse_error(serve, capsys, "--disagg-config", str(path))


def test_a_port_in_use_is_one_line_and_a_free_one_stays_free(serve, capsys, tmp_path):
    path = tmp_path / "disagg.yaml"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        path.write_text(f"side_channel:\n  port: {port}\n")
        line = parse_error(serve, capsys, "--disagg-config", str(path))
        assert f"127.0.0.1:{port}" in line
        assert "in use" in line
    serve("--disagg-config", str(path))
    serve("--disagg-config", str(path))


def test_each_data_parallel_rank_of_this_machine_has_its_port(serve, tmp_path, capsys):
    path = tmp_path / "disagg.yaml"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1] - 1
        path.write_text(f"side_channel:\n  port: {port}\n")
        line = parse_error(serve, capsys, "--disagg-config", str(path), "--data-parallel-size", "2")
        assert f":{port + 1} " in line
        serve("--disagg-config", str(path), "--data-parallel-size", "2", "--data-parallel-size-local", "1")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        pytest.param(["--disagg-role", "prefil"], "prefil", id="unknown role"),
        pytest.param(["--disagg-rol", "prefill"], "--disagg-role cannot be abbreviated", id="abbreviated"),
        pytest.param(["--kv-connector"], "expected one argument", id="no value"),
        pytest.param(["--kv-connector", "Other", "--disagg-role", "both"], "not for Other", id="not ours"),
    ],
)
def test_mistyped_flags_are_one_line(args, said, serve, capsys):
    assert said in parse_error(serve, capsys, *args)


# -- the plugin ----------------------------------------------------------------------------------------------------


def test_registering_is_idempotent():
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.engine.arg_utils import EngineArgs

    disagg_vllm.register()
    before = (EngineArgs.add_cli_args, KVTransferConfig.__init__, dict(KVConnectorFactory._registry))
    disagg_vllm.register()
    assert (EngineArgs.add_cli_args, KVTransferConfig.__init__, dict(KVConnectorFactory._registry)) == before
    assert set(disagg_vllm.CONNECTOR_NAMES) <= set(KVConnectorFactory._registry)


def test_a_vllm_that_has_one_of_the_flags_keeps_its_own():
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    parser.add_argument("--kv-connector", dest="theirs")
    parser.add_argument("--kv-transfer-config", type=json.loads)
    cli_flags.add_flags(parser)
    namespace = parser.parse_args(["--kv-connector", "NixlConnector"])
    assert (namespace.theirs, namespace.kv_transfer_config) == ("NixlConnector", None)


def test_importing_the_plugin_loads_neither_torch_nor_vllm():
    code = "import sys, disagg_vllm; assert not {'torch', 'vllm', 'pydantic', 'zmq'} & set(sys.modules)"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


# -- configs made in Python ----------------------------------------------------------------------------------------


def test_a_config_made_in_python_has_the_defaults_and_the_choices():
    from vllm.config import KVTransferConfig

    disagg_vllm.register()
    assert "kv_connector" in inspect.signature(KVTransferConfig).parameters
    config = KVTransferConfig("disagg")
    assert (config.kv_role, config.kv_load_failure_policy) == ("kv_both", "recompute")
    chosen = KVTransferConfig(kv_connector="disagg", kv_role="kv_consumer", kv_load_failure_policy="fail")
    assert (chosen.kv_role, chosen.kv_load_failure_policy) == ("kv_consumer", "fail")
    assert settle_failure_policy(pickle.loads(pickle.dumps(chosen))) is None
    assert KVTransferConfig(kv_connector="NixlConnector", kv_role="kv_both").kv_load_failure_policy == "fail"


def test_a_choice_on_the_command_line_stands(serve):
    config = serve(
        "--kv-transfer-config",
        '{"kv_connector": "disagg", "kv_load_failure_policy": "fail", '
        '"kv_connector_extra_config": {"side_channel": {"port": 0}}}',
    ).kv_transfer_config
    assert settle_failure_policy(pickle.loads(pickle.dumps(config))) is None
    assert config.kv_load_failure_policy == "fail"


def test_a_config_made_before_plugins_were_loaded_is_put_right_at_the_connectors_start():
    from vllm.config import KVTransferConfig

    config = KVTransferConfig(kv_connector="disagg", kv_role="kv_both", kv_load_failure_policy="fail")
    del config._disagg_defaults_applied  # as vLLM alone makes it
    assert "recompute" in str(settle_failure_policy(config))
    assert config.kv_load_failure_policy == "recompute"
    assert settle_failure_policy(config) is None
