"""What stands in a slot, and the notification that points at it. Pure functions over buffers, no I/O.

A chunk is tokens ``[token_start, token_end)`` of one transfer, all layers of one rank, in one contiguous buffer.
Little-endian on every host. ``section`` means one (layer, side), in that order, side fastest.

    offset  size  field
    0       4     magic          b"DKV1"
    4       2     version        1
    6       2     dtype          index into DTYPES: the cache's own dtype on the sending side
    8       16    transfer_id
    24      8     nonce          of the ticket, random
    32      4     sequence       0, 1, 2, ... within the transfer
    36      4     token_start
    40      4     token_end      exclusive
    44      2     layers
    46      2     sides          1 or 2
    48      4     head_start     global head index
    52      4     head_count
    56      4     head_dim
    60      2     checksum_kind  1 = xxh3 (64 bits, seed 0)
    62      2     reserved       0
    64      8     payload_bytes  from the first section to the end, padding included
    72      8     checksum       over the whole chunk, with this field zero
    80      n     codecs         one byte per section (``SectionCodec``), zero-padded to a multiple of 16
    ...           sections       each ``section_bytes(codec, ...)`` long, zero-padded to a multiple of 16

The chunk begins at the slot's first byte and every section at a multiple of 16, so that sections can be viewed in
any dtype and copied with wide loads.

Notification, 32 bytes; ``ACK``, ``NACK`` and ``DISCARD`` repeat the fields of the ``CHUNK`` that they answer:

    0       4     magic          b"DKN1"
    4       2     kind           1 CHUNK, 2 ACK (used), 3 NACK (damaged, send again), 4 DISCARD (not wanted)
    6       2     slot           index within the peer's region
    8       4     sequence
    12      4     attempt        0, or 1 after a NACK
    16      8     nonce
    24      8     bytes          of the whole chunk
"""

import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from itertools import repeat

import numpy as np
import numpy.typing as npt
import xxhash

from disagg_plugin.errors import CodecError, ConfigError, WireError
from disagg_plugin.kv.codec import SectionCodec, section_bytes
from disagg_plugin.kv.geometry import HeadRange

Bytes = npt.NDArray[np.uint8]

MAGIC = b"DKV1"
VERSION = 1
DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "uint8")
CHECKSUM_XXH3 = 1
ALIGNMENT = 16
HEADER_BYTES = 80
_HEADER = struct.Struct("<4sHH16sQIIIHHIIIHHQQ")
_CHECKSUM_AT = slice(72, 80)

NOTIFICATION_MAGIC = b"DKN1"
NOTIFICATION_BYTES = 32
_NOTIFICATION = struct.Struct("<4sHHIIQQ")


class Kind(IntEnum):
    """What a notification says."""

    CHUNK = 1
    ACK = 2
    NACK = 3
    DISCARD = 4


@dataclass(frozen=True, slots=True)
class Notification:
    """One fixed-size message between two data planes; ``slot`` counts from the region's first slot."""

    kind: Kind
    slot: int
    sequence: int
    attempt: int
    nonce: int
    nbytes: int

    def pack(self) -> bytes:
        return _NOTIFICATION.pack(
            NOTIFICATION_MAGIC, self.kind, self.slot, self.sequence, self.attempt, self.nonce, self.nbytes
        )

    def answer(self, kind: Kind) -> "Notification":
        """The same chunk, with another verdict."""
        return Notification(kind, self.slot, self.sequence, self.attempt, self.nonce, self.nbytes)


def parse_notification(message: bytes) -> Notification:
    """Read what a peer sent; notifications are untrusted input.

    Raises:
        WireError: Another length, magic or kind.
    """
    if len(message) != NOTIFICATION_BYTES:
        raise WireError(f"notification of {len(message)} bytes, not {NOTIFICATION_BYTES}")
    magic, kind, slot, sequence, attempt, nonce, nbytes = _NOTIFICATION.unpack(message)
    if magic != NOTIFICATION_MAGIC:
        raise WireError(f"notification with magic {magic!r}, not {NOTIFICATION_MAGIC!r}")
    if kind not in Kind.__members__.values():
        raise WireError(f"notification of unknown kind {kind}")
    return Notification(Kind(kind), slot, sequence, attempt, nonce, nbytes)


