"""Two engines exchange KV only if their models are one: same numbers, same weights, however they are stored."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig

from disagg_plugin.control import identity
from disagg_plugin.control.identity import config_fingerprint, model_facts, weights_digest
from disagg_plugin.errors import ConfigError

LLAMA: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 16384,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
QWEN: dict[str, object] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rope_theta": 1000000,
    "rope_scaling": {"type": "yarn", "factor": 4.0},
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
}
GEMMA: dict[str, object] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "num_hidden_layers": 7,
    "rope_theta": 1000000,
    "rope_local_base_freq": 10000,
}


def fingerprint(config: Mapping[str, object]) -> str:
    return config_fingerprint(model_facts(config))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"rope_theta": 10000.0}, id="rope theta"),
        pytest.param({"rope_scaling": None}, id="rope scaling switched off"),
        pytest.param({"rope_scaling": {"rope_type": "llama3", "factor": 16.0}}, id="rope scaling factor"),
        pytest.param({"num_key_value_heads": 4}, id="KV heads"),
        pytest.param({"num_hidden_layers": 5}, id="layers"),
        pytest.param({"rms_norm_eps": 1e-6}, id="norm epsilon"),
        pytest.param({"sliding_window": 1024}, id="sliding window"),
        pytest.param({"tie_word_embeddings": True}, id="tied embeddings"),
        pytest.param({"quantization_config": {"quant_method": "fp8"}}, id="quantization"),
        pytest.param({"head_dim": 128}, id="head dimension"),
        pytest.param({"architectures": ["MistralForCausalLM"]}, id="architecture"),
    ],
)
def test_a_number_that_changes_kv_changes_the_fingerprint(change):
    assert fingerprint({**LLAMA, **change}) != fingerprint(LLAMA)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(
            {"transformers_version": "4.40.0", "torch_dtype": "float16", "use_cache": False}, id="bookkeeping"
        ),
        pytest.param({"rope_theta": 500000}, id="an integer for a float"),
        pytest.param({"head_dim": 64}, id="head dimension said, not derived"),
        pytest.param({"tie_word_embeddings": False, "attention_bias": False}, id="defaults said"),
        pytest.param({"quantization_config": None}, id="no quantization said"),
    ],
)
def test_what_does_not_change_kv_does_not_change_the_fingerprint(change):
    assert fingerprint({**LLAMA, **change}) == fingerprint(LLAMA)


def test_the_order_of_keys_does_not_count():
    assert fingerprint(dict(reversed(LLAMA.items()))) == fingerprint(LLAMA)


def test_a_fingerprint_is_32_hex_characters_whatever_the_values_are():
    assert len(config_fingerprint({"path": Path("x"), "set": {2, 1}, "nested": {"tuple": (1, 2.5)}})) == 32


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param(
            {"rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000}},
            id="scaling",
        ),
        pytest.param({}, {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, id="nothing said"),
        pytest.param(
            {"partial_rotary_factor": 0.5},
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            id="partial rotation",
        ),
        pytest.param(
            {"rope_theta": 1000000, "rope_local_base_freq": 10000},
            {"rope_parameters": {"full_attention": {"rope_theta": 1000000}, "sliding_attention": {}}},
            id="one per type of layer",
        ),
        pytest.param(
            {"rope_scaling": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": 32768},
            {
                "rope_parameters": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 32768},
                "max_position_embeddings": 32768,
            },
            id="original length left out",
        ),
    ],
)
def test_old_and_new_way_to_write_rope_give_the_same_facts(old, new):
    assert config_fingerprint(model_facts(old)) == config_fingerprint(model_facts(new))


@pytest.mark.parametrize("raw", [LLAMA, QWEN, GEMMA], ids=["llama", "qwen", "gemma"])
def test_what_transformers_makes_of_an_old_config_has_the_rope_of_the_file(raw, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(raw))
    loaded = model_facts(AutoConfig.from_pretrained(tmp_path).to_dict())
    said = model_facts({**raw, "max_position_embeddings": loaded["max_positions"]})
    assert config_fingerprint({"rope": loaded["rope"]}) == config_fingerprint({"rope": said["rope"]})
    assert loaded.get("sliding_window") == said.get("sliding_window", loaded.get("sliding_window"))


def test_the_language_part_of_a_multimodal_model_counts():
    outer = {"architectures": ["LlavaForConditionalGeneration"], "text_config": {**LLAMA, "architectures": None}}
    facts = model_facts(outer)
    assert facts["architectures"] == ["LlavaForConditionalGeneration"]
    assert facts["layers"] == 4
    assert fingerprint(outer) != fingerprint({**outer, "text_config": {**LLAMA, "num_hidden_layers": 5}})


def random_weights(seed: int, layers: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"embed": (100, 64)} | {f"layers.{n}.w": (64, 64) for n in range(layers)} | {"norm": (64,)}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def save(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """A safetensors file, tensors in the order given."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        raw = tensor.tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def save_sharded(folder: Path, tensors: Mapping[str, np.ndarray], shards: int) -> None:
    names = list(tensors)
    where = {name: f"model-{at % shards + 1:05}-of-{shards:05}.safetensors" for at, name in enumerate(names)}
    for file in set(where.values()):
        save(folder / file, {name: tensors[name] for name in reversed(names) if where[name] == file})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def test_another_seed_is_another_digest(tmp_path):
    save(tmp_path / "a/model.safetensors", random_weights(1))
    save(tmp_path / "b/model.safetensors", random_weights(2))
    assert weights_digest(tmp_path / "a") != weights_digest(tmp_path / "b")


