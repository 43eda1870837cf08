"""A prefill engine of plain tensors around ``PrefixTier``: prompts, pages and a prefix cache without an engine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Event

import torch

from disagg_lmcache.prefix_store import PrefixStore
from disagg_lmcache.prefix_tier import PrefixTier
from disagg_plugin.control.prompt_export import ExportedPrompt
from disagg_plugin.kv.geometry import KVGeometry
from disagg_plugin.testing import DenseView

GEOMETRY = KVGeometry(layers=2, kv_heads=2, head_dim=8, dtype="bfloat16")
PAGE = 16
PAGES = 64
PATIENCE_S = 30.0


@dataclass
class Prompt:
    """An ``ExportedPrompt``."""

    rid: str
    prompt: list[int]
    cache_salt: str = ""
    reusable: bool = True
    bootstrap_room: int = 0
    priority: int = 0
    pages: tuple[int, ...] = ()
    tokens: int = 0
    holding: bool = False


@dataclass
class Room:
    pages: tuple[int, ...]
    cached_tokens: int
    tokens: tuple[int, ...]


@dataclass
class Pages:
    """A prefix cache of whole prompts, and who has which page."""

    free: list[int] = field(default_factory=lambda: list(range(1, PAGES)))
    held: dict[tuple[int, ...], tuple[int, ...]] = field(default_factory=dict)

    def match(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """The pages of what it holds of these tokens."""
        found: tuple[int, ...] = ()
        for held, pages in self.held.items():
            same = next((at for at, (a, b) in enumerate(zip(held, tokens, strict=False)) if a != b), len(held))
            found = max(found, pages[: min(same, len(tokens)) // PAGE], key=len)
        return found

    def cached_tokens(self, prompt: ExportedPrompt) -> int:
        return len(self.match(prompt.prompt[:-1])) * PAGE

    def reserve(self, prompt: ExportedPrompt, end: int) -> Room | None:
        cached = self.match(prompt.prompt[:end])
        count = end // PAGE - len(cached)
        if count > len(self.free):
            return None
        taken, self.free = self.free[:count], self.free[count:]
        return Room((*cached, *taken), len(cached) * PAGE, tuple(prompt.prompt[:end]))

    def publish(self, room: Room, end: int) -> None:
        self.held[room.tokens[:end]] = room.pages

    def cancel(self, room: Room) -> None:
        self.free += room.pages[room.cached_tokens // PAGE :]

    def flush(self) -> None:
        self.free, self.held = list(range(1, PAGES)), {}


class Engine:
    """One prefill engine: what it computes is noise that depends on the prompt's seed alone."""

    def __init__(self, store: PrefixStore) -> None:
        self.view = DenseView(GEOMETRY, blocks=PAGES, block_size=PAGE)
        self.cache = Pages()
        self.tier: PrefixTier[Room] = PrefixTier(store, self.view, self.cache)
        self.store = store

    def wait(self, condition: Callable[[], bool]) -> None:
        """Turn until it holds."""
        for _ in range(int(PATIENCE_S / 0.002)):
            if condition():
                return
            self.tier.step(0.0)
            Event().wait(0.002)
        raise AssertionError(f"not within {PATIENCE_S} s: {self.tier.figures()}")

    def serve(self, prompt: Prompt, *, seed: int, step_tokens: int = 80) -> int:
        """A whole prompt; how many of its tokens were computed."""
        self.wait(lambda: not self.tier.loading(prompt))
        computed = self.compute(prompt, seed=seed, step_tokens=step_tokens)
        self.wait(lambda: not self.tier.reading(prompt))
        self.tier.gone(prompt)
        return computed

    def compute(self, prompt: Prompt, *, seed: int, step_tokens: int) -> int:
        cached = self.cache.match(prompt.prompt[:-1])
        count = -(-len(prompt.prompt) // PAGE) - len(cached)
        pages = (*cached, *self.cache.free[:count])
        self.cache.free = self.cache.free[count:]
        fresh = DenseView(GEOMETRY, blocks=PAGES, block_size=PAGE)
        fresh.fill(pages, seed, tokens=len(prompt.prompt))
        first = at = len(cached) * PAGE
        while at < len(prompt.prompt):
            upto = min(at + step_tokens, len(prompt.prompt))
            for layer in range(GEOMETRY.layers):
                for side in range(GEOMETRY.sides):
                    kv = fresh.gather(layer, side, pages, at, upto)
                    self.view.scatter(layer, side, pages, at, upto, kv)
            at = upto
            prompt.pages, prompt.tokens = pages, upto
            self.tier.computed(prompt)
            self.tier.step(0.0)
        whole = len(prompt.prompt) // PAGE
        self.cache.held[tuple(prompt.prompt[: whole * PAGE])] = pages[:whole]
        self.cache.free += pages[whole:]
        return len(prompt.prompt) - first

    def kv_of(self, prompt: Sequence[int]) -> torch.Tensor:
        """What the engine's cache holds of it."""
        pages = self.cache.match(prompt)
        return self.view.read(pages, 0, len(pages) * PAGE)

    def stored(self, chunks: int) -> bool:
        return int(self.totals.get("stored_chunks", 0)) >= chunks

    @property
    def totals(self) -> dict[str, int]:
        totals = self.tier.figures()["totals"]
        assert isinstance(totals, dict)
        return totals


def expected_kv(prompt: Sequence[int], *, seed: int, tokens: int) -> torch.Tensor:
    """What an engine computes of it."""
    pages = range(1, 1 + -(-tokens // PAGE))
    view = DenseView(GEOMETRY, blocks=PAGES, block_size=PAGE)
    view.fill(list(pages), seed, tokens=len(prompt[:tokens]))
    return view.read(list(pages), 0, tokens)
