"""INT8 for LMCache's second tier: the codec of the wire, as a serializer of LMCache's multi-process server.

    {"type": "fs", "base_path": "/cache", "serde": {"type": "disagg_int8", "group": 64}}

LMCache hands over one object a chunk, in the engine's own layout, which on CPUs is not ``[tokens, head_dim]``. So an
object is taken as rows of ``group`` numbers as they lie in memory, each with its own scale (``kv/codec.py``). With
``group`` equal to the model's head dimension a row is a token's vector, or, where the engine keeps keys transposed,
some channels over some tokens.

    offset  bytes
    0       4      b"DKL1"
    4       4      group
    8       8      numbers in the object
    16      8      XXH3 of what follows, as an integer
    24             per part of at most PART_NUMBERS: int8 [rows, group], then bf16 [rows]

An object that INT8 does not fit (a NaN, an infinity) is not stored; one that does not check out is not loaded. LMCache
counts either as a miss.
"""

import struct
from typing import Any

import torch
import xxhash
from lmcache.v1.distributed.serde import AsyncSerdeProcessor, Deserializer, SerdeProcessor, Serializer
from torch import Tensor

from disagg_plugin.kv.codec import KVCodec, SectionCodec, section_bytes

NAME = "disagg_int8"
DEFAULT_GROUP = 64
PART_NUMBERS = 1 << 20
_HEADER = struct.Struct("<4sIQQ")
_MAGIC = b"DKL1"


class Int8Error(ValueError):
    """An object cannot be stored as INT8, or is not what was stored."""


def serialized_bytes(numbers: int, group: int) -> int:
    """Size of an object of so many numbers.

    Raises:
        Int8Error: They are not whole groups.
    """
    if numbers % group:
        raise Int8Error(f"{numbers} numbers are not whole groups of {group}: set another group")
    return _HEADER.size + numbers + 2 * (numbers // group)


class Int8Codec:
    """Objects to bytes and back; for one thread at a time."""

    def __init__(self, group: int = DEFAULT_GROUP) -> None:
        self.group = group
        self._codecs: dict[torch.dtype, KVCodec] = {}
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def encode(self, numbers: Tensor, out: Tensor) -> int:
        """Write ``numbers`` to the beginning of ``out``, uint8; how many bytes.

        Raises:
            Int8Error: Not whole groups, or not finite.
        """
        flat = numbers.contiguous().view(-1)
        size = serialized_bytes(flat.numel(), self.group)
        codec = self._codec(flat.dtype)
        at = _HEADER.size
        for part in flat.split(self._part_numbers):
            rows = part.view(1, -1, self.group)
            scratch = self._scratch_of(part.numel() * part.element_size())
            if codec.encode(rows, SectionCodec.INT8, scratch) is not SectionCodec.INT8:
                raise Int8Error("INT8 does not fit: a NaN, an infinity, or a row too short")
            length = self._part_bytes(part)
            out[at : at + length].copy_(scratch[:length])
            at += length
        header = _HEADER.pack(_MAGIC, self.group, flat.numel(), self._checksum(out[_HEADER.size : size]))
        out[: _HEADER.size].copy_(torch.frombuffer(bytearray(header), dtype=torch.uint8))
        return size

    def decode(self, payload: Tensor, out: Tensor) -> None:
        """Read ``payload`` into ``out``.

        Raises:
            Int8Error: It is not an object of this size and group, or its bytes are not those that were written.
        """
        numbers = out.numel()
        size = serialized_bytes(numbers, self.group)
        if payload.numel() < size:
            raise Int8Error(f"{payload.numel()} bytes where {size} were written")
        magic, group, found, checksum = _HEADER.unpack(payload[: _HEADER.size].numpy().tobytes())
        if (magic, group, found) != (_MAGIC, self.group, numbers):
            raise Int8Error(f"written as {found} numbers in groups of {group}, read as {numbers} in {self.group}")
        if self._checksum(payload[_HEADER.size : size]) != checksum:
            raise Int8Error("the checksum does not match")
        codec = self._codec(out.dtype)
        flat = out.view(-1)
        at = _HEADER.size
        for part in flat.split(self._part_numbers):
            rows = part.numel() // self.group
            length = self._part_bytes(part)
            section = self._scratch_of(length)[:length].copy_(
                payload[at : at + length]
            )  # aligned, whatever LMCache's is
            kv = codec.decode(section, SectionCodec.INT8, heads=1, tokens=rows, wire_dtype=out.dtype)
            part.copy_(kv.view(-1))
            at += length

    @property
    def _part_numbers(self) -> int:
        return max(1, PART_NUMBERS // self.group) * self.group

    def _part_bytes(self, part: Tensor) -> int:
        dtype = str(part.dtype).removeprefix("torch.")
        return section_bytes(
            SectionCodec.INT8, heads=1, tokens=part.numel() // self.group, head_dim=self.group, dtype=dtype
        )

    def _codec(self, dtype: torch.dtype) -> KVCodec:
        if dtype not in self._codecs:
            self._codecs[dtype] = KVCodec(head_dim=self.group, dtype=dtype, compile=False)
        return self._codecs[dtype]

    def _scratch_of(self, nbytes: int) -> Tensor:
        if self._scratch.numel() < nbytes:
            self._scratch = torch.empty(nbytes, dtype=torch.uint8)
        return self._scratch

    @staticmethod
    def _checksum(payload: Tensor) -> int:
        return int(xxhash.xxh3_64_intdigest(payload.numpy().data))


def _tensor_of(thing: Any) -> Tensor:
    if thing.tensor is None:
        raise Int8Error("the object is not one tensor")
    tensor: Tensor = thing.tensor
    return tensor


class Int8Serializer(Serializer):  # type: ignore[misc]  # LMCache is untyped here
    """KV to bytes."""

    def __init__(self, group: int) -> None:
        self._group = group
        self._codec = Int8Codec(group)

    def serialize(self, src: Any, dst: Any, key: object = None) -> int:
        return self._codec.encode(_tensor_of(src), _tensor_of(dst).view(-1).view(torch.uint8))

    def estimate_serialized_size(self, layout_desc: Any) -> int:
        """Exact: LMCache writes as much as it reserved."""
        return serialized_bytes(sum(torch.Size(shape).numel() for shape in layout_desc.shapes), self._group)


class Int8Deserializer(Deserializer):  # type: ignore[misc]  # LMCache is untyped here
    """Bytes to KV."""

    def __init__(self, group: int) -> None:
        self._codec = Int8Codec(group)

    def deserialize(self, src: Any, dst: Any, key: object = None) -> None:
        self._codec.decode(_tensor_of(src).view(-1).view(torch.uint8), _tensor_of(dst))


def create(options: dict[str, object]) -> SerdeProcessor:
    """LMCache's factory call.

    Raises:
        ValueError: An unknown option, or a group that is none.
    """
    group = options.get("group", DEFAULT_GROUP)
    if unknown := sorted(options.keys() - {"group"}):
        raise ValueError(f"serde {NAME} does not know {', '.join(unknown)}; known: group")
    if not isinstance(group, int) or not 8 <= group <= 1024:
        raise ValueError(f"serde {NAME}: group must be a number from 8 to 1024, not {group!r}")
    return AsyncSerdeProcessor(Int8Serializer(group), Int8Deserializer(group), max_workers=1)
