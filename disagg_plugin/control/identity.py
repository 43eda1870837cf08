"""What makes two models one model: a fingerprint of the architecture's numbers, and a digest of the weights.

Both are the same whichever engine computes them, however it splits the model, and wherever the files lie. Two
fine-tunes have one config, so the fingerprint alone would mix their KV; two rope scalings have one set of weights, so
the digest alone would.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from disagg_plugin.errors import ConfigError

# first name that is there wins: families name the same number differently
_ALIASES: dict[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num", "num_attention_groups"),
    "head_dim": ("head_dim",),
    "norm_eps": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "activation": ("hidden_act", "hidden_activation", "activation_function"),
    "max_positions": ("max_position_embeddings", "n_positions"),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "experts_per_token": ("num_experts_per_tok", "num_experts_per_token", "moe_topk"),
}
# taken under their own name; absent, null and false are the same
_PLAIN = (
    "architectures", "model_type", "vocab_size", "layer_types", "tie_word_embeddings",
    "attention_bias", "mlp_bias", "qkv_bias", "use_qk_norm", "qk_layernorm", "clip_qkv",
    "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "attention_multiplier",
    "embedding_multiplier", "residual_multiplier", "logits_scaling", "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx", "use_bidirectional_attention", "attention_chunk_size", "no_rope_layers",
    "no_rope_layer_interval", "attn_temperature_tuning", "floor_scale", "attn_scale", "alibi", "parallel_attn",
    "use_parallel_residual", "moe_intermediate_size", "n_shared_experts", "n_group", "topk_group", "scoring_func",
    "norm_topk_prob", "routed_scaling_factor", "first_k_dense_replace", "decoder_sparse_step", "mlp_only_layers",
    "kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim",
    "linear_num_key_heads", "linear_num_value_heads", "full_attention_interval",
)  # fmt: skip
_NEEDS_ORIGINAL_LENGTH = frozenset({"dynamic", "yarn", "longrope", "llama3"})

SAMPLE_BYTES = 1024
MAX_SAMPLED_TENSORS = 8192  # with 4 samples each: 32 MiB
_MAX_HEADER_BYTES = 100 << 20  # the safetensors format's own limit
_ADVICE = "set model_revision_id in the disagg config instead"


def config_fingerprint(facts: Mapping[str, object]) -> str:
    """32 hex characters over ``facts``; the order of keys, and 10000 against 10000.0, make no difference."""
    text = json.dumps(plain_json(facts), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def model_facts(hf_config: Mapping[str, object]) -> dict[str, object]:
    """The numbers of a Hugging Face config that decide what KV a prompt has.

    Args:
        hf_config: The config as a dictionary, overrides applied. Of a multimodal model the language part counts.
            ``rope_parameters`` (transformers 5) and ``rope_theta`` with ``rope_scaling`` give the same facts.
    """
    text = hf_config.get("text_config")
    config = {**hf_config, **_without_none(text)} if isinstance(text, Mapping) else dict(hf_config)
    if isinstance(text, Mapping) and hf_config.get("architectures"):
        config["architectures"] = hf_config["architectures"]  # the text part names none, or its own
    facts: dict[str, object] = {name: config[name] for name in _PLAIN if config.get(name)}
    for name, aliases in _ALIASES.items():
        value = next((config[alias] for alias in aliases if config.get(alias) is not None), None)
        if value is not None:
            facts[name] = value
    hidden, heads = facts.get("hidden_size"), facts.get("heads")
    if isinstance(heads, int) and heads > 0:
        facts.setdefault("kv_heads", heads)
        if isinstance(hidden, int):
            facts.setdefault("head_dim", hidden // heads)
    if facts.get("v_head_dim") == facts.get("head_dim"):
        facts.pop("v_head_dim", None)  # the same as not given; SGLang writes it into every config that it loads
    if config.get("sliding_window") and config.get("use_sliding_window") is not False:
        facts["sliding_window"] = config["sliding_window"]
    if isinstance(quantization := config.get("quantization_config"), Mapping) and quantization:
        facts["quantization"] = _without_none(quantization)
    facts["rope"] = _rope(config)
    return facts


def weights_digest(model_dir: Path, *, samples_per_tensor: int = 4) -> str:
    """32 hex characters over what the weight files hold, without reading them whole.

    Of safetensors: name, dtype and shape of every tensor, and ``samples_per_tensor`` pieces of 1 KiB at fixed
    relative offsets of each, keyed by tensor name. How tensors are spread over files, in which order, and where
    the files lie makes no difference. With more than 8192 tensors the samples go to a fixed choice that covers
    every kind of tensor (experts count as one kind). GGUF and ``.bin`` files are sampled as plain bytes, so there
    another split is another digest.

    Args:
        model_dir: A model's directory, or one weight file (GGUF).

    Raises:
        ConfigError: There are no weight files, or they cannot be read.
    """
    try:
        files = _weight_files(model_dir)
        if not files:
            raise ConfigError(f"no weight files in {model_dir} to tell this model from another: {_ADVICE}")
        if files[0].suffix == ".safetensors":
            return safetensors_digest(files, samples_per_tensor)
        return _plain_files_digest(files)
    except (OSError, ValueError) as error:
        raise ConfigError(f"weight files in {model_dir} cannot be read ({error}): {_ADVICE}") from error


def local_model_path(model: str, revision: str | None = None, cache_dir: str | None = None) -> Path:
    """Where the weights of ``model`` lie: a directory, a file, or a Hugging Face id that was downloaded before.

    Raises:
        ConfigError: Not on this machine.
    """
    if (path := Path(model)).exists():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(model, revision=revision, cache_dir=cache_dir, local_files_only=True))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        raise ConfigError(
            f"weights of {model} are not on this machine: set model_revision_id in the disagg config instead"
        ) from error


class _Tensor(NamedTuple):
    """One tensor of a safetensors file; sorts by name."""

    name: str
    dtype: str
    shape: str
    path: Path
    begin: int
    end: int


def plain_json(value: object) -> object:
    """``value`` as plain JSON: integral floats are integers, sets are sorted, what is left is text."""
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((plain_json(item) for item in value), key=str)
    if isinstance(value, (list, tuple)):
        return [plain_json(item) for item in value]
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    return value if isinstance(value, (str, int)) or value is None else str(value)


def _without_none(config: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in config.items() if value is not None}


def _rope(config: Mapping[str, object]) -> dict[str, object]:
    """Rotary embedding in one form: flat, or per type of layer where the model has several."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    given = given if isinstance(given, Mapping) else {}
    per_type = {str(name): part for name, part in given.items() if isinstance(part, Mapping)}
    local_theta = config.get("rope_local_base_freq")
    if not per_type and local_theta is not None:  # Gemma 3 before transformers 5
        per_type = {"full_attention": given, "sliding_attention": {"rope_theta": local_theta}}
    if per_type:
        return {name: _one_rope(part, config) for name, part in per_type.items()}
    return _one_rope(given, config)


