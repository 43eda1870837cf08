"""SGLang's connector over a stand-in of its scheduler: a prefix cache, a page allocator and a waiting queue."""

from array import array
from types import SimpleNamespace
from typing import Any

import sglang.srt.disaggregation.utils
import sglang.srt.mem_cache.common
import sglang.srt.mem_cache.radix_cache  # noqa: F401  what the connector imports when it is first used
import torch
from contract.rig import GEOMETRY, PAGE, PAGES, SETTINGS, FakePort, new_plane

from disagg_plugin.admission.engine_queue import EngineQueue
from disagg_plugin.control.decode_side import DecodeSide
from disagg_plugin.control.prompt_fill import PromptFill
from disagg_plugin.kv.slot_view import SlotView
from disagg_plugin.testing import MemoryNetwork
from disagg_sglang.fill_engine import SchedulerQueue


class FakeTree:
    """A prefix cache of whole prompts; a node is the tuple of its tokens."""

    def __init__(self, allocator: "FakeAllocator") -> None:
        self.token_to_kv_pool_allocator = allocator
        self.held: dict[tuple[int, ...], torch.Tensor] = {}
        self.locks: list[tuple[int, ...]] = []

    def match_prefix(self, params: Any) -> Any:
        wanted = tuple(params.key.raw_token_ids())
        found = max((t for t in self.held if wanted[: len(t)] == t), key=len, default=())
        return SimpleNamespace(device_prefix_len=len(found), last_device_node=found)

    def path_device_indices(self, node: tuple[int, ...]) -> torch.Tensor:
        return self.held.get(node, torch.empty(0, dtype=torch.int64))

    def insert(self, params: Any) -> Any:
        tokens = tuple(params.key.raw_token_ids())
        assert len(tokens) == len(params.value)
        assert len(tokens) % PAGE == 0
        self.held[tokens] = params.value
        return SimpleNamespace(last_device_node=tokens)

    def lock(self, node: tuple[int, ...]) -> tuple[int, ...]:
        self.locks.append(node)
        return node

    def unlock(self, lock: tuple[int, ...]) -> None:
        self.locks.remove(lock)

    def evictable_size(self) -> int:
        return 0

    def supports_prefix_sharing(self) -> bool:
        return True


class FakeAllocator:
    page_size = PAGE

    def __init__(self) -> None:
        self.free_pages = list(range(1, PAGES))

    def available_size(self) -> int:
        return len(self.free_pages) * PAGE

    def evict_to_free_tokens(self, _tree: FakeTree, _tokens: int) -> None:
        """Nothing can be evicted here."""

    def alloc(self, tokens: int) -> torch.Tensor | None:
        count = tokens // PAGE
        if count > len(self.free_pages):
            return None
        pages, self.free_pages = self.free_pages[:count], self.free_pages[count:]
        return (torch.tensor(pages)[:, None] * PAGE + torch.arange(PAGE)).flatten()

    def free(self, slots: torch.Tensor) -> None:
        self.free_pages += sorted({int(slot) // PAGE for slot in slots})


class SglangRig:
    """See ``contract.rig.DecodeRig``."""

    def __init__(self, network: MemoryNetwork, port: FakePort) -> None:
        shape = (PAGES * PAGE, GEOMETRY.kv_heads, GEOMETRY.head_dim)
        sides = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(GEOMETRY.layers)]
        self.slots = SlotView(sides, geometry=GEOMETRY, page_size=PAGE)
        self.plane = new_plane(network, "d", self.slots)
        allocator = FakeAllocator()
        self.tree = FakeTree(allocator)
        self.scheduler = SimpleNamespace(
            tree_cache=self.tree,
            token_to_kv_pool_allocator=allocator,
            waiting_queue=[],
            chunked_req=None,
            last_batch=None,
            max_queued_requests=None,
            _engine_paused=False,
            running_batch=SimpleNamespace(is_empty=lambda: not self.running),
            grammar_manager=SimpleNamespace(grammar_queue=[]),
        )
        self.running: set[str] = set()
        self.requests: dict[str, Any] = {}
        self.decode = DecodeSide(SETTINGS, port, engine="d", kv_capacity_tokens=PAGES * PAGE)
        self.queue = EngineQueue()
        engine = SchedulerQueue(self.scheduler, port)  # type: ignore[arg-type]  # the port is both
        self.fill = PromptFill(engine, self.decode, self.queue)

    def send(self, request_id: str, prompt: list[int], **fields: object) -> None:
        ended = SimpleNamespace(value=False)
        absent = ("bootstrap_host", "bootstrap_room", "input_embeds", "positional_embed_overrides", "multimodal_inputs")
        absent += ("to_finish", "session", "lora_id", "extra_key", "token_type_ids", "cache_salt", "priority")
        no = ("return_logprob", "return_hidden_states", "return_routed_experts", "skip_radix_cache_insert")
        given = {
            "rid": request_id,
            "origin_input_ids": array("q", prompt),
            "bootstrap_port": 8998,
            "sampling_params": SimpleNamespace(custom_params=None),
            "ended": ended,
            "finished": lambda: ended.value,
        }
        req = SimpleNamespace(**{**dict.fromkeys(absent), **dict.fromkeys(no, False), **given, **fields})
        self.requests[request_id] = req
        if not self.fill.take(req, lambda: self.scheduler.waiting_queue.append(req)):
            self.scheduler.waiting_queue.append(req)

    def abort(self, request_id: str) -> None:
        self.fill.abort(request_id, everything=False)
        self.scheduler.waiting_queue[:] = [r for r in self.scheduler.waiting_queue if r.rid != request_id]
        self.running.discard(request_id)

    def turn(self) -> None:
        self.plane.apply(self.fill.commands())
        self.plane.after_forward(computed=False)
        done, report = self.plane.take_completions(), self.plane.report()
        self.fill.ended(report, done)

    def runnable(self, request_id: str) -> int | None:
        req = self.requests[request_id]
        if req not in self.scheduler.waiting_queue:
            return None
        key = SimpleNamespace(raw_token_ids=lambda: req.origin_input_ids[:-1])
        return int(self.tree.match_prefix(SimpleNamespace(key=key)).device_prefix_len)

    def kv_of(self, request_id: str, tokens: int) -> torch.Tensor:
        held = self.tree.held[tuple(self.requests[request_id].origin_input_ids[:tokens])]
        pages = tuple((held[::PAGE] // PAGE).tolist())
        layers = [
            torch.stack([self.slots.gather(layer, side, pages, 0, tokens) for side in range(2)])
            for layer in range(GEOMETRY.layers)
        ]
        return torch.stack(layers)

    def end(self, request_id: str) -> None:
        req = self.requests[request_id]
        self.scheduler.waiting_queue[:] = [r for r in self.scheduler.waiting_queue if r is not req]
        req.ended.value = True

    def pages_taken(self) -> int:
        cached = {int(slot) // PAGE for slots in self.tree.held.values() for slot in slots}
        free = self.scheduler.token_to_kv_pool_allocator.free_pages
        assert len(free) == len(set(free)), "a page was freed twice"
        assert not cached & set(free), "a cached page is free"
        return PAGES - 1 - len(free) - len(cached)

    def view(self) -> dict[str, object]:
        assert self.tree.locks == []
        assert self.fill.snapshot() == {"waiting": 0, "receiving": 0, "locked": 0}
        return self.decode.snapshot()
