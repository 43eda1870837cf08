"""Prefixes of an engine that can wait, in a real LMCache server; the test plays the engine."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from lmcache_servers import CHUNK, LMCacheServer, holds_nothing_locked
from prefix_tier_rig import GEOMETRY, PAGE, Engine, Prompt, expected_kv

from disagg_lmcache.prefix_tier import open_store
from disagg_plugin.cache_settings import LMCacheSettings
from disagg_plugin.control.messages import ModelIdentity
from disagg_plugin.errors import ConfigError
from disagg_plugin.testing import DenseView

MODEL = ModelIdentity("fingerprint", "weights")
TOKENS = 5 * CHUNK + 20

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LMCacheServer]:
    server = LMCacheServer("prefixes", tmp_path_factory.mktemp("lmcache"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def stack(server: LMCacheServer) -> Iterator[ExitStack]:
    server.clear()
    with ExitStack() as stack:
        yield stack


def new_engine(
    server: LMCacheServer, stack: ExitStack, model: ModelIdentity = MODEL, *, page: int = PAGE, **more: object
) -> Engine:
    fields = {"url": server.url, "lookup_timeout_ms": 1500, "request_timeout_s": 2.0, "heartbeat_s": 0.2, **more}
    settings = LMCacheSettings.model_validate(fields)
    engine = Engine(open_store(settings, model, DenseView(GEOMETRY, blocks=1, block_size=page)))
    stack.callback(engine.tier.close)
    return engine


def prompt_of(seed: int, tokens: int = TOKENS) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 30_000, (tokens,), generator=generator).tolist()


def test_what_one_engine_stores_another_one_loads_bit_by_bit(server: LMCacheServer, stack: ExitStack) -> None:
    first, second = new_engine(server, stack), new_engine(server, stack)
    assert first.serve(Prompt("a", prompt_of(1)), seed=1) == TOKENS
    first.wait(lambda: first.stored(5))
    assert second.serve(Prompt("a", prompt_of(1)), seed=99) == 20, "of another seed: what was loaded is not computed"
    assert second.totals["store_hit_tokens"] == 5 * CHUNK
    got = second.kv_of(prompt_of(1)[: 5 * CHUNK])
    assert torch.equal(got, expected_kv(prompt_of(1), seed=1, tokens=5 * CHUNK))
    server.when(holds_nothing_locked)


def test_only_what_the_engine_lacks_is_loaded(server: LMCacheServer, stack: ExitStack) -> None:
    first, second = new_engine(server, stack), new_engine(server, stack)
    shared, longer = prompt_of(2)[: CHUNK + PAGE + 1], prompt_of(2)
    first.serve(Prompt("a", longer), seed=2)
    first.wait(lambda: first.stored(5))
    second.serve(Prompt("b", shared), seed=2)
    loaded = second.totals.get("store_hit_tokens", 0)
    assert second.serve(Prompt("c", longer), seed=2) == 20
    assert second.totals["store_hit_tokens"] - loaded == 5 * CHUNK - (CHUNK + PAGE)
    server.when(holds_nothing_locked)


@pytest.mark.parametrize(
    ("model", "salt"),
    [
        pytest.param(ModelIdentity("fingerprint", "other weights"), "", id="other weights"),
        pytest.param(ModelIdentity("other fingerprint", "weights"), "", id="another model"),
        pytest.param(MODEL, "tenant", id="another tenant"),
        pytest.param(MODEL, "ten/ant@" + 200 * "x", id="a salt that LMCache would not take"),
    ],
)
def test_kv_of_another_model_or_tenant_is_not_found(
    server: LMCacheServer, stack: ExitStack, model: ModelIdentity, salt: str
) -> None:
    first, second = new_engine(server, stack), new_engine(server, stack, model)
    first.serve(Prompt("a", prompt_of(3)), seed=3)
    first.wait(lambda: first.stored(5))
    assert second.serve(Prompt("a", prompt_of(3), cache_salt=salt), seed=4) == TOKENS
    assert second.totals.get("store_hit_tokens", 0) == 0
    second.wait(lambda: second.stored(5))
    second.cache.flush()
    assert second.serve(Prompt("b", prompt_of(3), cache_salt=salt), seed=4) == 20, "its own is"


def test_a_server_that_hangs_costs_a_bounded_wait_and_then_nothing(server: LMCacheServer, stack: ExitStack) -> None:
    engine = new_engine(server, stack)
    engine.serve(Prompt("a", prompt_of(5)), seed=5)
    engine.wait(lambda: engine.stored(5))
    engine.cache.flush()
    with server.hanging():
        assert engine.serve(Prompt("b", prompt_of(5)), seed=5) == TOKENS
        engine.wait(lambda: engine.store.problem != "")
        engine.cache.flush()
        assert not engine.tier.loading(Prompt("c", prompt_of(5))), "it is not even asked"
    engine.wait(lambda: engine.store.problem == "")
    server.when(holds_nothing_locked)
    engine.cache.flush()
    assert engine.serve(Prompt("d", prompt_of(5)), seed=5) == 20


def test_a_server_that_dies_is_used_again_when_it_is_back(server: LMCacheServer, stack: ExitStack) -> None:
    engine = new_engine(server, stack)
    server.stop()
    assert engine.serve(Prompt("a", prompt_of(6)), seed=6) == TOKENS
    engine.wait(lambda: engine.store.problem != "")
    server.start()
    engine.wait(lambda: engine.store.problem == "")
    engine.cache.flush()
    engine.serve(Prompt("b", prompt_of(6)), seed=6)
    engine.wait(lambda: engine.stored(5))
    engine.cache.flush()
    assert engine.serve(Prompt("c", prompt_of(6)), seed=6) == 20


def test_a_server_that_shares_its_memory_is_read_there(tmp_path: Path, stack: ExitStack) -> None:
    server = LMCacheServer("shared", tmp_path)
    stack.callback(server.stop)
    server.start(shm=f"disagg-{server.port}")
    first, second = new_engine(server, stack), new_engine(server, stack)
    first.serve(Prompt("a", prompt_of(8)), seed=8)
    first.wait(lambda: first.stored(5))
    assert second.serve(Prompt("a", prompt_of(8)), seed=99) == 20
    assert torch.equal(second.kv_of(prompt_of(8)[: 5 * CHUNK]), expected_kv(prompt_of(8), seed=8, tokens=5 * CHUNK))
    server.when(holds_nothing_locked)


def test_without_a_server_an_engine_starts_only_if_told_so(tmp_path: Path, stack: ExitStack) -> None:
    server = LMCacheServer("late", tmp_path)
    with pytest.raises(ConfigError, match="no LMCache server at"):
        new_engine(server, stack)
    engine = new_engine(server, stack, on_unreachable="warn")
    assert engine.serve(Prompt("a", prompt_of(7)), seed=7) == TOKENS
    assert engine.totals.get("lookups", 0) == 0
    assert engine.store.problem


def test_a_chunk_size_that_does_not_fit_is_said(server: LMCacheServer, stack: ExitStack) -> None:
    with pytest.raises(ConfigError, match="chunk-size 64 is no multiple of this engine's pages of 48"):
        new_engine(server, stack, page=48)