def _one_rope(given: Mapping[str, object], config: Mapping[str, object]) -> dict[str, object]:
    rope = _without_none(given)
    old_kind = rope.pop("type", None)
    kind = rope.setdefault("rope_type", old_kind or "default")
    if kind == "su":
        kind = rope["rope_type"] = "longrope"
    rope.setdefault("rope_theta", config.get("rope_theta") or config.get("rotary_emb_base") or 10000)
    rope.setdefault("partial_rotary_factor", config.get("partial_rotary_factor") or config.get("rotary_pct") or 1)
    length = config.get("original_max_position_embeddings") or config.get("max_position_embeddings")
    if kind in _NEEDS_ORIGINAL_LENGTH and length is not None:
        rope.setdefault("original_max_position_embeddings", length)
    return rope


def _weight_files(model: Path) -> list[Path]:
    """The files that an engine would load: what the index names, else all of the best format that is there."""
    if model.is_file():
        return [model]
    index = model / "model.safetensors.index.json"
    if index.is_file():
        return [model / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    if (whole := model / "model.safetensors").is_file():
        return [whole]
    for pattern in ("model*.safetensors", "*.safetensors", "*.gguf", "*.bin", "*.pt", "*.pth"):
        found = sorted(path for path in model.glob(pattern) if not path.name.startswith(("adapter", "training_args")))
        if found:
            return found
    return []


def _read_header(path: Path) -> list[_Tensor]:
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, path.stat().st_size - 8):
            raise ValueError(f"{path.name} is not a safetensors file")
        header = json.loads(file.read(header_bytes))
    start = 8 + header_bytes
    try:
        return [
            _Tensor(name, tensor["dtype"], str(tensor["shape"]), path, *(start + at for at in tensor["data_offsets"]))
            for name, tensor in header.items()
            if name != "__metadata__"
        ]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path.name} has a malformed header") from error


