"""Canonical KV out of a cache, encoded, into the memory of a slot: what a chunk consists of. Engine's thread.

**Chunk size.** A section's codec is known only once it is encoded: the guard, or a value that INT8 cannot hold, may
step up to RAW. So a chunk is sized by the codecs that its sections had last time (RAW before the first time). If that
overflows the slot, it is staged once more with the number of tokens for all RAW, which cannot overflow.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor, empty, uint8

from disagg_plugin.kv.codec import KVCodec, SectionCodec, section_bytes
from disagg_plugin.kv.geometry import HeadRange, KVGeometry
from disagg_plugin.kv.guard import Demotion, QuantizationGuard
from disagg_plugin.kv.wire import padded, payload_offset, tokens_per_slot
from disagg_plugin.observability.ranges import profile_range


class Source(Protocol):
    """Where canonical KV comes from: the part of ``KVCacheView`` that sending needs."""

    geometry: KVGeometry
    heads: HeadRange

    def gather(self, layer: int, side: int, block_ids: Sequence[int], start: int, end: int) -> Tensor: ...


class ChunkEncoder:
    """Gathers the sections of a chunk, chooses a codec for each, and writes them into a slot; engine's thread."""

    def __init__(self, source: Source, codec: KVCodec, guard_for: Callable[[SectionCodec], QuantizationGuard]) -> None:
        self._source = source
        self._codec = codec
        self._guard_for = guard_for
        self._guards: dict[SectionCodec, QuantizationGuard] = {}
        geometry = source.geometry
        self._sections = geometry.layers * geometry.sides
        self._all_raw = (SectionCodec.RAW,) * self._sections
        self._last_codecs: dict[SectionCodec, tuple[SectionCodec, ...]] = {}
        self._scratch = empty(0, dtype=uint8)

    def encode(
        self, block_ids: tuple[int, ...], start: int, available: int, wanted: SectionCodec, memory: Tensor
    ) -> tuple[int, tuple[SectionCodec, ...]]:
        """Write as many tokens of ``[start, available)`` as fit.

        Args:
            memory: The slot: header and codec table are left free.

        Returns:
            The end of the chunk's tokens, and the codec of each section.
        """
        planned = self._last_codecs.get(wanted, self._all_raw)
        for plan in (planned, self._all_raw):
            end = self._chunk_end(start, available, len(memory), plan)
            with profile_range("disagg encode"):
                codecs = self._encode_sections(block_ids, start, end, wanted, memory)
            if codecs is not None:
                self._last_codecs[wanted] = codecs
                return end, codecs
        raise AssertionError(f"{end - start} raw tokens overflow {len(memory)} bytes")

    def take_demotions(self) -> list[Demotion]:
        """What the guards ruled out since the last call."""
        return [demotion for guard in self._guards.values() for demotion in guard.take_demotions()]

    def _chunk_end(self, start: int, available: int, slot_bytes: int, codecs: tuple[SectionCodec, ...]) -> int:
        geometry, heads = self._source.geometry, self._source.heads.count
        tokens = tokens_per_slot(slot_bytes, codecs, heads=heads, head_dim=geometry.head_dim, dtype=geometry.dtype)
        return min(available, start + max(1, tokens))

    def _encode_sections(
        self, block_ids: tuple[int, ...], start: int, end: int, wanted: SectionCodec, memory: Tensor
    ) -> tuple[SectionCodec, ...] | None:
        """Gather and encode all sections of one chunk; ``None`` if they do not fit."""
        guard = None
        if wanted is not SectionCodec.RAW:
            guard = self._guards.get(wanted) or self._guards.setdefault(wanted, self._guard_for(wanted))
        size = {codec: self._section_bytes(codec, end - start) for codec in SectionCodec}
        offset = payload_offset(self._sections)
        codecs = []
        for section in range(self._sections):
            layer, side = divmod(section, self._source.geometry.sides)
            kv = self._source.gather(layer, side, block_ids, start, end)
            used = SectionCodec.RAW if guard is None else guard.choose(layer, side, kv)
            if used is not SectionCodec.RAW:
                used = self._quantize(kv, used, memory[offset:], size)
            room = len(memory) - offset
            if padded(size[used]) > room:
                return None
            if used is SectionCodec.RAW:
                memory[offset : offset + size[used]].view(kv.dtype).view(kv.shape).copy_(kv)
            offset += size[used]
            if padded(offset) > offset:
                memory[offset : padded(offset)].zero_()
                offset = padded(offset)
            codecs.append(used)
        return tuple(codecs)

    def _quantize(self, kv: Tensor, codec: SectionCodec, out: Tensor, size: dict[SectionCodec, int]) -> SectionCodec:
        """Encode to the beginning of ``out``; RAW if that cannot be, and then ``out`` holds nothing.

        The codec wants room for the RAW form, whatever it writes: where less is left of the slot, and for KV that is
        not in host memory (that path is **untested on a GPU**), it encodes to a buffer aside, which is then copied.
        """
        direct = kv.device.type == "cpu" and len(out) >= size[SectionCodec.RAW]
        if direct:
            return self._codec.encode(kv, codec, out)
        if len(self._scratch) < size[SectionCodec.RAW] or self._scratch.device != kv.device:
            self._scratch = empty(size[SectionCodec.RAW], dtype=uint8, device=kv.device)
        used = self._codec.encode(kv, codec, self._scratch)
        if used is not SectionCodec.RAW and size[used] <= len(out):
            out[: size[used]].copy_(self._scratch[: size[used]])
        return used

    def _section_bytes(self, codec: SectionCodec, tokens: int) -> int:
        geometry, heads = self._source.geometry, self._source.heads.count
        return section_bytes(codec, heads=heads, tokens=tokens, head_dim=geometry.head_dim, dtype=geometry.dtype)


class HeadSlice:
    """Some heads of a source."""

    def __init__(self, source: Source, heads: HeadRange) -> None:
        self.geometry = source.geometry
        self.heads = heads
        self._source = source
        self._first = heads.start - source.heads.start

    def gather(self, layer: int, side: int, block_ids: Sequence[int], start: int, end: int) -> Tensor:
        whole = self._source.gather(layer, side, block_ids, start, end)
        return whole[self._first : self._first + self.heads.count]


class Encoders:
    """One encoder for each range of heads that leaves this rank: mostly one, for all of them."""

    def __init__(self, source: Source, codec: KVCodec, guard_for: Callable[[SectionCodec], QuantizationGuard]) -> None:
        self._source = source
        self._codec = codec
        self._guard_for = guard_for
        self._encoders: dict[HeadRange, ChunkEncoder] = {}

    def of(self, heads: HeadRange) -> ChunkEncoder:
        """The encoder of these heads."""
        if heads not in self._encoders:
            source = self._source if heads == self._source.heads else HeadSlice(self._source, heads)
            self._encoders[heads] = ChunkEncoder(source, self._codec, self._guard_for)
        return self._encoders[heads]

    def take_demotions(self) -> list[Demotion]:
        """What the guards ruled out since the last call."""
        return [demotion for encoder in self._encoders.values() for demotion in encoder.take_demotions()]
