"""What model an SGLang engine runs, in the terms that vLLM's connector uses too."""

from typing import Any

from disagg_plugin.config import DisaggSettings
from disagg_plugin.control.identity import config_fingerprint, local_model_path, model_facts, weights_digest
from disagg_plugin.control.messages import ModelIdentity


def model_identity(model_config: Any, args: Any, settings: DisaggSettings) -> ModelIdentity:
    """Identity of the engine's model, overrides included.

    Args:
        args: The server's resolved arguments.

    Raises:
        ConfigError: The weight files cannot be found or read, and no ``model_revision_id`` stands in for them.
    """
    facts = model_facts(model_config.hf_config.to_dict())
    if "quantization" not in facts and model_config.quantization:
        facts["quantization"] = {"at_load": str(model_config.quantization)}
    return ModelIdentity(
        config_fingerprint=config_fingerprint(facts),
        weights_digest=settings.model_revision_id or _digest(model_config, args),
        served_name=str(args.served_model_name or model_config.model_path),
    )


def _digest(model_config: Any, args: Any) -> str:
    if str(args.load_format) == "dummy":
        return f"dummy-tp{args.tp_size}"
    return weights_digest(local_model_path(model_config.model_path, model_config.revision, args.download_dir))