def _choose_sampled(tensors: Iterable[_Tensor]) -> set[str]:
    """Names to sample: in turn one of each kind (names alike but for their numbers), until there are enough."""
    seen: dict[str, int] = {}
    turns = []
    for tensor in tensors:
        kind = re.sub(r"\d+", "#", tensor.name)
        turns.append((seen.get(kind, 0), tensor.name))
        seen[kind] = seen.get(kind, 0) + 1
    return {name for _, name in sorted(turns)[:MAX_SAMPLED_TENSORS]}


def safetensors_digest(files: list[Path], samples_per_tensor: int) -> str:
    """Of names, dtypes, shapes and samples of all tensors, in the order of their names."""
    tensors = sorted(tensor for path in files for tensor in _read_header(path))
    sampled = _choose_sampled(tensors)
    digest = hashlib.sha256()
    by_place = sorted((tensor for tensor in tensors if tensor.name in sampled), key=lambda t: (t.path, t.begin))
    samples = {}
    handles: dict[Path, int] = {}
    try:
        for tensor in by_place:  # in the order of the disk; hashed below in the order of the names
            if tensor.path not in handles:
                handles[tensor.path] = os.open(tensor.path, os.O_RDONLY)
            samples[tensor.name] = _samples(handles[tensor.path], tensor.begin, tensor.end, samples_per_tensor)
    finally:
        for handle in handles.values():
            os.close(handle)
    for tensor in tensors:
        digest.update(f"{tensor.name}\0{tensor.dtype}\0{tensor.shape}\0".encode())
        digest.update(samples.get(tensor.name, b""))
    return digest.hexdigest()[:32]


def _plain_files_digest(files: list[Path], samples_per_file: int = 256) -> str:
    parts = []
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        try:
            size = os.fstat(handle).st_size
            content = hashlib.sha256(_samples(handle, 0, size, samples_per_file)).hexdigest()
        finally:
            os.close(handle)
        parts.append(f"{size}:{content}")
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()[:32]


def _samples(handle: int, begin: int, end: int, count: int) -> bytes:
    """``count`` pieces spread evenly over ``[begin, end)``, first and last bytes included; all of it if it is short.

    Raises:
        ValueError: The file ends before ``end``.
    """
    size = end - begin
    if size <= count * SAMPLE_BYTES:
        places = [(begin, size)]
    else:
        last = size - SAMPLE_BYTES
        places = [(begin + last * at // max(count - 1, 1), SAMPLE_BYTES) for at in range(count)]
    pieces = [os.pread(handle, length, at) for at, length in places]
    if any(len(piece) != length for piece, (_, length) in zip(pieces, places, strict=True)):
        raise ValueError("a file is shorter than its header says")
    return b"".join(pieces)
