"""SGLang's prefix cache as a place for KV that this engine did not compute: from other engines, or from LMCache.

Pages are taken for what a prompt lacks, filled by whoever has it, and given to the radix tree, where SGLang finds them
like anything else it holds.
"""

import inspect
from array import array
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.common import evict_from_tree_cache
from sglang.srt.mem_cache.radix_cache import RadixKey

from disagg_plugin.control.prompt_export import ExportedPrompt
from disagg_plugin.errors import ConfigError

# what is called of SGLang's prefix cache, with so many arguments: it has several implementations
_TREE_CALLS = {"match_prefix": 1, "insert": 1, "lock": 1, "unlock": 1, "path_device_indices": 1, "evictable_size": 0}


@dataclass(slots=True, eq=False)
class Reserved:
    """Pages for a prompt's first tokens: some that the tree holds, locked, and new ones behind them."""

    key: Any
    prefix_slots: torch.Tensor
    new_slots: torch.Tensor
    pages: tuple[int, ...]
    lock: Any

    @property
    def cached_tokens(self) -> int:
        return len(self.prefix_slots)


class TreePages:
    """The radix tree and the page allocator of one scheduler; its thread."""

    def __init__(self, scheduler: Any) -> None:
        """
        Raises:
            ConfigError: The engine's prefix cache has not the calls that are needed.
        """
        self._tree = scheduler.tree_cache
        self._allocator = scheduler.token_to_kv_pool_allocator
        self.page_tokens = int(self._allocator.page_size)
        for name, arguments in _TREE_CALLS.items():
            try:
                inspect.signature(getattr(self._tree, name)).bind(*[None] * arguments)
            except (AttributeError, TypeError) as error:
                kind = type(self._tree).__name__
                raise ConfigError(f"disagg does not fit SGLang's prefix cache {kind}: {error}") from None

    def free_tokens(self) -> int:
        """Room for so many, what can be evicted included."""
        return int(self._allocator.available_size() + self._tree.evictable_size())

    def match_key(self, key: Any) -> tuple[int, Any]:
        """(tokens of ``key`` that the tree holds, the node where they end)."""
        result = self._tree.match_prefix(MatchPrefixParams(key=key.page_aligned(self.page_tokens)))
        return int(result.device_prefix_len), result.last_device_node

    def reserve_key(self, key: Any, matched: tuple[int, Any], end: int) -> Reserved | None:
        """Pages for the first ``end`` tokens of ``key``, which ``matched`` just now; None: there are not so many."""
        cached, node = matched
        lock = self._tree.lock(node)
        prefix_slots = self._tree.path_device_indices(node)[:cached].clone()
        needed = -(-max(end - cached, 0) // self.page_tokens) * self.page_tokens
        evict_from_tree_cache(self._tree, needed)
        new_slots = self._allocator.alloc(needed)
        if new_slots is None:
            self._tree.unlock(lock)
            return None
        slots = torch.cat([prefix_slots, new_slots])
        pages = tuple((slots[:: self.page_tokens] // self.page_tokens).tolist())
        return Reserved(key, prefix_slots, new_slots, pages, lock)

    def publish(self, reserved: Reserved, tokens: int) -> bool:
        """Give the first ``tokens`` to the tree, which goes on holding them locked, and the other new pages back.

        Returns:
            Whether the tree holds more than before.
        """
        cached = reserved.cached_tokens
        if tokens > cached:
            slots = torch.cat([reserved.prefix_slots, reserved.new_slots])[:tokens].to(torch.int64)
            params = InsertParams(key=reserved.key[:tokens], value=slots, prev_prefix_len=cached)
            lock = self._tree.lock(self._tree.insert(params).last_device_node)
            self._tree.unlock(reserved.lock)
            reserved.lock = lock
        left = reserved.new_slots[max(tokens - cached, 0) :]
        if len(left):
            self._allocator.free(left)
        return tokens > cached

    def cancel(self, reserved: Reserved) -> None:
        """Nothing of it is used: new pages are free, the lock ends."""
        if len(reserved.new_slots):
            self._allocator.free(reserved.new_slots)
        self.unlock(reserved)

    def unlock(self, reserved: Reserved) -> None:
        """What the tree holds of it may be evicted."""
        self._tree.unlock(reserved.lock)


class ExportedPrefixes:
    """``prefix_tier.PrefixCache`` over ``TreePages``, for a prefill server's prompts."""

    def __init__(self, pages: TreePages) -> None:
        self._pages = pages

    def cached_tokens(self, prompt: ExportedPrompt) -> int:
        """See ``PrefixCache``."""
        return self._pages.match_key(_key(prompt))[0]

    def reserve(self, prompt: ExportedPrompt, end: int) -> Reserved | None:
        """See ``PrefixCache``."""
        key = _key(prompt)
        return self._pages.reserve_key(key, self._pages.match_key(key), end)

    def publish(self, room: Reserved, end: int) -> None:
        """See ``PrefixCache``. Not locked: the request is queued in this turn; evicted before, it is computed."""
        self._pages.publish(room, end)
        self._pages.unlock(room)

    def cancel(self, room: Reserved) -> None:
        """See ``PrefixCache``."""
        self._pages.cancel(room)


def key_of(req: Any, tokens: int) -> Any:
    """The tree's key of a request's first tokens."""
    return RadixKey(req.origin_input_ids[:tokens], req.extra_key, cache_salt=req.cache_salt)


def _key(prompt: ExportedPrompt) -> Any:
    return RadixKey(array("q", prompt.prompt[:-1]), None, cache_salt=prompt.cache_salt or None)
