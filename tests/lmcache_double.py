"""LMCache's connector as our child, played by a strict double; and both of our halves around it, without an engine."""

import warnings
from collections import Counter
from types import SimpleNamespace
from typing import Any

from disagg_plugin.cache_settings import LMCacheSettings
from disagg_plugin.kv.dataplane import Completions

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, when vLLM imports its compiler
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorTransferResults
    from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput

    from disagg_vllm.connector import DisaggConnector
    from disagg_vllm.lmcache_tier import LMCacheScheduler, LMCacheWorker

__all__ = ["DisaggConnector", "KVConnectorBase_V1", "KVConnectorTransferResults"]  # imported with their warnings

BLOCK = 32
SETTINGS = LMCacheSettings(url="tcp://127.0.0.1:5555", lookup_timeout_ms=1000)


class Blocks:
    def __init__(self, *block_ids: int) -> None:
        self._block_ids = list(block_ids)

    def get_block_ids(self) -> tuple[list[int]]:
        return (self._block_ids,)


def request(name: str = "r", tokens: int = 400, **more: Any) -> Any:
    fields = {
        "request_id": name,
        "prompt_token_ids": list(range(tokens)),
        "cache_salt": None,
        "lora_request": None,
        "kv_transfer_params": None,
        **more,
    }
    return SimpleNamespace(**fields)


def step_of(computed: dict[str, tuple[int, int]] | None = None, *, new: bool = True, preempted: Any = ()) -> Any:
    """A scheduler's step: request -> (tokens computed before, tokens of this step)."""
    computed = computed or {}
    output = SchedulerOutput.make_empty()
    output.num_scheduled_tokens = {name: tokens for name, (_, tokens) in computed.items()}
    output.total_num_scheduled_tokens = sum(output.num_scheduled_tokens.values())
    output.preempted_req_ids = set(preempted)
    if new:
        output.scheduled_new_reqs = [
            SimpleNamespace(req_id=name, num_computed_tokens=before) for name, (before, _) in computed.items()
        ]
    else:
        output.scheduled_cached_reqs = CachedRequestData(
            req_ids=list(computed),
            resumed_req_ids=set(),
            new_token_ids=[],
            all_token_ids={},
            new_block_ids=[None] * len(computed),
            num_computed_tokens=[before for before, _ in computed.values()],
            num_output_tokens=[0] * len(computed),
        )
    return output


class StrictChild:
    """Asserts what LMCache asserts, and keeps books as it does."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.answer: int | None = 0
        self.trackers: dict[str, dict[str, Any]] = {}
        self.locked: set[str] = set()
        self.results = KVConnectorTransferResults()
        self.errors: set[int] = set()
        self.raises = ""

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        if callable(found) and name != "raises" and not name.startswith("_"):
            self.calls[name] += 1
            if object.__getattribute__(self, "raises") == name:
                raise RuntimeError("broken")
        return found

    def get_num_new_matched_tokens(self, shown: Any, cached: int) -> tuple[int | None, bool]:
        tracker = self.trackers.setdefault(shown.request_id, {"told": 0, "blocks": 0, "salt": shown.cache_salt})
        if self.answer is None:
            return None, True
        tracker["base"] = max(cached, cached + self.answer)
        if self.answer:
            self.locked.add(shown.request_id)
        return self.answer, self.answer > 0

    def update_state_after_alloc(self, shown: Any, blocks: Any, tokens: int) -> None:
        tracker = self.trackers[shown.request_id]
        tracker["blocks"] = len(blocks.get_block_ids()[0])
        self.locked.discard(shown.request_id)

    def build_connector_meta(self, output: Any) -> object:
        scheduled = [r.req_id for r in output.scheduled_new_reqs] + output.scheduled_cached_reqs.req_ids
        for name in scheduled:
            self.trackers[name]["told"] += output.num_scheduled_tokens[name]
        return ("metadata", tuple(scheduled))

    def request_finished(self, shown: Any, block_ids: list[int]) -> tuple[bool, None]:
        assert shown.kv_transfer_params is None
        del self.trackers[shown.request_id]
        return True, None

    def get_transfer_results(self, finished: set[str]) -> KVConnectorTransferResults:
        results, self.results = self.results, KVConnectorTransferResults()
        results.finished_sending |= finished
        return results

    def get_block_ids_with_load_errors(self) -> set[int]:
        errors, self.errors = self.errors, set()
        return errors

    def get_kv_connector_stats(self) -> Any:
        return SimpleNamespace(data={"lookup_duration_seconds": [0.25]})

    def _nothing(self, *args: Any) -> None:
        return None

    update_connector_output = take_events = reset_cache = bind_kv_cache_manager = shutdown = _nothing
    register_kv_caches = bind_connector_metadata = clear_connector_metadata = start_load_kv = _nothing
    wait_for_save = handle_preemptions = get_kv_connector_kv_cache_events = get_mem_pool_context = _nothing
    set_host_xfer_buffer_ops = finish_forward = reset_capture_state = _nothing
    unregister_kv_caches = restore_kv_caches = _nothing


class Pair:
    """Both halves with their children, and the clock of the scheduler's."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.child, self.worker_child = StrictChild(), StrictChild()
        self.scheduler = LMCacheScheduler(self.child, "", SETTINGS, block_size=BLOCK, clock=lambda: self.now_s)
        self.worker = LMCacheWorker(self.worker_child, "")
        self.scheduler.ready([])

    def step(self, output: Any = None, own: Completions | None = None) -> Completions:
        """One step of the engine; what it is told."""
        step = self.scheduler.build_step(output if output is not None else step_of())
        self.worker.bind(step)
        self.worker.start_loads(None)
        self.worker.start_saves()
        done = self.worker.completions(own or Completions())
        self.worker.unbind()
        self.scheduler.update(
            SimpleNamespace(finished_recving=set(done.received)),
            self.worker.take_failed(),
            self.worker.child.problem,
        )
        return done

    def load(self, found: int = 256, wire: int = 143, cached: int = 0, name: str = "r") -> Any:
        """A request whose blocks wait for both loads."""
        self.child.answer = found
        held = request(name, cached + found + wire + 1)
        assert self.scheduler.look_up(held, cached) == found
        self.scheduler.promise(name, cached, found)
        blocks = Blocks(*range(1, -(-held.prompt_token_ids.__len__() // BLOCK) + 1))
        assert self.scheduler.allocated(held, blocks, found + wire) == wire
        return held
