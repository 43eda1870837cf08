"""LoRA adapters go by name, so their weights are compared too: two engines may know different ones under one name."""

import hashlib
import json
from pathlib import Path

from disagg_plugin.control.identity import plain_json, safetensors_digest
from disagg_plugin.errors import ConfigError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# what of the config changes the KV; the rest is where it was trained and how
_SHAPES_KV = (
    *("peft_type", "r", "lora_alpha", "target_modules", "use_rslora", "use_dora", "bias", "alpha_pattern"),
    *("rank_pattern", "layers_to_transform", "layers_pattern", "modules_to_save", "fan_in_fan_out"),
)
SAMPLES_PER_TENSOR = 4


class AdapterDigests:
    """Digests of adapters, each read once as long as its files stay the same; for the I/O thread."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, int], str] = {}

    def of(self, folder: str) -> str:
        """32 hex characters; see ``adapter_digest``.

        Raises:
            ConfigError: There is no adapter in ``folder``, or not one that we can read.
        """
        try:
            found = (Path(folder) / WEIGHTS).stat()
            key = (folder, found.st_mtime_ns, found.st_size)
            if key not in self._known:
                self._known[key] = adapter_digest(Path(folder))
        except (OSError, ValueError) as error:
            raise ConfigError(f"no readable adapter in {folder} ({error})") from error
        return self._known[key]


def adapter_digest(folder: Path) -> str:
    """32 hex characters over an adapter's tensors (headers and samples) and what of its config shapes KV.

    Raises:
        OSError, ValueError: It cannot be read.
    """
    config = json.loads((folder / CONFIG).read_text())
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIG} holds no fields")
    shaping = {name: config[name] for name in _SHAPES_KV if config.get(name)}
    if isinstance(modules := shaping.get("target_modules"), list):
        shaping["target_modules"] = sorted(map(str, modules))
    text = json.dumps(plain_json(shaping), sort_keys=True)
    weights = safetensors_digest([folder / WEIGHTS], SAMPLES_PER_TENSOR)
    return hashlib.sha256(f"{text}\n{weights}".encode()).hexdigest()[:32]
