"""Sections of KV to bytes and back.

A section is the KV of one (layer, side) of a wire chunk, ``[heads, tokens, head_dim]``. What it becomes::

    codec   bytes                       of
    RAW     N * head_dim * itemsize     the cache's own dtype
    INT8    N * head_dim                int8   q      [heads, tokens, head_dim]
            N * 2                       bf16   scale  [heads, tokens]
    INT8C   as INT8, for kv - mean, then
            heads * head_dim * 2        bf16   mean   [heads, head_dim]

with ``N = heads * tokens``, native (little) endian, no padding. A vector is the ``head_dim`` numbers of one token of
one head; each has its own scale. ``decoded = q * scale (+ mean)``, computed in float32 and cast to the cache's dtype.

**Scale.** ``amax(|vector|) / 127`` rounded to bf16, which has the range of float32, so that neither tiny nor huge
vectors leave it. ``q`` is computed with the *rounded* scale. That rounding moves ``amax / scale`` to at most
``127 * (1 + 2**-8) = 127.496``, which rounds to 127: ``|q| <= 127`` needs no clamp (which would cost half the speed).

**Bound.** ``|kv - q * scale| <= scale / 2`` everywhere (INT8C: of ``kv - mean``), beside rounding in float32 and in
the destination's dtype; ``scale <= amax / 127 * (1 + 2**-8)``. A vector with ``amax < 1.5e-36`` has a scale that no
normal bf16 holds: its scale is 0 and it decodes to exact zeros, as the all-zero vector does.

**What does not fit goes RAW.** A section with a NaN, an infinity, or a magnitude within 1 % of its dtype's largest
(where ``127 * scale`` might overflow), and one that INT8 or INT8C would not make smaller (INT8C of one or two tokens).
Casting an infinity to int8 gives -128 or 0, silently: hence the explicit test.

**Compilation.** The row functions below are plain torch. Inductor makes each of them one kernel over rows
``[N, head_dim]``; only ``N`` is dynamic, so heads and tokens never compile anything again. INT8C runs once per head,
whose rows are in cache when they are looked at again. A single row runs in eager: Inductor specialises on 1.
Compiled and eager may differ by one in ``q``, and by one bf16 step in INT8C's mean.
"""

import contextlib
import enum
import functools
import logging
import math
import time
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from disagg_plugin.errors import CodecError, ConfigError
from disagg_plugin.kv.geometry import DTYPE_BYTES

logger = logging.getLogger(__name__)

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SMALLEST_SCALE = 2.0**-126  # smallest normal of bf16 and of float32
_SCALE_BYTES = 2
_MEAN_BYTES = 2
MEASURED_SECTION = (8, 512)  # heads, tokens: beyond the caches of a core
MEASURED_RUNS = 5


class SectionCodec(enum.IntEnum):
    """How one section is written; the number goes on the wire."""

    RAW = 0
    INT8 = 1
    INT8C = 2


def section_bytes(codec: SectionCodec, *, heads: int, tokens: int, head_dim: int, dtype: str) -> int:
    """Size on the wire of one section.

    Args:
        dtype: Name of the dtype in which it is sent under RAW, a key of ``DTYPE_BYTES``.
    """
    vectors = heads * tokens
    match codec:
        case SectionCodec.RAW:
            return vectors * head_dim * DTYPE_BYTES[dtype]
        case SectionCodec.INT8:
            return vectors * (head_dim + _SCALE_BYTES)
        case SectionCodec.INT8C:
            return vectors * (head_dim + _SCALE_BYTES) + heads * head_dim * _MEAN_BYTES


def round_to_bf16(x: Tensor) -> Tensor:
    """The nearest bf16 (ties away from zero) of every finite float32, as float32.

    Not ``x.to(bfloat16).float()``: Inductor drops that pair, and ``q`` would be computed with a scale that is not
    the stored one.
    """
    return ((x.view(torch.int32) + 0x8000) & -0x10000).view(torch.float32)


def row_scale(amax: Tensor) -> tuple[Tensor, Tensor]:
    """``(scale, 1 / scale)`` for each row's ``amax``, both 0 where no normal bf16 holds the scale."""
    scale = round_to_bf16(amax * (1 / 127))
    representable = scale >= _SMALLEST_SCALE
    return torch.where(representable, scale, 0.0), torch.where(representable, 1 / scale, 0.0)