@dataclass(frozen=True, slots=True)
class Section:
    """Where one (layer, side) stands in the chunk; ``nbytes`` without padding."""

    offset: int
    nbytes: int
    codec: SectionCodec


@dataclass(frozen=True, slots=True)
class ChunkHeader:
    """Everything that a chunk says about itself.

    Attributes:
        codecs: One per section: ``layers * sides`` of them.
    """

    transfer_id: bytes
    nonce: int
    sequence: int
    token_start: int
    token_end: int
    layers: int
    sides: int
    heads: HeadRange
    head_dim: int
    dtype: str
    codecs: tuple[SectionCodec, ...]

    @property
    def tokens(self) -> int:
        return self.token_end - self.token_start

    def sections(self) -> tuple[Section, ...]:
        """Offsets and sizes of all sections, in order.

        Raises:
            CodecError: The codec refuses these numbers.
        """
        size = {codec: self.section_bytes(codec) for codec in set(self.codecs)}
        sections = []
        offset = payload_offset(len(self.codecs))
        for codec in self.codecs:
            sections.append(Section(offset, size[codec], codec))
            offset += padded(size[codec])
        return tuple(sections)

    def section_bytes(self, codec: SectionCodec) -> int:
        """Bytes of one section in this codec, without padding."""
        return section_bytes(
            codec, heads=self.heads.count, tokens=self.tokens, head_dim=self.head_dim, dtype=self.dtype
        )

    def payload_bytes(self) -> int:
        """All sections together, padding included."""
        return sum(padded(self.section_bytes(codec)) * n for codec, n in Counter(self.codecs).items())

    def chunk_bytes(self) -> int:
        """Header, codec table and payload: what is written to the slot."""
        return payload_offset(len(self.codecs)) + self.payload_bytes()


