"""What we read and write in vLLM's cache is what vLLM's own kernels read and write, and nothing beside it."""

from types import SimpleNamespace

import pytest
import torch

from disagg_plugin.kv.geometry import HeadRange, KVGeometry
from disagg_vllm.kv_views import (
    PagedView,
    UnsupportedCache,
    build_view,
    probe_cpu_backend,
    split_cpu_cache,
    split_gpu_cache,
)

# torch's own, when vLLM's custom ops import its compiler
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")

BLOCKS, HEADS = 12, 3


def cpu_cache(tokens: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(BLOCKS, HEADS, tokens, 2 * head_dim, dtype=dtype)


def nhd_cache(tokens: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(BLOCKS, tokens, HEADS, 2 * head_dim, dtype=dtype).transpose(1, 2)


def all_layers_in_a_block_cache(tokens: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(BLOCKS, 5, HEADS, tokens, 2 * head_dim, dtype=dtype)[:, 2]


LAYOUTS = {
    "CPU": (cpu_cache, split_cpu_cache),
    "HND": (cpu_cache, split_gpu_cache),
    "NHD": (nhd_cache, split_gpu_cache),
    "BLHNC": (all_layers_in_a_block_cache, split_gpu_cache),
}


def paged_view(cache: torch.Tensor, split=split_cpu_cache, block_size: int | None = None) -> PagedView:
    dtype = str(cache.dtype).removeprefix("torch.")
    geometry = KVGeometry(layers=1, kv_heads=HEADS, head_dim=cache.shape[3] // 2, dtype=dtype)
    return PagedView(
        [split(cache)], geometry=geometry, heads=HeadRange(0, HEADS), block_size=block_size or cache.shape[2]
    )


def random_kv(tokens: int, head_dim: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """``[heads, tokens, head_dim]``."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.uint8:
        return torch.randint(256, (HEADS, tokens, head_dim), generator=generator, dtype=dtype)
    return torch.randn(HEADS, tokens, head_dim, generator=generator).to(dtype)


@pytest.fixture(params=["pieces", "index"])
def _both_ways(request, monkeypatch):
    """Both ways to move tokens, on CPU tensors: block by block, and with one index of all tokens as on a GPU."""
    original = PagedView.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self._on_cpu = request.param == "pieces"

    monkeypatch.setattr(PagedView, "__init__", init)


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
@pytest.mark.parametrize(
    ("start", "end"),
    [
        pytest.param(0, 1, id="one token"),
        pytest.param(0, 64, id="whole blocks"),
        pytest.param(5, 11, id="inside one block"),
        pytest.param(5, 90, id="parts of the first and last block"),
        pytest.param(16, 90, id="part of the last block"),
        pytest.param(79, 81, id="across one border"),
    ],
)
def test_what_was_scattered_is_gathered_and_nothing_else_changed(layout, dtype, start, end):
    make, split = LAYOUTS[layout]
    cache = make(16, 32, dtype)
    cache.copy_(random_kv(16, 64, dtype, seed=1))
    before = cache.clone(memory_format=torch.preserve_format)
    view, untouched = paged_view(cache, split), paged_view(before, split)
    block_ids = [7, 3, 4, 11, 0, 9]
    for side in (0, 1):
        kv = random_kv(end - start, 32, dtype, seed=side)
        view.scatter(0, side, block_ids, start, end, kv)
        read = view.gather(0, side, block_ids, start, end)
        assert read.is_contiguous()
        assert torch.equal(read, kv)
        for first, stop in ((0, start), (end, 96)):
            if first < stop:
                beside = view.gather(0, side, block_ids, first, stop)
                assert torch.equal(beside, untouched.gather(0, side, block_ids, first, stop))
    others = [block for block in range(BLOCKS) if block not in block_ids]
    assert torch.equal(cache[others], before[others])


@pytest.mark.usefixtures("_both_ways")
def test_random_ranges_over_random_blocks():
    generator = torch.Generator().manual_seed(3)
    view = paged_view(cpu_cache(32, 64, torch.float32))
    for round_number in range(50):
        block_ids = torch.randperm(BLOCKS, generator=generator).tolist()
        start, end = sorted(torch.randperm(BLOCKS * 32 + 1, generator=generator)[:2].tolist())
        kv = random_kv(end - start, 64, torch.float32, seed=round_number)
        view.scatter(0, round_number % 2, block_ids, start, end, kv)
        assert torch.equal(view.gather(0, round_number % 2, block_ids, start, end), kv)


@pytest.mark.usefixtures("_both_ways")
def test_blocks_of_the_scheduler_may_be_several_blocks_of_the_kernel():
    cache = cpu_cache(16, 32, torch.float32)  # 12 kernel blocks: 3 blocks of 64 tokens
    view = paged_view(cache, block_size=64)
    kv = random_kv(100, 32, torch.float32)
    view.scatter(0, 1, [2, 0], 20, 120, kv)
    assert torch.equal(view.gather(0, 1, [2, 0], 20, 120), kv)
    values = split_cpu_cache(cache)[1]
    assert torch.equal(values[9, :, 4:], kv[:, :12])  # token 20: the second kernel block of block 2
    assert not values[4:8].any()


def test_the_same_list_with_other_blocks_in_it_is_not_taken_for_the_old_one():
    view = paged_view(cpu_cache(16, 32, torch.float32))
    block_ids = [1, 2]
    view.scatter(0, 0, block_ids, 0, 32, random_kv(32, 32, torch.float32))
    block_ids[1] = 5
    assert not view.gather(0, 0, block_ids, 16, 32).any()
    assert view.gather(0, 0, [1, 2], 16, 32).any()


@pytest.mark.parametrize(("start", "end"), [(0, 33), (8, 8), (9, 8), (-1, 4)])
def test_tokens_without_blocks_are_refused(start, end):
    view = paged_view(cpu_cache(16, 32, torch.float32))
    with pytest.raises(ValueError, match="do not lie in 2 blocks"):
        view.gather(0, 0, [1, 2], start, end)


@pytest.mark.parametrize(("dtype", "tokens", "head_dim"), [
    (torch.float32, 32, 64), (torch.float32, 128, 64), (torch.float32, 16, 80),
    (torch.float16, 32, 128), (torch.bfloat16, 16, 96),
])  # fmt: skip
def test_the_cpu_backend_reads_and_writes_the_same_kv(dtype, tokens, head_dim):
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    isa = _get_attn_isa(dtype, tokens, head_dim, "auto")
    cache = cpu_cache(tokens, head_dim, dtype)
    key, value = random_kv(tokens + 5, head_dim, dtype, 1), random_kv(tokens + 5, head_dim, dtype, 2)
    slots = torch.cat([torch.arange(tokens) + 4 * tokens, torch.arange(5) + 2 * tokens])  # blocks 4 and 2
    key_cache, value_cache = cache.view(BLOCKS, HEADS, 2 * tokens, head_dim).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(
        key.transpose(0, 1).contiguous(), value.transpose(0, 1).contiguous(), key_cache, value_cache, slots, isa
    )
    view = paged_view(cache)
    assert torch.equal(view.gather(0, 0, [4, 2], 0, tokens + 5), key)
    assert torch.equal(view.gather(0, 1, [4, 2], 0, tokens + 5), value)
    ours = torch.zeros_like(cache)
    for side, kv in enumerate((key, value)):
        paged_view(ours).scatter(0, side, [4, 2], 0, tokens + 5, kv)
    assert torch.equal(ours, cache)


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize(
    ("layout", "kernel_block"),
    [("LBHNC", 64), ("LBNHC", 64), ("LBHNC", 16), ("LBNHC", 16), ("BLHNC", 64), ("BLNHC", 64)],
)
def test_caches_that_vllm_itself_allocates_for_gpu_backends(layout, kernel_block):
    from vllm.v1 import kv_cache_interface as kv
    from vllm.v1.worker.utils import allocate_kv_cache

    spec = kv.FullAttentionSpec(block_size=64, num_kv_heads=HEADS, head_size=32, dtype=torch.float32)
    names, page = [f"layers.{n}" for n in range(3)], spec.page_size_bytes
    strides = (page * BLOCKS, page) if layout.startswith("L") else (page, page * len(names))
    config = kv.KVCacheConfig(
        num_blocks=BLOCKS,
        kv_cache_tensors=[kv.KVCacheTensor(page * BLOCKS * len(names), names, *strides)],
        kv_cache_groups=[kv.KVCacheGroupSpec(names, spec)],
    )
    caches = allocate_kv_cache(config, torch.device("cpu"), kv.KVCacheLayout[layout], [kernel_block])
    view = PagedView(
        [split_gpu_cache(caches[name]) for name in names],
        geometry=KVGeometry(layers=3, kv_heads=HEADS, head_dim=32, dtype="float32"),
        heads=HeadRange(0, HEADS),
        block_size=64,
    )
    block_ids, kv_of_layer = [5, 1, 8], [random_kv(130, 32, torch.float32, seed=n) for n in range(6)]
    for at, one in enumerate(kv_of_layer):
        view.scatter(at // 2, at % 2, block_ids, 20, 150, one)
    for at, one in enumerate(kv_of_layer):
        assert torch.equal(view.gather(at // 2, at % 2, block_ids, 20, 150), one)
    # token 100 lies in the request's second block, at 36, as FlashAttention splits and addresses the cache
    keys, values = caches["layers.2"].transpose(1, 2).split(32, dim=-1)
    slot = 1 * 64 + 36
    assert torch.equal(keys[slot // kernel_block, slot % kernel_block], kv_of_layer[4][:, 80])
    assert torch.equal(values[slot // kernel_block, slot % kernel_block], kv_of_layer[5][:, 80])


def engine(dtype=torch.float32, *, layers=2, kv_heads=HEADS, block_size=32, head_dim=64, cache_dtype="auto"):
    """The parts of vLLM's configuration that ``build_view`` reads."""
    spec = SimpleNamespace(head_size=head_dim, block_size=block_size)
    config = SimpleNamespace(
        model_config=SimpleNamespace(get_total_num_kv_heads=lambda: kv_heads, dtype=dtype),
        cache_config=SimpleNamespace(cache_dtype=cache_dtype),
        compilation_config=SimpleNamespace(static_forward_context={}),
    )
    kv_cache_config = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)])
    caches = {
        f"model.layers.{n}.self_attn.attn": torch.zeros(BLOCKS, HEADS, block_size, 2 * head_dim, dtype=dtype)
        for n in reversed(range(layers))
    }
    return config, kv_cache_config, caches


def test_layers_stand_in_the_models_order_and_heads_are_global():
    config, kv_cache_config, caches = engine(layers=12, kv_heads=2 * HEADS)
    caches["model.layers.12.self_attn.attn"] = caches["model.layers.3.self_attn.attn"]  # a layer that shares
    view = build_view(config, kv_cache_config, caches, rank=1, tp_size=2)
    assert view.geometry == KVGeometry(layers=12, kv_heads=2 * HEADS, head_dim=64, dtype="float32")
    assert view.heads == HeadRange(HEADS, HEADS)
    kv = random_kv(3, 64, torch.float32)
    view.scatter(10, 1, [1], 0, 3, kv)
    assert torch.equal(split_cpu_cache(caches["model.layers.10.self_attn.attn"])[1][1, :, :3], kv)


def test_a_bfloat16_cache_is_moved_unless_the_cpu_has_amx_which_lays_it_out_for_itself():
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    config, kv_cache_config, caches = engine(torch.bfloat16)
    if _get_attn_isa(torch.bfloat16, 32, 64) == "amx":
        with pytest.raises(UnsupportedCache, match=r"\(amx\) keeps torch.bfloat16 KV in an unknown layout"):
            build_view(config, kv_cache_config, caches, rank=0, tp_size=1)
    else:
        assert build_view(config, kv_cache_config, caches, rank=0, tp_size=1).geometry.dtype == "bfloat16"


@pytest.mark.parametrize(("cache_dtype", "name"), [("fp8_e4m3", "float8_e4m3fn"), ("fp8_e5m2", "float8_e5m2")])
def test_fp8_caches_are_moved_as_bytes(cache_dtype, name):
    config, kv_cache_config, caches = engine(torch.float32, cache_dtype=cache_dtype)
    caches = {layer: torch.zeros(cache.shape, dtype=torch.uint8) for layer, cache in caches.items()}
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    try:
        _get_attn_isa(torch.float32, 32, 64, cache_dtype)
    except NotImplementedError:  # an older CPU: vLLM itself has no FP8 cache there
        with pytest.raises(UnsupportedCache):
            build_view(config, kv_cache_config, caches, 0, 1)
        return
    view = build_view(config, kv_cache_config, caches, rank=0, tp_size=1)
    assert view.geometry.dtype == name
    kv = random_kv(40, 64, torch.uint8)
    view.scatter(1, 0, [3, 5], 10, 50, kv.view(getattr(torch, name)))
    read = view.gather(1, 0, [3, 5], 10, 50)
    assert read.dtype == getattr(torch, name)
    assert torch.equal(read.view(torch.uint8), kv)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda c: c[:, :2], "expected a cache of", id="heads of another rank"),
        pytest.param(lambda c: c[..., :100], "expected a cache of", id="values narrower than keys"),
        pytest.param(lambda c: c.flatten(2), "expected a cache of", id="three dimensions"),
        pytest.param(lambda c: c[:, :, :24], "do not divide", id="odd kernel block"),
        pytest.param(lambda c: c.to(torch.float64), "float64", id="unknown dtype"),
    ],
)
def test_other_tensors_are_refused_by_name(change, message):
    config, kv_cache_config, caches = engine()
    with pytest.raises(UnsupportedCache, match=message):
        build_view(config, kv_cache_config, {name: change(cache) for name, cache in caches.items()}, 0, 1)


