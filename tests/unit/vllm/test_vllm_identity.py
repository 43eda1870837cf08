"""A vLLM engine says what model it runs so that an engine with another tp, dtype or path says the same."""

import json
import struct
from pathlib import Path

import pytest

from disagg_plugin.config import DisaggSettings
from disagg_plugin.control.identity import local_model_path
from disagg_plugin.errors import ConfigError
from disagg_vllm.identity import model_identity

# torch's own, when vLLM imports its compiler
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
}


def save_model(folder: Path, fill: bytes = b"\0", **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + fill * 16)
    return folder


def identity(folder: Path, settings: DisaggSettings | None = None, **arguments):
    from vllm.engine.arg_utils import EngineArgs

    arguments = {"dtype": "float32", "skip_tokenizer_init": True, **arguments}
    config = EngineArgs(model=str(folder), **arguments).create_engine_config()
    return model_identity(config, settings or DisaggSettings())


def test_the_same_model_elsewhere_in_another_dtype_and_length_is_the_same(tmp_path):
    first = identity(save_model(tmp_path / "a"), served_model_name="one")
    second = identity(save_model(tmp_path / "b"), dtype="bfloat16", max_model_len=512, served_model_name=["two", "2"])
    assert first.config_fingerprint == second.config_fingerprint
    assert first.weights_digest == second.weights_digest
    assert (first.served_name, second.served_name) == ("one", "two")


def test_overrides_change_the_fingerprint_and_weights_the_digest(tmp_path):
    first = identity(save_model(tmp_path / "a"))
    rope = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}
    overridden = identity(tmp_path / "a", hf_overrides=rope)
    assert overridden.config_fingerprint != first.config_fingerprint
    assert overridden.weights_digest == first.weights_digest
    tuned = identity(save_model(tmp_path / "b", fill=b"\1"))
    assert tuned.config_fingerprint == first.config_fingerprint
    assert tuned.weights_digest != first.weights_digest


def test_rope_written_the_old_way_is_the_same_model(tmp_path):
    scaling = {"rope_type": "linear", "factor": 2.0}
    old = identity(save_model(tmp_path / "old", rope_theta=50000.0, rope_scaling=scaling))
    new = identity(save_model(tmp_path / "new", rope_parameters={**scaling, "rope_theta": 50000.0}))
    assert old.config_fingerprint == new.config_fingerprint


def test_a_revision_id_stands_in_for_weights_that_cannot_be_read(tmp_path):
    (save_model(tmp_path / "a") / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="model_revision_id"):
        identity(tmp_path / "a")
    assert identity(tmp_path / "a", DisaggSettings(model_revision_id="v7")).weights_digest == "v7"


def test_dummy_weights_are_no_models_weights(tmp_path):
    assert identity(save_model(tmp_path / "a"), load_format="dummy").weights_digest == "dummy-tp1"


def test_a_hub_id_is_looked_up_on_this_machine_only(tmp_path):
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = tmp_path / "models--org--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    assert local_model_path("org/name", cache_dir=str(tmp_path)) == snapshot
    assert local_model_path(str(snapshot)) == snapshot
    with pytest.raises(ConfigError, match="model_revision_id"):
        local_model_path("org/other", cache_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="model_revision_id"):
        local_model_path("s3://bucket/a/b", cache_dir=str(tmp_path))
