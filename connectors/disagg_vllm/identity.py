"""What model a vLLM engine runs, in terms that no engine owns."""

from typing import Any

from disagg_plugin.config import DisaggSettings
from disagg_plugin.control.identity import config_fingerprint, local_model_path, model_facts, weights_digest
from disagg_plugin.control.messages import ModelIdentity


def model_identity(vllm_config: Any, settings: DisaggSettings) -> ModelIdentity:
    """Identity of the engine's model, overrides included.

    The dtype of the computation is not part of it: KV of float caches may be exchanged between dtypes.

    Raises:
        ConfigError: The weight files cannot be found or read, and no ``model_revision_id`` stands in for them.
    """
    model = vllm_config.model_config
    facts = model_facts(model.hf_config.to_dict())
    if "quantization" not in facts and getattr(model, "quantization", None):
        facts["quantization"] = {"at_load": str(model.quantization)}  # by a flag: the checkpoint does not say so
    name = model.served_model_name or model.model
    return ModelIdentity(
        config_fingerprint=config_fingerprint(facts),
        weights_digest=settings.model_revision_id or _digest(vllm_config),
        served_name=str(name[0] if isinstance(name, (list, tuple)) else name),
    )


def _digest(vllm_config: Any) -> str:
    model, load = vllm_config.model_config, vllm_config.load_config
    if str(load.load_format) == "dummy":  # random, but the same for one way to split the model
        return f"dummy-tp{vllm_config.parallel_config.tensor_parallel_size}"
    weights = getattr(model, "model_weights", "") or model.model
    return weights_digest(local_model_path(weights, model.revision, load.download_dir))
