"""``disagg`` helps before an engine starts; a user's mistake is one line and exit code 2."""

import json
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from disagg_plugin.cli.main import app
from disagg_plugin.config import DisaggSettings, load_settings

LLAMA_70B = {
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "hidden_size": 8192,
    "torch_dtype": "bfloat16",
}
DEEPSEEK = {
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "hidden_size": 7168,
}


def disagg(*args: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of one command."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def written(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(json.dumps(values))
    return path


@pytest.fixture
def settings_file(tmp_path: Path) -> Path:
    return written(tmp_path / "disagg.json", {"role": "decode"})


def test_importing_the_command_loads_no_engine_and_no_tensors() -> None:
    code = "import sys, disagg_plugin.cli.main; print({'torch', 'nixl', 'vllm', 'sglang'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_check_prints_what_holds_in_a_form_that_can_be_a_file(settings_file: Path) -> None:
    code, out, err = disagg("config", "check", settings_file)
    assert code == 0
    assert load_settings(yaml.safe_load(out)) == DisaggSettings(role="decode")
    assert err == "warning: role decode without prefill_workers: every prompt is prefilled locally\n"


def test_check_takes_the_role_as_vllm_does(settings_file: Path) -> None:
    code, out, err = disagg("config", "check", settings_file, "--role", "prefill")
    assert (code, err) == (0, "")
    assert "role: prefill" in out


def test_check_says_when_the_keys_are_not_here(tmp_path: Path) -> None:
    file = written(tmp_path / "a.json", {"side_channel": {"keys_dir": str(tmp_path / "keys")}})
    assert f"warning: on this machine: side channel: no keys in {tmp_path}/keys" in disagg("config", "check", file)[2]
    disagg("keygen", tmp_path / "keys", "--fleet")
    assert disagg("config", "check", file)[2] == ""


@pytest.mark.parametrize(
    ("model", "options", "rows"),
    [
        pytest.param(
            LLAMA_70B,
            ["--tp", "8"],
            {"raw": "40,960", "int8": "20,800 (1.97x smaller)", "slot": "409", "heads": "1 heads of 128"},
            id="70B over 8 ranks",
        ),
        pytest.param(
            LLAMA_70B,
            [],
            {"raw": "327,680", "int8": "166,400 (1.97x smaller)", "slot": "51", "heads": "8 heads of 128"},
            id="70B on one rank",
        ),
        pytest.param(
            {"text_config": LLAMA_70B},
            ["--kv-dtype", "fp8"],
            {"raw": "163,840", "int8": "raw: only 16- and 32-bit", "slot": "102", "heads": "float8_e4m3fn"},
            id="multimodal wrapper, fp8 cache",
        ),
        pytest.param(
            DEEPSEEK,
            ["--tp", "8"],
            {"raw": "70,272", "int8": "35,258 (1.99x smaller)", "slot": "238", "heads": "1 latent vector"},
            id="MLA, replicated",
        ),
    ],
)
def test_check_sizes_the_ring_for_a_model(
    tmp_path: Path, settings_file: Path, model: dict[str, Any], options: list[str], rows: dict[str, str]
) -> None:
    config = written(tmp_path / "config.json", model)
    code, out, err = disagg("config", "check", settings_file, "--model-config", config, *options)
    assert code == 0, err
    table = {cells[1].strip(): cells[2].strip() for line in out.splitlines() if len(cells := line.split("│")) == 4}
    assert table["bytes per token, raw"] == rows["raw"]
    assert table["bytes per token, int8"].startswith(rows["int8"])
    assert table["tokens per slot, raw"] == rows["slot"]
    assert rows["heads"] in table["KV on a rank"]
    assert table["the whole ring"] == "1,073,741,824 bytes, room for 8 peers' regions"


def test_a_models_folder_is_as_good_as_its_config(tmp_path: Path, settings_file: Path) -> None:
    config = written(tmp_path / "config.json", LLAMA_70B)
    by_file, by_folder = (disagg("config", "check", settings_file, "--model-config", p) for p in (config, tmp_path))
    assert by_file == by_folder


@pytest.mark.parametrize(
    ("settings", "model", "options", "problem"),
    [
        pytest.param({"roll": "x"}, None, [], "roll: unknown field; did you mean role?", id="misspelt field"),
        pytest.param(
            {"transfer": {"slot_bytes": 65536}},
            LLAMA_70B,
            [],
            "one token takes 327920 bytes in a slot of 65536: raise transfer.slot_bytes",
            id="one token does not fit a slot: both numbers",
        ),
        pytest.param({}, LLAMA_70B, ["--tp", "3"], "--tp 3: 8 KV heads cannot be split over 3 ranks", id="heads"),
        pytest.param({}, LLAMA_70B, ["--kv-dtype", "int3"], "KV dtype 'int3' is unknown", id="dtype"),
        pytest.param({}, {"layers": 3}, [], "num_hidden_layers = None: must be a positive integer", id="no config"),
        pytest.param({}, {**LLAMA_70B, "head_dim": "x"}, [], "head_dim = 'x': must be a positive integer", id="number"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    tmp_path: Path, settings: dict[str, Any], model: dict[str, Any] | None, options: list[str], problem: str
) -> None:
    args = [str(written(tmp_path / "disagg.json", settings)), *options]
    if model is not None:
        args += ["--model-config", str(written(tmp_path / "config.json", model))]
    code, out, err = disagg("config", "check", *args)
    assert (code, out) == (2, "")
    assert err.startswith("disagg: ")
    assert problem in err
    assert err.count("\n") == 1


def test_schema_is_json() -> None:
    code, out, _ = disagg("config", "schema")
    assert code == 0
    assert json.loads(out)["properties"].keys() == DisaggSettings.model_fields.keys()


@pytest.mark.parametrize("options", [[], ["--fleet"]], ids=["per node", "fleet"])
def test_keygen_writes_secrets_for_the_owner_only(tmp_path: Path, options: list[str]) -> None:
    code, out, _ = disagg("keygen", tmp_path / "keys", *options)
    assert code == 0
    assert str(tmp_path / "keys") in out
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "keys").glob("*.key")} == {0o600}


def test_keygen_begins_a_rotation_with_a_server_pair_beside_the_one_in_use(tmp_path: Path) -> None:
    disagg("keygen", tmp_path / "keys", "--fleet")
    before = (tmp_path / "keys" / "server.key").read_text()
    code, out, _ = disagg("keygen", tmp_path / "keys", "--next")
    assert code == 0
    assert "server-next.pub" in out
    assert (tmp_path / "keys" / "server.key").read_text() == before
    assert (tmp_path / "keys" / "server-next.key").stat().st_mode & 0o777 == 0o600


def test_keygen_replaces_secrets_only_when_forced(tmp_path: Path) -> None:
    disagg("keygen", tmp_path / "keys")
    before = (tmp_path / "keys/server.key").read_bytes()
    code, _, err = disagg("keygen", tmp_path / "keys")
    assert code == 2
    assert "--force" in err
    assert (tmp_path / "keys/server.key").read_bytes() == before
    assert disagg("keygen", tmp_path / "keys", "--force")[0] == 0
    assert (tmp_path / "keys/server.key").read_bytes() != before


def test_keygen_on_a_path_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = disagg("keygen", tmp_path / "file" / "keys")
    assert (code, err.count("\n")) == (2, 1)
