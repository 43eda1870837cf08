"""vLLM's connector over a stand-in of its scheduler: the calls that the engine makes, in its order."""

from types import SimpleNamespace
from typing import Any

import torch
from contract.rig import GEOMETRY, PAGE, PAGES, SETTINGS, FakePort, new_plane

from disagg_plugin.testing import DenseView, MemoryNetwork
from disagg_vllm import scheduler_side, worker_side
from disagg_vllm.metadata import RankHandshake


class VllmRig:
    """See ``contract.rig.DecodeRig``.

    Args:
        ends_empty_steps: vLLM 0.30 calls no ``wait_for_save`` in a step that computes nothing.
    """

    def __init__(
        self, network: MemoryNetwork, port: FakePort, monkeypatch: Any, *, ends_empty_steps: bool = True
    ) -> None:
        self._ends_empty_steps = ends_empty_steps
        self.cache = DenseView(GEOMETRY, blocks=PAGES, block_size=PAGE)
        self.plane = new_plane(network, "d", self.cache)
        service = SimpleNamespace(decode=port, prefill=None, engine="d", port=1, start=lambda: None)
        for module in (scheduler_side, worker_side):
            monkeypatch.setattr(module, "unsupported_engine", lambda *_: None)
        monkeypatch.setattr(scheduler_side, "ControlService", lambda *_, **__: service)
        monkeypatch.setattr(scheduler_side, "model_identity", lambda *_: None)
        config: Any = SimpleNamespace(
            cache_config=SimpleNamespace(block_size=PAGE, enable_prefix_caching=True),
            model_config=SimpleNamespace(max_model_len=4096, served_model_name="m", model="m"),
            parallel_config=SimpleNamespace(data_parallel_rank=0, rank=0),
            scheduler_config=SimpleNamespace(policy="fcfs", max_num_batched_tokens=512),
        )
        self.free = list(range(1, PAGES))
        pool = SimpleNamespace(num_gpu_blocks=PAGES, get_num_free_blocks=lambda: len(self.free), get_usage=lambda: 0.0)
        self.scheduler = scheduler_side.SchedulerSide(config, None, SETTINGS)  # type: ignore[arg-type]
        self.scheduler.bind_block_pool(pool)
        self.scheduler.ranks_ready({0: RankHandshake(0, self.plane.endpoint, GEOMETRY)})
        self.worker = worker_side.WorkerSide(config, None, SETTINGS)  # type: ignore[arg-type]
        self.worker._plane = self.plane
        self.requests: dict[str, Any] = {}
        self.waiting: list[str] = []
        self.loading: dict[str, int] = {}
        self.blocks: dict[str, list[int]] = {}
        self.ready: dict[str, int] = {}
        self.gone: set[str] = set()

    def send(self, request_id: str, prompt: list[int], **params: object) -> None:
        request = SimpleNamespace(
            request_id=request_id,
            num_prompt_tokens=len(prompt),
            prompt_token_ids=prompt,
            kv_transfer_params=params or None,
            cache_salt=None,
            trace_headers=None,
            lora_request=None,
            priority=0,
            sampling_params=SimpleNamespace(prompt_logprobs=None),
            pooling_params=None,
            prompt_embeds=None,
            mm_features=[],
            num_preemptions=0,
            num_output_tokens=0,
        )
        self.requests[request_id] = request
        self.scheduler.on_new_request(request)
        self.waiting.append(request_id)

    def abort(self, request_id: str) -> None:
        if request_id in self.waiting:
            self.waiting.remove(request_id)
        self.ready.pop(request_id, None)
        self.scheduler.finished(self.requests[request_id], completed=False)
        if request_id in self.loading:
            self.gone.add(request_id)  # vLLM keeps the blocks until the workers report the load
        else:
            self.free += self.blocks.pop(request_id, [])

    def turn(self) -> None:
        for request_id in list(self.waiting):
            request = self.requests[request_id]
            external, is_async = self.scheduler.match(request, 0)
            if external is None:
                continue
            self.waiting.remove(request_id)
            if not is_async:
                self.ready[request_id] = 0
                continue
            count = -(-(external + 1) // PAGE)
            taken, self.free = self.free[:count], self.free[count:]
            self.blocks[request_id] = taken
            self.loading[request_id] = external
            blocks: Any = SimpleNamespace(get_block_ids=lambda taken=taken: (taken,))
            self.scheduler.allocated(request, blocks, external)
        empty = SimpleNamespace(
            preempted_req_ids=None,
            scheduled_new_reqs=[],
            scheduled_cached_reqs=SimpleNamespace(req_ids=[], num_computed_tokens=[]),
            num_scheduled_tokens={},
            total_num_scheduled_tokens=0,
        )
        commands = self.scheduler.build_commands(empty)
        self.worker.begin_step(commands)
        if self._ends_empty_steps:
            self.worker.end_step(commands)
        _, received = self.worker.completions(commands)
        invalid = self.worker.take_invalid_block_ids()
        output: Any = SimpleNamespace(
            kv_connector_worker_meta=self.worker.report(commands.number),
            finished_recving=received,
            finished_sending=None,
        )
        self.scheduler.update(output)
        for request_id in received or ():
            self._loaded(request_id, invalid)

    def _loaded(self, request_id: str, invalid: set[int]) -> None:
        tokens, blocks = self.loading.pop(request_id), self.blocks[request_id]
        bad = next((at for at, block in enumerate(blocks) if block in invalid), None)
        if request_id in self.gone:
            self.free += self.blocks.pop(request_id)
        else:
            self.ready[request_id] = tokens if bad is None else bad * PAGE

    def runnable(self, request_id: str) -> int | None:
        return self.ready.get(request_id)

    def kv_of(self, request_id: str, tokens: int) -> torch.Tensor:
        return self.cache.read(self.blocks[request_id], 0, tokens)

    def end(self, request_id: str) -> None:
        self.ready.pop(request_id, None)
        self.scheduler.finished(self.requests[request_id], completed=True)
        self.free += self.blocks.pop(request_id, [])

    def pages_taken(self) -> int:
        assert len(self.free) == len(set(self.free)), "a block was freed twice"
        return PAGES - 1 - len(self.free)

    def view(self) -> dict[str, object]:
        assert self.worker.hook_failures == 0
        decode = self.scheduler._decode
        assert decode is not None
        return decode.snapshot()