def _largest_magnitude(dtype: torch.dtype) -> float:
    """Up to this, ``127 * scale`` is finite in ``dtype``: ``127/128 * (1 + 2**-8) < 1``."""
    return float(torch.finfo(dtype).max) * (127 / 128)


def _encode_rows(rows: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """Quantize ``rows [N, D]`` into ``q`` int8 ``[N, D]`` and ``scale`` bf16 ``[N]``; False if they must go RAW."""
    rows32 = rows.float()
    amax = rows32.abs().amax(-1, keepdim=True)
    row_scales, inverse = row_scale(amax)
    scale.copy_(row_scales.squeeze(-1))
    q.copy_((rows32 * inverse).round())
    return (amax <= _largest_magnitude(rows.dtype)).all()  # false for NaN, too


def _mean_of_rows(rows: Tensor, mean: Tensor) -> None:
    """Not a part of :func:`_encode_rows_centred`: Inductor would inline it there unrounded, once per element."""
    mean.copy_(rows.float().mean(0))


def _encode_rows_centred(rows: Tensor, q: Tensor, scale: Tensor, mean: Tensor) -> Tensor:
    """As :func:`_encode_rows`, for one head's rows less their ``mean`` as it was stored, bf16 ``[D]``."""
    stored_mean = mean.float()
    centred = rows.float() - stored_mean
    amax = centred.abs().amax(-1, keepdim=True)
    row_scales, inverse = row_scale(amax)
    scale.copy_(row_scales.squeeze(-1))
    q.copy_((centred * inverse).round())
    return (amax + stored_mean.abs().amax() <= _largest_magnitude(rows.dtype)).all()


def _decode_rows(q: Tensor, scale: Tensor, out: Tensor) -> None:
    out.copy_(q.float() * scale.view(torch.bfloat16).float().unsqueeze(-1))


def _decode_rows_centred(q: Tensor, scale: Tensor, mean: Tensor, out: Tensor) -> None:
    out.copy_(q.float() * scale.view(torch.bfloat16).float().unsqueeze(-1) + mean.float())


def _scale_type_for_decoding(dtype: torch.dtype) -> torch.dtype:
    """As what the scales' bits are given to the decoding kernels of a cache of ``dtype``.

    A loop whose only 16-bit float type is bf16 is vectorised by 32: from q it then loads half registers under a mask,
    which from memory is three times slower than sixteen at a time (8 against 25 GB/s, AVX-512, torch 2.13).
    """
    return torch.float16 if dtype is torch.bfloat16 else torch.bfloat16


def _only_shape_guards(entries: Any) -> list[bool]:
    """Drop every Dynamo guard but those on the row count.

    The others would compile again for what does not change the code: inference mode entered or left, autograd,
    another number of threads, default dtype. :class:`KVCodec` checks dtypes and shapes itself.
    """
    return [entry.guard_type == "SHAPE_ENV" for entry in entries]


@functools.cache
def _compiled(function: Callable[..., Any], head_dim: int, dtype: torch.dtype, device_type: str) -> Callable[..., Any]:
    """``function`` for Inductor, one per process and arguments.

    Dynamo keeps compiled code per *code object*; since the guards that would tell head dims, dtypes and devices
    apart are dropped, each combination gets a code object of its own.
    """
    name = f"{function.__name__}_{head_dim}_{_name(dtype)}_{device_type}"
    own = types.FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)
    options = {"guard_filter_fn": _only_shape_guards}
    compiled: Callable[..., Any] = torch.compile(own, fullgraph=True, options=options)
    return compiled


