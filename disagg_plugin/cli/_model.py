"""How a model's KV fits the slots, from its ``config.json`` alone."""

from collections.abc import Mapping
from dataclasses import dataclass

from disagg_plugin.config import DisaggSettings
from disagg_plugin.errors import ConfigError
from disagg_plugin.kv.geometry import DTYPE_BYTES, KVGeometry, heads_of_rank

_CACHE_DTYPES = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}  # engines' names
_QUANTIZABLE = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What one rank of an engine moves and registers; ``None``: this cache is never quantized."""

    heads: int
    raw_token_bytes: int
    int8_token_bytes: int | None
    raw_slot_tokens: int
    int8_slot_tokens: int | None
    ring_bytes: int
    regions: int


def geometry_of(config: Mapping[str, object], kv_dtype: str, *, origin: str) -> KVGeometry:
    """Read the shape of the KV cache from a Hugging Face ``config.json``.

    Args:
        kv_dtype: Engine's name of the cache's dtype; ``auto`` takes the model's.
        origin: Name of the file, for messages.

    Raises:
        ConfigError: A number is missing or no positive integer, or the dtype is unknown.
    """
    text = config.get("text_config", config)  # multimodal models keep the decoder's numbers one level down
    if not isinstance(text, Mapping):
        raise ConfigError(f"{origin}: text_config must hold fields and values")

    def number(name: str, default: int | None = None) -> int:
        value = text.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or value <= 0:
            raise ConfigError(f"{origin}: {name} = {value!r}: must be a positive integer (is this a model's config?)")
        return value

    dtype = kv_dtype
    if kv_dtype == "auto":
        dtype = str(text.get("dtype") or text.get("torch_dtype") or config.get("dtype") or "bfloat16")
    dtype = _CACHE_DTYPES.get(dtype.removeprefix("torch."), dtype.removeprefix("torch."))
    if dtype not in DTYPE_BYTES:
        known = ", ".join(["auto", *_CACHE_DTYPES, *DTYPE_BYTES])
        raise ConfigError(f"KV dtype {dtype!r} is unknown: must be one of {known}")
    layers = number("num_hidden_layers")
    if text.get("kv_lora_rank"):  # MLA: one latent vector and one rotary key a token, shared by all heads
        return KVGeometry(layers, 1, number("kv_lora_rank") + number("qk_rope_head_dim"), dtype, sides=1)
    heads = number("num_attention_heads")
    head_dim = number("head_dim", number("hidden_size") // heads if text.get("head_dim") is None else None)
    return KVGeometry(layers, number("num_key_value_heads", heads), head_dim, dtype)


def plan_memory(settings: DisaggSettings, geometry: KVGeometry, tensor_parallel: int) -> MemoryPlan:
    """Compute what one rank of ``tensor_parallel`` needs.

    Raises:
        ConfigError: The heads cannot be split, one token does not fit a slot, or torch is not installed.
    """
    try:
        from disagg_plugin.kv.codec import SectionCodec, section_bytes
        from disagg_plugin.kv.wire import require_one_token, tokens_per_slot
    except ModuleNotFoundError as error:
        raise ConfigError(f"--model-config needs {error.name}: run this in the engine's environment") from None
    heads = 1 if geometry.sides == 1 else _heads(geometry, tensor_parallel)
    head_dim, dtype = geometry.head_dim, geometry.dtype
    sections = geometry.layers * geometry.sides
    slot_bytes = settings.transfer.slot_bytes
    require_one_token(slot_bytes, sections=sections, heads=heads, head_dim=head_dim, dtype=dtype)

    def slot_tokens(codec: SectionCodec) -> int:
        return tokens_per_slot(slot_bytes, (codec,) * sections, heads=heads, head_dim=head_dim, dtype=dtype)

    quantized = dtype in _QUANTIZABLE
    int8_bytes = sections * section_bytes(SectionCodec.INT8, heads=heads, tokens=1, head_dim=head_dim, dtype=dtype)
    slots = settings.transfer.ring_max_bytes // slot_bytes
    return MemoryPlan(
        heads=heads,
        raw_token_bytes=geometry.raw_token_bytes(heads),
        int8_token_bytes=int8_bytes if quantized else None,
        raw_slot_tokens=slot_tokens(SectionCodec.RAW),
        int8_slot_tokens=slot_tokens(SectionCodec.INT8) if quantized else None,
        ring_bytes=slots * slot_bytes,
        regions=slots // settings.transfer.region_slots,
    )


def _heads(geometry: KVGeometry, tensor_parallel: int) -> int:
    try:
        return heads_of_rank(geometry.kv_heads, 0, tensor_parallel).count
    except ValueError as error:
        raise ConfigError(f"--tp {tensor_parallel}: {error}") from None
