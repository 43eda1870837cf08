"""Which prefixes the engine probably holds: those of the prompts that went through this API server lately.

The engine's own index lives in another process. As long as it is not full, what was sent there is still there; the
least recently used prefixes are forgotten at the size of its cache. A wrong entry costs an estimate, nothing else.
"""

from collections import OrderedDict
from collections.abc import Sequence

from disagg_plugin.serving.prefix_hash import CHUNK_TOKENS, prefix_hashes


class PrefixMemory:
    """Chunk hashes in the order of their last use."""

    def __init__(self) -> None:
        self._chunks: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._chunks)

    def hashes(self, token_ids: Sequence[int], *, salt: str = "", lora: str = "") -> list[int]:
        """Of a prompt, for the two calls below."""
        return prefix_hashes(token_ids, salt=salt, lora=lora)

    def cached_tokens(self, hashes: Sequence[int]) -> int:
        """Leading tokens of the prompt that are remembered."""
        chunks = 0
        for chunk in hashes:
            if chunk not in self._chunks:
                break
            chunks += 1
        return chunks * CHUNK_TOKENS

    def remember(self, hashes: Sequence[int], capacity_tokens: int) -> None:
        """The prompt was sent to an engine with room for so many tokens."""
        for chunk in hashes:
            self._chunks[chunk] = None
            self._chunks.move_to_end(chunk)
        while len(self._chunks) > max(1, capacity_tokens // CHUNK_TOKENS):
            self._chunks.popitem(last=False)