@contextlib.contextmanager
def _expected_warnings_ignored() -> Iterator[None]:
    with warnings.catch_warnings():
        # torch 2.13's own import of Inductor
        warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
        # bf16 scales of an fp16 cache, fp16-typed scales of a bf16 one: Inductor handles both, and the tests say so
        warnings.filterwarnings("ignore", "bf16 and fp16 are mixed", UserWarning)
        yield


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class KVCodec:
    """Encodes and decodes sections ``[heads, tokens, head_dim]`` to and from flat bytes.

    Belongs to one thread, the engine's. Encoding and decoding a contiguous section allocates nothing of its size when
    compiled and given ``out``; a strided one is first copied to a buffer that is kept. Eager needs float32 temporaries.

    Attributes:
        dtype: Of the engine's cache: what :meth:`encode` takes and :meth:`decode` gives. Quantized ones (float8,
            uint8) know only RAW.
    """

    def __init__(self, *, head_dim: int, dtype: torch.dtype, compile: bool, device: torch.device | str = "cpu") -> None:
        """Compiles nothing yet: see :meth:`warm_up`.

        Raises:
            ConfigError: No such cache can be sent.
        """
        if _name(dtype) not in DTYPE_BYTES:
            raise ConfigError(f"a KV cache of {_name(dtype)} cannot be sent; known: {', '.join(DTYPE_BYTES)}")
        if head_dim % 2 and dtype in FLOAT_DTYPES:
            raise ConfigError(f"head_dim must be even, got {head_dim}: scales would not be aligned")
        self.head_dim = head_dim
        self.dtype = dtype
        self.device = torch.device(device)
        self._wants_compile = compile and dtype in FLOAT_DTYPES
        self._encode_rows: Callable[..., Any] = _encode_rows
        self._mean_of_rows: Callable[..., Any] = _mean_of_rows
        self._encode_rows_centred: Callable[..., Any] = _encode_rows_centred
        self._decode_rows: Callable[..., Any] = _decode_rows
        self._decode_rows_centred: Callable[..., Any] = _decode_rows_centred
        self._contiguous = torch.empty(0, dtype=dtype, device=self.device)

    @property
    def compiled(self) -> bool:
        """Whether :meth:`warm_up` compiled, for the directions that it was asked for."""
        return self._encode_rows is not _encode_rows or self._decode_rows is not _decode_rows

    def warm_up(self, *, encode: bool, decode: bool) -> float:
        """Compile now, so that no request waits for it; returns the seconds that took.

        Call it in the engine's thread before the first section: seconds to tens of seconds with cold caches, well
        under one with warm ones. Does nothing for ``compile=False`` and quantized caches. Without a C++ compiler, or
        when Inductor fails, it says so once and the codec stays eager: same bytes (to one in ``q``), slower.
        """
        if not self._wants_compile:
            return 0.0
        import torch._inductor.config as inductor_config

        started = time.perf_counter()
        try:
            # more threads would be a pool of processes, for four small kernels
            with (
                inductor_config.patch(compile_threads=1),
                torch.inference_mode(False),
                torch.no_grad(),
                _expected_warnings_ignored(),
            ):
                if encode:
                    self._encode_rows, self._mean_of_rows, self._encode_rows_centred = self._compile(
                        _encode_rows, _mean_of_rows, _encode_rows_centred
                    )
                if decode:
                    self._decode_rows, self._decode_rows_centred = self._compile(_decode_rows, _decode_rows_centred)
        except Exception as error:  # noqa: BLE001  whatever Inductor or the C++ compiler raise, eager does the same work
            reason = " ".join(str(error).split())[:200]
            logger.warning("KV codec runs uncompiled, about 5 x slower: %s: %s", type(error).__name__, reason)
        return time.perf_counter() - started

    def measure(self) -> tuple[float, float]:
        """Source bytes that INT8 encodes and decodes a second here, the best of a few runs; 0 for what is not compiled.

        Some milliseconds, in the engine's thread, after :meth:`warm_up`.
        """
        encode, decode = self._encode_rows is not _encode_rows, self._decode_rows is not _decode_rows
        if not encode and not decode:
            return 0.0, 0.0
        heads, tokens = MEASURED_SECTION
        kv = torch.randn(heads, tokens, self.head_dim, device=self.device).to(self.dtype)
        nbytes = kv.numel() * kv.element_size()
        wire = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        self.encode(kv, SectionCodec.INT8, wire)
        section = wire[: self._bytes(SectionCodec.INT8, heads, tokens, self.dtype)]

        def rate(work: Callable[[], object]) -> float:
            best_s = math.inf
            for _ in range(MEASURED_RUNS):
                started_s = time.perf_counter()
                work()
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                best_s = min(best_s, time.perf_counter() - started_s)
            return float(nbytes / max(best_s, 1e-9))

        return (
            rate(lambda: self.encode(kv, SectionCodec.INT8, wire)) if encode else 0.0,
            rate(
                lambda: self.decode(
                    section, SectionCodec.INT8, heads=heads, tokens=tokens, wire_dtype=self.dtype, out=kv
                )
            )
            if decode
            else 0.0,
        )

    def encode(self, kv: Tensor, codec: SectionCodec, out: Tensor) -> SectionCodec:
        """Write ``kv`` to the beginning of ``out``.

        Args:
            kv: ``[heads, tokens, head_dim]`` of this codec's dtype, any strides. Read only.
            codec: The wanted one.
            out: uint8 ``[bytes]``, contiguous, at least ``section_bytes(RAW)`` long, at an even offset of its storage.
                What lies behind the section within that length may be overwritten.

        Returns:
            The codec really used: ``codec``, or RAW (see the module). The section's length is ``section_bytes`` of it.

        Raises:
            CodecError: INT8 or INT8C for a quantized cache.
            ValueError: ``kv`` or ``out`` are not as above.
        """
        heads, tokens, head_dim = kv.shape
        if kv.dtype != self.dtype or head_dim != self.head_dim:
            raise ValueError(f"kv is {_name(kv.dtype)} {tuple(kv.shape)}, codec {_name(self.dtype)} of {self.head_dim}")
        raw_bytes = self._bytes(SectionCodec.RAW, heads, tokens, self.dtype)
        if out.dtype != torch.uint8 or out.dim() != 1 or not out.is_contiguous() or out.numel() < raw_bytes:
            raise ValueError(f"out must be at least {raw_bytes} contiguous bytes, got {_name(out.dtype)} {out.numel()}")
        kv = self._as_contiguous(kv)
        if codec is not SectionCodec.RAW:
            self._check_quantizable(codec)
            size = self._bytes(codec, heads, tokens, self.dtype)
            if size < raw_bytes and self._encode_int8(kv, codec, out[:size]):
                return codec
        out[:raw_bytes].copy_(kv.view(-1).view(torch.uint8))
        return SectionCodec.RAW

    def decode(
        self,
        payload: Tensor,
        codec: SectionCodec,
        *,
        heads: int,
        tokens: int,
        wire_dtype: torch.dtype,
        out: Tensor | None = None,
    ) -> Tensor:
        """Read one section.

        Args:
            payload: uint8 ``[bytes]``, contiguous, exactly the section, at an even offset of its storage.
            wire_dtype: The sender's cache dtype: what RAW holds.
            out: ``[heads, tokens, head_dim]`` of this codec's dtype, contiguous, to be overwritten and returned. A
                caller that scatters one section at a time passes the same buffer again and again.

        Returns:
            ``out``, or without it a new tensor; RAW of this codec's dtype then aliases ``payload``.

        Raises:
            CodecError: The payload's size is not what codec, heads and tokens say, or a quantized cache is involved
                and the codec is not RAW or the dtypes differ.
            ValueError: ``out`` is not as above.
        """
        if wire_dtype != self.dtype and not (wire_dtype in FLOAT_DTYPES and self.dtype in FLOAT_DTYPES):
            raise CodecError(f"a {_name(wire_dtype)} cache cannot be read as {_name(self.dtype)}")
        if codec is not SectionCodec.RAW:
            self._check_quantizable(codec)
        size = self._bytes(codec, heads, tokens, wire_dtype)
        if payload.dtype != torch.uint8 or payload.dim() != 1 or payload.numel() != size:
            raise CodecError(
                f"{codec.name} section of {heads} heads x {tokens} tokens is {size} bytes, got "
                f"{payload.numel()} x {_name(payload.dtype)}"
            )
        shape = (heads, tokens, self.head_dim)
        if out is not None and (tuple(out.shape) != shape or out.dtype != self.dtype or not out.is_contiguous()):
            raise ValueError(f"out must be contiguous {_name(self.dtype)} {shape}")
        if codec is SectionCodec.RAW:
            if payload.storage_offset() % wire_dtype.itemsize:
                payload = payload.clone()
            kv = payload.view(wire_dtype).view(shape)
            return kv.to(self.dtype) if out is None else out.copy_(kv)
        if out is None:
            out = torch.empty(shape, dtype=self.dtype, device=payload.device)
        self._decode_int8(payload, codec, out)
        return out

    def _encode_int8(self, kv: Tensor, codec: SectionCodec, out: Tensor) -> bool:
        """Fill ``out``; False, with rubbish in ``out``, if the section must go RAW."""
        heads, tokens, _ = kv.shape
        q, scale, mean = self._parts(out, heads, tokens)
        if codec is SectionCodec.INT8:
            encode = self._encode_rows if heads * tokens > 1 else _encode_rows
            return bool(encode(kv.view(-1, self.head_dim), q.view(-1, self.head_dim), scale.view(-1)))
        mean_of_rows = self._mean_of_rows if tokens > 1 else _mean_of_rows
        encode_centred = self._encode_rows_centred if tokens > 1 else _encode_rows_centred
        for head in range(heads):
            mean_of_rows(kv[head], mean[head])
            if not encode_centred(kv[head], q[head], scale[head], mean[head]):
                return False
        return True

    def _decode_int8(self, payload: Tensor, codec: SectionCodec, out: Tensor) -> None:
        heads, tokens, _ = out.shape
        q, scale, mean = self._parts(payload, heads, tokens)
        scale = scale.view(_scale_type_for_decoding(self.dtype))
        if codec is SectionCodec.INT8:
            decode = self._decode_rows if heads * tokens > 1 else _decode_rows
            decode(q.view(-1, self.head_dim), scale.view(-1), out.view(-1, self.head_dim))
            return
        decode_centred = self._decode_rows_centred if tokens > 1 else _decode_rows_centred
        for head in range(heads):
            decode_centred(q[head], scale[head], mean[head], out[head])

    def _parts(self, section: Tensor, heads: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """``(q, scale, mean)`` of a section, as views; of an INT8 one ``mean`` is ``[0, head_dim]``."""
        if section.storage_offset() % _SCALE_BYTES:
            raise ValueError("a section must begin at an even offset of its storage")
        vectors = heads * tokens
        q_bytes, scale_bytes = vectors * self.head_dim, vectors * _SCALE_BYTES
        q = section[:q_bytes].view(torch.int8).view(heads, tokens, self.head_dim)
        scale = section[q_bytes : q_bytes + scale_bytes].view(torch.bfloat16).view(heads, tokens)
        mean = section[q_bytes + scale_bytes :].view(torch.bfloat16).view(-1, self.head_dim)
        return q, scale, mean

    def _bytes(self, codec: SectionCodec, heads: int, tokens: int, dtype: torch.dtype) -> int:
        return section_bytes(codec, heads=heads, tokens=tokens, head_dim=self.head_dim, dtype=_name(dtype))

    def _check_quantizable(self, codec: SectionCodec) -> None:
        if self.dtype not in FLOAT_DTYPES:
            raise CodecError(f"a {_name(self.dtype)} cache is quantized already: it travels RAW, not {codec.name}")

    def _as_contiguous(self, kv: Tensor) -> Tensor:
        if kv.is_contiguous():
            return kv
        if self._contiguous.numel() < kv.numel():
            self._contiguous = torch.empty(kv.numel(), dtype=self.dtype, device=kv.device)
        return self._contiguous[: kv.numel()].view(kv.shape).copy_(kv)

    def _compile(self, *functions: Callable[..., Any]) -> list[Callable[..., Any]]:
        """``functions`` compiled for this codec's head dim and dtype, each having run once, on zeros."""
        rows = 64
        kv = torch.zeros(rows, self.head_dim, dtype=self.dtype, device=self.device)
        q = torch.zeros(rows, self.head_dim, dtype=torch.int8, device=self.device)
        scale = torch.zeros(rows, dtype=torch.bfloat16, device=self.device)
        decode_scale = scale.view(_scale_type_for_decoding(self.dtype))
        mean = torch.zeros(self.head_dim, dtype=torch.bfloat16, device=self.device)
        for tensor in (kv, q, scale, decode_scale):
            torch._dynamo.mark_dynamic(tensor, 0)
        arguments: dict[Callable[..., Any], tuple[Tensor, ...]] = {
            _encode_rows: (kv, q, scale),
            _mean_of_rows: (kv, mean),
            _encode_rows_centred: (kv, q, scale, mean),
            _decode_rows: (q, decode_scale, kv),
            _decode_rows_centred: (q, decode_scale, mean, kv),
        }
        compiled = [_compiled(function, self.head_dim, self.dtype, self.device.type) for function in functions]
        for function, kernel in zip(functions, compiled, strict=True):
            kernel(*arguments[function])
        return compiled
