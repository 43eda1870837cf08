"""How fast is the codec, against copying the same KV? One thread, bf16, paged source, sections as in production.

    .venv/bin/python benchmarks/codec.py --json

``memcpy`` gathers a section from the paged cache and copies it once more, which is what RAW does. ``encode`` gathers
and encodes; ``decode`` decodes from the wire buffer. Rates are bytes of *source KV* (bf16) a second; every
repetition goes once over the whole cache and the variants take turns, so that a noisy neighbour hits all of them.
``decode`` is compared to that same ``memcpy``, and to ``copy`` (a plain copy of the decoded bytes, no gather) as well.

Eager torch allocates float32 temporaries of twice the section's size, several a call, and how long *that* takes
depends on what glibc does with freed memory, which in turn depends on what the process freed before. So eager is
measured in both states, pinned: ``eager``, where large blocks go back to the system and are faulted in anew, as in a
fresh process; and ``eager_warm_heap``, where the heap keeps them, as tcmalloc does. The compiled codec allocates
nothing of that size.
"""

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from disagg_plugin.kv.codec import KVCodec, SectionCodec, section_bytes

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory(keep: bool) -> None:
    """Pin whether glibc keeps large freed blocks."""
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, (32 << 20) if keep else (128 << 10))
    libc.mallopt(M_TRIM_THRESHOLD, (1 << 30) if keep else (128 << 10))


class Workload:
    """A paged cache, read in sections of ``tokens`` tokens from shuffled blocks."""

    def __init__(
        self, *, source_bytes: int, heads: int, head_dim: int, tokens: int, block_size: int, dtype: str
    ) -> None:
        self.dtype, self.dtype_name = DTYPES[dtype], dtype
        self.heads, self.head_dim, self.tokens = heads, head_dim, tokens
        self.blocks = tokens // block_size
        section = heads * tokens * head_dim * self.dtype.itemsize
        self.sections = -(-source_bytes // section)
        self.source_bytes = self.sections * section
        one = torch.randn(self.blocks, heads, block_size, head_dim).to(self.dtype)
        self.cache = one.repeat(self.sections, 1, 1, 1)
        self.block_ids = torch.randperm(self.sections * self.blocks).view(self.sections, self.blocks)
        self.picked = torch.empty_like(one)
        self.gathered = torch.empty(heads, tokens, head_dim, dtype=self.dtype)
        self.payload = torch.empty(self.sections, section, dtype=torch.uint8)

    def gather(self, index: int) -> Tensor:
        """Section ``index`` in canonical form."""
        torch.index_select(self.cache, 0, self.block_ids[index], out=self.picked)
        self.gathered.view(self.heads, self.blocks, -1, self.head_dim).copy_(self.picked.transpose(0, 1))
        return self.gathered


def measure(work: Workload, kind: SectionCodec, repetitions: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median GB/s of source by variant, and the seconds of each warm-up."""
    codecs = {
        "compiled": KVCodec(head_dim=work.head_dim, dtype=work.dtype, compile=True),
        "eager": KVCodec(head_dim=work.head_dim, dtype=work.dtype, compile=False),
    }
    warm_up = {
        "encode": codecs["compiled"].warm_up(encode=True, decode=False),
        "decode": codecs["compiled"].warm_up(encode=False, decode=True),
    }
    if not codecs["compiled"].compiled:
        raise SystemExit("the codec did not compile: nothing to measure")
    size = section_bytes(kind, heads=work.heads, tokens=work.tokens, head_dim=work.head_dim, dtype=work.dtype_name)
    decoded = torch.empty_like(work.gathered)
    flat = decoded.view(-1).view(torch.uint8)

    def memcpy(index: int) -> None:
        work.payload[index].copy_(work.gather(index).view(-1).view(torch.uint8))

    def copy(index: int) -> None:
        flat.copy_(work.payload[index])

    def gather(index: int) -> None:
        work.gather(index)

    def encode(codec: KVCodec) -> Callable[[int], None]:
        def one(index: int) -> None:
            assert codec.encode(work.gather(index), kind, work.payload[index]) is kind

        return one

    def decode(codec: KVCodec) -> Callable[[int], None]:
        def one(index: int) -> None:
            codec.decode(
                work.payload[index, :size],
                kind,
                heads=work.heads,
                tokens=work.tokens,
                wire_dtype=work.dtype,
                out=decoded,
            )

        return one

    variants: dict[str, Callable[[int], None]] = {"gather": gather, "memcpy": memcpy, "copy": copy}
    for name, codec in {**codecs, "eager_warm_heap": codecs["eager"]}.items():
        variants |= {f"encode {name}": encode(codec), f"decode {name}": decode(codec)}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repetition in range(repetitions + 1):
        for name, run in variants.items():
            keep_freed_memory(name.endswith("warm_heap"))
            started = time.perf_counter()
            for index in range(work.sections):
                run(index)
            if repetition:  # the first one touches the pages
                seconds[name].append(time.perf_counter() - started)
    return {name: work.source_bytes / 1e9 / statistics.median(s) for name, s in seconds.items()}, warm_up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object, last")
    parser.add_argument("--source-mb", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=1024, help="of a section")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--codec", choices=("int8", "int8c"), default="int8")
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    work = Workload(
        source_bytes=args.source_mb * 1_000_000,
        heads=args.heads,
        head_dim=args.head_dim,
        tokens=args.tokens,
        block_size=args.block_size,
        dtype=args.dtype,
    )
    gbps, warm_up = measure(work, SectionCodec[args.codec.upper()], args.repetitions)
    ratios = {
        "encode_vs_memcpy": gbps["encode compiled"] / gbps["memcpy"],
        "decode_vs_memcpy": gbps["decode compiled"] / gbps["memcpy"],
        "decode_vs_copy": gbps["decode compiled"] / gbps["copy"],
        "encode_compiled_vs_eager": gbps["encode compiled"] / gbps["encode eager"],
        "decode_compiled_vs_eager": gbps["decode compiled"] / gbps["decode eager"],
        "encode_compiled_vs_eager_warm_heap": gbps["encode compiled"] / gbps["encode eager_warm_heap"],
        "decode_compiled_vs_eager_warm_heap": gbps["decode compiled"] / gbps["decode eager_warm_heap"],
    }
    print(f"{args.codec}, {args.dtype}, {work.source_bytes / 1e6:.0f} MB in sections of {args.heads} x {args.tokens} x "
          f"{args.head_dim}, one thread, median of {args.repetitions}")  # fmt: skip
    for name, rate in gbps.items():
        print(f"  {name:<36}{rate:8.2f} GB/s")
    for name, ratio in ratios.items():
        print(f"  {name:<36}{ratio:8.2f}")
    for name, seconds in warm_up.items():
        print(f"  {'warm-up ' + name:<36}{seconds:8.2f} s")
    if args.json:
        result = {
            "source_bytes": work.source_bytes,
            "memcpy_gbps": gbps["memcpy"],
            "copy_gbps": gbps["copy"],
            "gather_gbps": gbps["gather"],
            **{
                direction: {
                    f"{name}_gbps": gbps[f"{direction} {name}"] for name in ("compiled", "eager", "eager_warm_heap")
                }
                for direction in ("encode", "decode")
            },
            "ratios": ratios,
            "warm_up_s": warm_up,
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
