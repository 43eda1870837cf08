"""LMCache's real connector and server under our two halves; the test plays the engine, its cache is plain tensors."""

import json
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lmcache_servers import CHUNK, LMCacheServer, holds_nothing_locked, is_written

from disagg_plugin.cache_settings import LMCacheSettings
from disagg_plugin.errors import ConfigError
from disagg_plugin.kv.dataplane import Completions

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, when vLLM imports its compiler
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import SamplingParams
    from vllm.v1 import kv_cache_interface as kv
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request, RequestStatus

    from disagg_vllm.lmcache_child import create_child
    from disagg_vllm.lmcache_tier import LMCacheScheduler, LMCacheWorker

BLOCK, BLOCKS, LAYERS, HEADS, HEAD_DIM = 32, 128, 2, 2, 16
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": HEADS,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
}

pytestmark = pytest.mark.timeout(300)


class Blocks:
    def __init__(self, block_ids: list[int]) -> None:
        self.block_ids = block_ids

    def get_block_ids(self) -> tuple[list[int]]:
        return (self.block_ids,)


def config_of(folder: Path, block_size: int = BLOCK) -> tuple[Any, Any]:
    """vLLM's own configuration of a model that is never loaded."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    arguments = {"dtype": "float32", "skip_tokenizer_init": True, "load_format": "dummy", "block_size": block_size}
    config = EngineArgs(model=str(folder), **arguments).create_engine_config()
    config.cache_config.kv_cache_layout = "LBHNC"
    spec = kv.FullAttentionSpec(block_size=block_size, num_kv_heads=HEADS, head_size=HEAD_DIM, dtype=torch.float32)
    group = kv.KVCacheGroupSpec([f"layers.{n}" for n in range(LAYERS)], spec)
    return config, kv.KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=[group])


class PlayedEngine:
    """One engine's scheduler and worker, as far as its connector sees them."""

    def __init__(self, folder: Path, server: LMCacheServer, **settings: Any) -> None:
        lmcache = LMCacheSettings(
            url=server.url, **{"lookup_timeout_ms": 1000, "request_timeout_s": 4, "heartbeat_s": 2, **settings}
        )
        self.config, caches = config_of(folder)
        child, problem = create_child(self.config, KVConnectorRole.SCHEDULER, caches, lmcache)
        self.scheduler = LMCacheScheduler(child, problem, lmcache, block_size=BLOCK)
        child, problem = create_child(self.config, KVConnectorRole.WORKER, caches, lmcache)
        self.worker = LMCacheWorker(child, problem)
        self.kv = {f"layers.{n}": torch.zeros(BLOCKS, HEADS, BLOCK, 2 * HEAD_DIM) for n in range(LAYERS)}
        self.worker.register(self.kv)
        assert self.worker.child.problem == ""
        self.scheduler.ready([self.worker.child.problem])
        self.free = list(range(1, BLOCKS))
        self.held: dict[str, Blocks] = {}
        self.number = 0
        self.steps = 0

    def request(self, tokens: list[int], *, salt: str | None = None, lora: str = "") -> Request:
        self.number += 1
        return Request(
            f"r{self.number}",
            tokens,
            SamplingParams(max_tokens=8, extra_args={"kv_transfer_params": {"cached_token_stats": True}}),
            None,
            cache_salt=salt,
            lora_request=LoRARequest(lora, 1, f"/adapters/{lora}") if lora else None,
        )

    def looked_up(self, request: Request, cached: int = 0) -> int:
        """As the scheduler: once a step, until there is an answer."""
        for _ in range(2_000):
            if (found := self.scheduler.look_up(request, cached)) is not None:
                return found
            self.step()
            Event().wait(0.002)
        raise AssertionError("neither an answer nor a deadline")

    def allocate(self, request: Request, stored: int, wire: int = 0, cached: int = 0) -> Blocks:
        self._release(request)
        blocks = Blocks([self.free.pop(0) for _ in range(-(-request.num_prompt_tokens // BLOCK))])
        self.held[request.request_id] = blocks
        self.scheduler.promise(request.request_id, cached, stored)
        assert self.scheduler.allocated(request, blocks, stored + wire) == wire
        if stored + wire:
            request.status = RequestStatus.WAITING_FOR_REMOTE_KVS
            request.num_computed_tokens = cached + stored + wire
        return blocks

    def step(self, request: Request | None = None, new_tokens: int = 0, own: Completions | None = None) -> Completions:
        """One step of both halves, in which ``request`` computes so many tokens."""
        self.steps += 1
        output = SchedulerOutput.make_empty()
        if request is not None:
            output.num_scheduled_tokens = {request.request_id: new_tokens}
            output.scheduled_new_reqs = [
                SimpleNamespace(req_id=request.request_id, num_computed_tokens=request.num_computed_tokens)
            ]
            request.num_computed_tokens += new_tokens
        step = self.scheduler.build_step(output)
        self.worker.preempt(step)
        self.worker.bind(step)
        self.worker.start_loads(None)
        self.worker.start_saves()
        done = self.worker.completions(own or Completions())
        self.worker.unbind()
        told = SimpleNamespace(finished_recving=set(done.received), kv_cache_events=None, kv_connector_worker_meta=None)
        self.scheduler.update(told, self.worker.take_failed(), self.worker.child.problem)
        return done

    def until(self, condition: Callable[[Completions], bool], own: Completions | None = None) -> Completions:
        """Empty steps until one of them says this."""
        for _ in range(2_000):
            done = self.step(own=own)
            own = None
            if condition(done):
                return done
            Event().wait(0.005)
        raise AssertionError("not within 2,000 steps")

    def finish(self, request: Request) -> None:
        """The request ends, and its blocks are released as soon as nobody reads them."""
        request.status = RequestStatus.FINISHED_LENGTH_CAPPED
        if self.scheduler.finished(request):
            self.scheduler.sent_by(request.request_id, store=True, wire=False)
            self.until(lambda done: request.request_id in done.released)
        self._release(request)

    def _release(self, request: Request) -> None:
        if (blocks := self.held.pop(request.request_id, None)) is not None:
            self.free += blocks.block_ids

    def fill(self, blocks: Blocks, seed: int) -> None:
        """KV as a forward pass, or the wire, would write it."""
        for n, cache in enumerate(self.kv.values()):
            generator = torch.Generator().manual_seed(1_000 * seed + n)
            for block in blocks.block_ids:
                cache[block] = torch.randn(cache[block].shape, generator=generator)

    def serve(self, tokens: list[int], seed: int, **more: Any) -> int:
        """A request that is computed here; what LMCache had of it."""
        request = self.request(tokens, **more)
        found = self.looked_up(request)
        blocks = self.allocate(request, found)
        if found:
            self.until(lambda done: request.request_id in done.received)
        self.fill(blocks, seed)
        request.status = RequestStatus.RUNNING
        self.step(request, len(tokens) - request.num_computed_tokens)
        self.finish(request)
        return found

    @property
    def totals(self) -> dict[str, int]:
        totals: dict[str, int] = self.scheduler.snapshot()["totals"]  # type: ignore[assignment]
        return totals

    def close(self) -> None:
        self.scheduler.child.close()
        self.worker.child.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LMCacheServer]:
    server = LMCacheServer("child", tmp_path_factory.mktemp("lmcache"))
    server.start(l2=server.folder / "l2")
    yield server
    server.stop()


@pytest.fixture
def engine(server: LMCacheServer) -> Iterator[PlayedEngine]:
    engine = PlayedEngine(server.folder / "model", server)
    yield engine
    view = engine.scheduler.snapshot()
    assert (view["tracked_requests"], view["inactive_reason"]) == (0, "")
    assert (engine.worker.unexpected, engine.worker.child.problem) == (0, "")
    server.when(holds_nothing_locked)
    engine.close()


def prompt(tokens: int, seed: int) -> list[int]:
    return torch.randint(0, 500, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def kv_of(engine: PlayedEngine, blocks: Blocks, count: int) -> list[torch.Tensor]:
    return [cache[blocks.block_ids[:count]].clone() for cache in engine.kv.values()]


def test_what_was_computed_comes_back_by_whole_chunks_and_byte_for_byte(engine: PlayedEngine) -> None:
    tokens = prompt(300, seed=1)
    assert engine.serve(tokens, seed=1) == 0
    request = engine.request(tokens)
    assert engine.looked_up(request) == 300 // CHUNK * CHUNK
    blocks = engine.allocate(request, 256)
    done = engine.until(lambda done: bool(done.received))
    assert done == Completions(received=(request.request_id,))
    loaded = kv_of(engine, blocks, 8)
    engine.fill(blocks, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(loaded, kv_of(engine, blocks, 8), strict=True))
    request.status = RequestStatus.RUNNING
    engine.step(request, 44)
    engine.finish(request)


def test_a_whole_prompt_is_found_less_its_last_token(engine: PlayedEngine) -> None:
    tokens = prompt(4 * CHUNK, seed=2)
    assert engine.serve(tokens, seed=2) == 0
    assert engine.serve(tokens, seed=2) == 255


def test_another_salt_another_adapter_and_another_model_find_nothing(
    engine: PlayedEngine, server: LMCacheServer
) -> None:
    tokens = prompt(300, seed=3)
    assert engine.serve(tokens, seed=3, salt="a", lora="x") == 0
    assert engine.serve(tokens, seed=3, salt="a", lora="x") == 256
    for other in ({"salt": "a"}, {"salt": "b", "lora": "x"}, {"salt": "a", "lora": "y"}, {"salt": "disagg-lora:1:x:a"}):
        assert engine.serve(tokens, seed=3, **other) == 0
    other_model = PlayedEngine(server.folder / "other-model", server)
    assert other_model.serve(tokens, seed=3, salt="a", lora="x") == 0
    other_model.close()


def test_both_loads_of_one_request_are_told_once_and_what_came_over_the_wire_is_stored(engine: PlayedEngine) -> None:
    tokens = prompt(600, seed=4)
    assert engine.serve(tokens[:200], seed=4) == 0
    request = engine.request(tokens)
    assert engine.looked_up(request) == 192
    blocks = engine.allocate(request, 192, wire=407)
    for _ in range(20):
        assert engine.step() == Completions(), "the wire's part is still to come"
    engine.fill(Blocks(blocks.block_ids[6:]), seed=5)
    done = engine.until(lambda done: bool(done.received), own=Completions(received=(request.request_id,)))
    assert done == Completions(received=(request.request_id,))
    request.status = RequestStatus.RUNNING
    engine.step(request, 1)
    engine.finish(request)
    again = engine.request(tokens)
    assert engine.looked_up(again) == 576, "chunks that nobody computed here"
    engine.finish(again)


def test_found_and_not_used_is_unlocked_whatever_became_of_the_request(
    engine: PlayedEngine, server: LMCacheServer
) -> None:
    tokens = prompt(300, seed=6)
    engine.serve(tokens, seed=6)
    aborted = engine.request(tokens)
    assert engine.looked_up(aborted) == 256
    assert server.status()["l1_manager"]["read_locked_count"] > 0
    aborted.status = RequestStatus.FINISHED_ABORTED
    assert not engine.scheduler.finished(aborted)
    server.when(holds_nothing_locked)
    held_meanwhile = engine.request(tokens)
    assert engine.looked_up(held_meanwhile) == 256
    assert engine.looked_up(held_meanwhile, cached=288) == 0, "another request brought the prefix in the meantime"
    engine.allocate(held_meanwhile, 0, cached=288)
    server.when(holds_nothing_locked)
    held_meanwhile.num_computed_tokens = 288
    engine.step(held_meanwhile, 12)
    engine.finish(held_meanwhile)


def test_an_abort_before_the_answer_and_one_during_both_loads_leave_nothing(
    engine: PlayedEngine, server: LMCacheServer
) -> None:
    tokens = prompt(300, seed=7)
    engine.serve(tokens, seed=7)
    early = engine.request(tokens)
    assert engine.scheduler.look_up(early, 0) is None
    early.status = RequestStatus.FINISHED_ABORTED
    assert not engine.scheduler.finished(early)
    engine.until(lambda _: not engine.scheduler.needs_steps)
    server.when(holds_nothing_locked)
    loading = engine.request(tokens)
    assert engine.looked_up(loading) == 256
    engine.allocate(loading, 256, wire=43)
    engine.step()
    loading.status = RequestStatus.FINISHED_ABORTED
    assert not engine.scheduler.finished(loading)
    done = engine.until(lambda done: bool(done.received), own=Completions(received=(loading.request_id,)))
    assert done.received == (loading.request_id,)


def test_a_server_that_hangs_costs_the_deadline_and_its_late_answer_is_given_back(server: LMCacheServer) -> None:
    engine = PlayedEngine(server.folder / "model", server, request_timeout_s=30, heartbeat_s=30)
    tokens = prompt(300, seed=8)
    engine.serve(tokens, seed=8)
    request = engine.request(tokens)
    before = engine.steps
    with server.hanging():
        assert engine.looked_up(request) == 0
        assert engine.totals["lookup_timeout"] == 1
        assert engine.steps - before >= 10, "the engine's steps go on while one request waits"
        engine.allocate(request, 0)
    engine.step(request, 300)
    engine.until(lambda _: not engine.scheduler.snapshot()["unanswered_lookups"])
    server.when(holds_nothing_locked)
    engine.finish(request)
    assert engine.scheduler.snapshot()["tracked_requests"] == 0
    engine.close()


def test_a_server_that_dies_before_the_load_fails_it_and_one_that_returns_is_used(
    engine: PlayedEngine, server: LMCacheServer
) -> None:
    tokens = prompt(300, seed=9)
    engine.serve(tokens, seed=9)
    server.when(is_written)
    request = engine.request(tokens)
    assert engine.looked_up(request) == 256
    os.killpg(server.pid, signal.SIGKILL)
    blocks = engine.allocate(request, 256, wire=43)
    done = engine.until(lambda done: bool(done.received), own=Completions(received=(request.request_id,)))
    assert done.received == (request.request_id,)
    assert done.invalid_block_ids == frozenset(blocks.block_ids[:8])
    request.num_computed_tokens = 0  # as vLLM: nothing before the first invalid block is left
    assert engine.looked_up(request) == 0, "and the engine computes it"
    engine.allocate(request, 0)
    engine.step(request, 300)
    engine.finish(request)
    assert engine.totals["failed_loads"] == 1
    server.stop()
    server.start(l2=server.folder / "l2")
    for attempt in range(200):  # until the heartbeats have noticed
        if engine.serve(tokens, seed=9) == 256:
            break
        assert attempt < 199
        Event().wait(0.05)


def test_a_block_size_that_does_not_divide_the_chunk_is_refused_with_both_numbers(server: LMCacheServer) -> None:
    config, caches = config_of(server.folder / "odd", block_size=48)
    settings = LMCacheSettings(url=server.url)
    with pytest.raises(ConfigError, match=rf"chunk size {CHUNK} must be a multiple of 48.*--block-size is 48"):
        create_child(config, KVConnectorRole.SCHEDULER, caches, settings)


def test_a_port_where_nobody_speaks_lmcache_is_an_unreachable_server(tmp_path: Path) -> None:
    import socket

    config, caches = config_of(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        strict = LMCacheSettings(url=url, lookup_timeout_ms=100, request_timeout_s=0.5)
        lenient = strict.model_copy(update={"on_unreachable": "warn"})
        with pytest.raises(ConfigError, match="no LMCache server at"):
            create_child(config, KVConnectorRole.SCHEDULER, caches, strict)
        child, problem = create_child(config, KVConnectorRole.SCHEDULER, caches, lenient)
    assert child is None
    assert "no LMCache server at" in problem