def test_layers_with_different_caches_are_refused():
    config, kv_cache_config, caches = engine()
    caches["model.layers.1.self_attn.attn"] = caches["model.layers.1.self_attn.attn"].to(torch.bfloat16)
    with pytest.raises(UnsupportedCache, match="layers have different caches"):
        build_view(config, kv_cache_config, caches, 0, 1)


def test_heads_that_cannot_be_split_are_refused():
    with pytest.raises(UnsupportedCache, match="cannot be split"):
        build_view(*engine(kv_heads=3), rank=0, tp_size=2)


def test_a_backend_that_writes_another_layout_is_found_by_the_probe(monkeypatch):
    from vllm import _custom_ops as ops

    def writes_keys_like_values(key, value, key_cache, value_cache, slots, isa, **kwargs):  # noqa: ARG001
        tokens = key_cache.shape[2]
        for at, slot in enumerate(slots.tolist()):
            key_cache[slot // tokens, :, slot % tokens] = key[at]
            value_cache[slot // tokens, :, slot % tokens] = value[at]

    monkeypatch.setattr(ops, "cpu_attn_reshape_and_cache", writes_keys_like_values)
    with pytest.raises(UnsupportedCache, match="unknown layout"):
        probe_cpu_backend(cpu_cache(32, 64, torch.float32), "vec")
    with pytest.raises(UnsupportedCache, match="unknown layout"):
        build_view(*engine(), rank=0, tp_size=1)


def test_a_backend_that_cannot_be_called_is_refused():
    with pytest.raises(UnsupportedCache, match="cannot be probed"):
        probe_cpu_backend(cpu_cache(32, 64, torch.float32), "no such instruction set")


def test_the_probe_leaves_the_engines_cache_alone():
    config, kv_cache_config, caches = engine()
    build_view(config, kv_cache_config, caches, 0, 1)
    assert not any(cache.any() for cache in caches.values())
