"""Canonical KV as LMCache's objects, one tensor a chunk of tokens; and under which names it is kept.

An object is ``[2, layers, tokens, heads * head_dim]``, keys first (``[layers, tokens, head_dim]`` for MLA), in the
cache's own dtype: bit by bit what stands in the engine's pages. Copies are generators that move one layer's side a
step, so that whoever runs them in an engine's thread can stop in time.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from disagg_plugin.control.messages import ModelIdentity
from disagg_plugin.kv.geometry import KVGeometry

LAYOUT = 1  # of an object's content; another one must never be found under the same name
HASHED = "sha256-"
_FORBIDDEN = frozenset("@/\\\x00")
_MAX_SALT = 128


class PagedKV(Protocol):
    """The part of an engine's ``KVCacheView`` that is needed here."""

    geometry: KVGeometry
    block_size: int  # tokens

    def gather(self, layer: int, side: int, block_ids: Sequence[int], start: int, end: int) -> torch.Tensor: ...
    def scatter(
        self, layer: int, side: int, block_ids: Sequence[int], start: int, end: int, kv: torch.Tensor
    ) -> None: ...


def namespace_of(model: ModelIdentity, geometry: KVGeometry) -> str:
    """LMCache's model name for KV of exactly these weights in this layout: whoever differs finds nothing."""
    facts = {
        "layout": LAYOUT,
        "config": model.config_fingerprint,
        "weights": model.weights_digest,
        "kv": [geometry.layers, geometry.sides, geometry.kv_heads, geometry.head_dim, geometry.dtype],
    }
    return "disagg-" + hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def store_salt(cache_salt: str) -> str:
    """A request's salt as LMCache accepts it: equal only for equal salts, and none for none."""
    plain = len(cache_salt) <= _MAX_SALT and not _FORBIDDEN & set(cache_salt) and cache_salt.isascii()
    if plain and not cache_salt.startswith(HASHED):
        return cache_salt
    return HASHED + hashlib.sha256(cache_salt.encode("utf-8", "surrogatepass")).hexdigest()


def chunk_shape(geometry: KVGeometry, tokens: int) -> tuple[int, ...]:
    """Of one object."""
    shape = (geometry.layers, tokens, geometry.kv_heads * geometry.head_dim)
    return shape if geometry.sides == 1 else (geometry.sides, *shape)


def new_chunk(geometry: KVGeometry, tokens: int) -> torch.Tensor:
    """An object's memory, not initialized."""
    return torch.empty(chunk_shape(geometry, tokens), dtype=getattr(torch, geometry.dtype))


def fits(chunk: torch.Tensor, geometry: KVGeometry, tokens: int) -> bool:
    """Whether this can be an object of ours."""
    return tuple(chunk.shape) == chunk_shape(geometry, tokens) and chunk.dtype == getattr(torch, geometry.dtype)


def gather_steps(view: PagedKV, pages: Sequence[int], start: int, chunk: torch.Tensor) -> Iterator[None]:
    """Copy the tokens from ``start`` on out of their pages, as many as ``chunk`` has room for."""
    for layer, side, rows in _rows(view.geometry, chunk):
        kv = view.gather(layer, side, pages, start, start + rows.shape[0])
        rows.copy_(kv.transpose(0, 1).reshape(rows.shape))
        yield


def scatter_steps(
    view: PagedKV, pages: Sequence[int], chunk: torch.Tensor, chunk_start: int, start: int, end: int
) -> Iterator[None]:
    """Copy tokens ``[start, end)`` into their pages from an object whose first token is ``chunk_start``."""
    geometry = view.geometry
    for layer, side, rows in _rows(geometry, chunk):
        part = rows[start - chunk_start : end - chunk_start]
        kv = part.reshape(end - start, geometry.kv_heads, geometry.head_dim).transpose(0, 1)
        view.scatter(layer, side, pages, start, end, kv)
        yield


def _rows(geometry: KVGeometry, chunk: torch.Tensor) -> Iterator[tuple[int, int, torch.Tensor]]:
    sides = chunk.unsqueeze(0) if geometry.sides == 1 else chunk
    for layer in range(geometry.layers):
        for side in range(geometry.sides):
            yield layer, side, sides[side, layer]
