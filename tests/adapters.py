"""LoRA adapters of the tiny model, of random weights."""

import json
from pathlib import Path

RANK = 8
HIDDEN, QUERY, KEY_VALUE, LAYERS = 256, 256, 128, 4


def tiny_adapter(folder: Path, *, seed: int) -> Path:
    """A folder as PEFT writes it; the same seed gives the same bytes."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        for name, out in (("q_proj", QUERY), ("k_proj", KEY_VALUE), ("v_proj", KEY_VALUE)):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, HIDDEN, generator=generator) / 16
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) / 4
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": ["k_proj", "q_proj", "v_proj"],
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
