"""KV whose every byte follows from the prompt: any engine can compute it, and check it."""

import numpy as np
import torch

from disagg_plugin.kv.geometry import KVGeometry

SEEDS = np.uint64(0x9E3779B97F4A7C15)


def kv_of(tokens: np.ndarray, start: int, geometry: KVGeometry) -> torch.Tensor:
    """``[layers, sides, heads, tokens, head_dim]`` of ``tokens``, the first of which is at position ``start``."""
    sections = geometry.layers * geometry.sides
    positions = np.arange(start, start + len(tokens), dtype=np.uint64)
    token = (tokens.astype(np.uint64) * SEEDS + positions * np.uint64(0xC2B2AE3D27D4EB4F))[None, None, :, None]
    section = np.arange(1, sections + 1, dtype=np.uint64)[:, None, None, None] * np.uint64(0x165667B19E3779F9)
    head = np.arange(1, geometry.kv_heads + 1, dtype=np.uint64)[None, :, None, None] * np.uint64(0x27D4EB2F165667C5)
    dim = np.arange(geometry.head_dim, dtype=np.uint64)[None, None, None, :] * np.uint64(0x85EBCA77C2B2AE63)
    mixed = token ^ section ^ head
    mixed = (mixed + dim) * SEEDS
    values = ((mixed >> np.uint64(56)).astype(np.int16) - 128).astype(np.float32)  # 8 bits: exact in bfloat16
    kv = torch.from_numpy(values).to(getattr(torch, geometry.dtype))
    return kv.unflatten(0, (geometry.layers, geometry.sides))


def prompt_of(seed: int, tokens: int) -> np.ndarray:
    """Token ids of a prompt."""
    return np.random.default_rng(seed).integers(10, 30_000, tokens)