def padded(nbytes: int) -> int:
    """``nbytes`` rounded up to the alignment of sections."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def payload_offset(sections: int) -> int:
    """Where the first section begins."""
    return HEADER_BYTES + padded(sections)


def write_header(header: ChunkHeader, slot: Bytes) -> int:
    """Write header and codec table in front of a payload that already stands in ``slot``; checksum still zero.

    Returns:
        Bytes of the whole chunk.
    """
    sections = len(header.codecs)
    begin = payload_offset(sections)
    payload = header.payload_bytes()
    slot[:HEADER_BYTES] = np.frombuffer(
        _HEADER.pack(
            MAGIC,
            VERSION,
            DTYPES.index(header.dtype),
            header.transfer_id,
            header.nonce,
            header.sequence,
            header.token_start,
            header.token_end,
            header.layers,
            header.sides,
            header.heads.start,
            header.heads.count,
            header.head_dim,
            CHECKSUM_XXH3,
            0,
            payload,
            0,
        ),
        dtype=np.uint8,
    )
    slot[HEADER_BYTES:begin] = 0
    slot[HEADER_BYTES : HEADER_BYTES + sections] = header.codecs
    return begin + payload


def seal(chunk: Bytes) -> None:
    """Compute the checksum of a finished chunk and write it into its header; the GIL is free meanwhile."""
    chunk[_CHECKSUM_AT] = 0
    digest = xxhash.xxh3_64_intdigest(chunk.data)
    chunk[_CHECKSUM_AT] = np.frombuffer(digest.to_bytes(8, "little"), dtype=np.uint8)


def parse_chunk(chunk: Bytes) -> ChunkHeader:
    """Verify a private copy of a slot, and read its header.

    Args:
        chunk: Exactly the bytes that the notification announced. The checksum field is zeroed for a moment, so
            nothing else may write to it: never pass the slot itself.

    Raises:
        WireError: Not a chunk of this protocol, or damaged: magic, version, length or checksum.
        CodecError: A codec, dtype or shape that this version does not know.
    """
    if len(chunk) < HEADER_BYTES:
        raise WireError(f"chunk of {len(chunk)} bytes is shorter than its header, {HEADER_BYTES}")
    fields = _HEADER.unpack(chunk[:HEADER_BYTES].tobytes())
    magic, version, dtype, transfer_id, nonce, sequence, start, end, layers, sides, *rest = fields
    head_start, head_count, head_dim, checksum_kind, reserved, payload, checksum = rest
    if magic != MAGIC:
        raise WireError(f"chunk with magic {magic!r}, not {MAGIC!r}")
    if version != VERSION or reserved != 0:
        raise WireError(f"chunk of version {version}.{reserved}; this side speaks {VERSION}.0")
    if checksum_kind != CHECKSUM_XXH3:
        raise WireError(f"unknown checksum kind {checksum_kind}; this side knows xxh3 ({CHECKSUM_XXH3})")
    if payload_offset(layers * sides) + payload != len(chunk):
        raise WireError(f"{layers} layers x {sides} sides and {payload} payload bytes in a chunk of {len(chunk)}")
    if checksum_of(chunk) != checksum:
        raise WireError(f"checksum mismatch in a chunk of {len(chunk)} bytes")
    if dtype >= len(DTYPES) or sides not in (1, 2) or layers == 0 or start >= end or 0 in (head_count, head_dim):
        raise CodecError(f"impossible shape: dtype {dtype}, {layers} layers, {sides} sides, tokens [{start}, {end})")
    heads = HeadRange(head_start, head_count)
    codecs = _codecs(chunk[HEADER_BYTES : HEADER_BYTES + layers * sides])
    header = ChunkHeader(
        transfer_id, nonce, sequence, start, end, layers, sides, heads, head_dim, DTYPES[dtype], codecs
    )
    if header.payload_bytes() != payload:
        raise CodecError(f"payload of {payload} bytes; its sections need {header.payload_bytes()}")
    return header


def checksum_of(chunk: Bytes) -> int:
    """The checksum that belongs into the header; what stands there now does not count."""
    stored = chunk[_CHECKSUM_AT].copy()
    chunk[_CHECKSUM_AT] = 0
    digest = xxhash.xxh3_64_intdigest(chunk.data)
    chunk[_CHECKSUM_AT] = stored
    return digest


def _codecs(table: Bytes) -> tuple[SectionCodec, ...]:
    try:
        return tuple(map(SectionCodec, table.tolist()))
    except ValueError as error:
        known = ", ".join(f"{codec.name} ({codec.value})" for codec in SectionCodec)
        raise CodecError(f"unknown codec: {error}; this side knows {known}") from None


@lru_cache(maxsize=1024)
def tokens_per_slot(slot_bytes: int, codecs: tuple[SectionCodec, ...], *, heads: int, head_dim: int, dtype: str) -> int:
    """Largest number of tokens whose chunk fits ``slot_bytes`` if every section uses its codec of ``codecs``; 0: none.

    A section may turn out larger than planned (non-finite values, or the guard, step to RAW): the sender then
    stages the chunk again with the number for all RAW, which cannot overflow (see ``kv/encoder.py``).
    """
    counts = Counter(codecs)
    room = slot_bytes - payload_offset(len(codecs))

    def fits(tokens: int) -> bool:
        sizes = (
            padded(section_bytes(codec, heads=heads, tokens=tokens, head_dim=head_dim, dtype=dtype)) * n
            for codec, n in counts.items()
        )
        return sum(sizes) <= room

    low, high = 0, 1
    while fits(high) and high < 1 << 31:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def require_one_token(slot_bytes: int, *, sections: int, heads: int, head_dim: int, dtype: str) -> None:
    """Refuse a deployment in which not even one uncompressed token fits a slot.

    Raises:
        ConfigError: Names both numbers.
    """
    raw = tuple(repeat(SectionCodec.RAW, sections))
    if tokens_per_slot(slot_bytes, raw, heads=heads, head_dim=head_dim, dtype=dtype) == 0:
        token = padded(section_bytes(SectionCodec.RAW, heads=heads, tokens=1, head_dim=head_dim, dtype=dtype))
        needed = payload_offset(sections) + token * sections
        raise ConfigError(f"one token takes {needed} bytes in a slot of {slot_bytes}: raise transfer.slot_bytes")


def codec_names(codecs: Sequence[SectionCodec]) -> tuple[str, ...]:
    """Sorted, distinct, lower-case names, as settings and reports spell them."""
    return tuple(sorted({codec.name.lower() for codec in codecs}))