def test_the_same_weights_are_one_digest_however_they_lie_on_disk(tmp_path):
    weights = random_weights(1)
    save(tmp_path / "whole/model.safetensors", weights)
    save(tmp_path / "moved/model.safetensors", dict(reversed(weights.items())))
    save_sharded(tmp_path / "two", weights, 2)
    save_sharded(tmp_path / "five", weights, 5)
    assert len({weights_digest(tmp_path / name) for name in ("whole", "moved", "two", "five")}) == 1


def test_files_that_the_index_does_not_name_do_not_count(tmp_path):
    save_sharded(tmp_path, random_weights(1), 2)
    before = weights_digest(tmp_path)
    save(tmp_path / "consolidated.safetensors", random_weights(1))
    save(tmp_path / "adapter_model.safetensors", random_weights(2))
    assert weights_digest(tmp_path) == before


@pytest.mark.parametrize("name", ["embed", "layers.1.w", "norm"])
def test_a_change_all_over_one_tensor_is_seen(name, tmp_path):
    weights = random_weights(1)
    save(tmp_path / "a/model.safetensors", weights)
    save(tmp_path / "b/model.safetensors", {**weights, name: weights[name] * 1.001})
    assert weights_digest(tmp_path / "a") != weights_digest(tmp_path / "b")


def test_with_very_many_tensors_every_kind_of_them_is_still_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "MAX_SAMPLED_TENSORS", 6)
    weights = {f"experts.{n}": np.full(8, n, np.float32) for n in range(50)} | {"router": np.ones(8, np.float32)}
    save(tmp_path / "a/model.safetensors", weights)
    save(tmp_path / "b/model.safetensors", {**weights, "router": np.zeros(8, np.float32)})
    save_sharded(tmp_path / "c", weights, 3)
    digests = [weights_digest(tmp_path / name) for name in "abc"]
    assert digests[0] != digests[1]
    assert digests[0] == digests[2]


def test_little_is_read_of_large_tensors(tmp_path, monkeypatch):
    read = []
    pread = identity.os.pread

    def counting(handle, length, at):
        read.append(length)
        return pread(handle, length, at)

    save(tmp_path / "model.safetensors", {"big": np.zeros((1024, 1024), np.float32)})
    monkeypatch.setattr(identity.os, "pread", counting)
    weights_digest(tmp_path)
    assert sum(read) == 4 * identity.SAMPLE_BYTES


@pytest.mark.parametrize("file", ["model.gguf", "pytorch_model.bin"])
def test_other_weight_files_are_sampled_as_bytes_wherever_they_lie(file, tmp_path):
    content = np.random.default_rng(1).bytes(1_000_000)
    for folder, data in (("a", content), ("b", content), ("c", content[:-1] + b"!")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_bytes(data)
    assert weights_digest(tmp_path / "a") == weights_digest(tmp_path / "b") != weights_digest(tmp_path / "c")
    assert weights_digest(tmp_path / "a" / file) == weights_digest(tmp_path / "a")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(None, id="no file"),
        pytest.param(b"", id="empty file"),
        pytest.param(b"\xff" * 100, id="not safetensors"),
        pytest.param(struct.pack("<Q", 2) + b"[]" + b"0" * 9, id="header is no object"),
        pytest.param(struct.pack("<Q", 9) + b'{"a": {}}', id="header without offsets"),
        pytest.param(
            struct.pack("<Q", 56) + b'{"a": {"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', id="data cut off"
        ),
    ],
)
def test_weights_that_cannot_be_read_name_the_setting_that_stands_in_for_them(content, tmp_path):
    if content is not None:
        (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match="model_revision_id"):
        weights_digest(tmp_path)


def test_values_as_wide_as_keys_need_not_be_said() -> None:
    """SGLang writes ``v_head_dim`` into every config that it loads, vLLM does not."""
    config = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16}
    assert model_facts({**config, "v_head_dim": 16}) == model_facts(config)
    assert model_facts({**config, "v_head_dim": 32}) != model_facts(config)
