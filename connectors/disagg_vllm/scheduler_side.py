"""The connector inside vLLM's scheduler process: translates the engine's calls for both roles, and nothing more."""

import logging
import signal
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from disagg_plugin.admission.engine_queue import EngineQueue
from disagg_plugin.admission.engine_state import to_plain
from disagg_plugin.config import DisaggSettings, not_active_yet
from disagg_plugin.control.decode_port import Answer, Claim, NotYet, PrefillLocally, Route
from disagg_plugin.control.decode_side import DecodeSide
from disagg_plugin.control.events import Held
from disagg_plugin.control.leaving import before_handler
from disagg_plugin.control.load import LoadTracker
from disagg_plugin.control.load_reports import HeldPrompt
from disagg_plugin.control.offload_call import transfer_id_of
from disagg_plugin.control.prefill_side import PrefillSide
from disagg_plugin.control.router_flow import hand_over_params, handed_over, is_handed_over, wants_hold
from disagg_plugin.control.service import ControlService, EngineFacts
from disagg_plugin.control.standstill import Steps
from disagg_plugin.control.step_times import PromptWork
from disagg_plugin.errors import DisaggError
from disagg_plugin.kv.commands import Command, RankEndpoint
from disagg_plugin.observability.engine_stats import EngineStats
from disagg_plugin.observability.journal import Journal
from disagg_plugin.observability.spans import TransferSpans, active_tracer
from disagg_plugin.serving.latency import HERE
from disagg_policies.snapshots import DecodeState
from disagg_vllm.admin_route import word
from disagg_vllm.identity import model_identity
from disagg_vllm.lmcache_tier import LMCacheScheduler
from disagg_vllm.metadata import RankHandshake, StepCommands, StepReports
from disagg_vllm.prefix_cache import cached_tokens as cached_tokens_of
from disagg_vllm.prefix_cache import can_look_up
from disagg_vllm.prompts import adapter_of, held_prompt, prompt_view
from disagg_vllm.stats import DisaggStats
from disagg_vllm.support import dp_rank_of, http_dp_rank_of, unsupported_engine

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.metrics.cache_hit_source import CacheHitSource  # since 0.32
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger("vllm.disagg")

MAX_SAID = 16  # hosts that requests may name and we complain about


class SchedulerSide:
    """One DP rank's scheduler process. Inactive (every request local) until ``ranks_ready`` found no problem."""

    def __init__(
        self,
        vllm_config: "VllmConfig",
        kv_cache_config: "KVCacheConfig",
        settings: DisaggSettings,
        tier: LMCacheScheduler | None = None,
    ) -> None:
        self.tier = tier
        self._undecided: dict[str, Request] = {}  # arrived, and LMCache has not answered
        self._vllm_config = vllm_config
        self._settings = settings
        self._block_size: int = vllm_config.cache_config.block_size
        self._block_pool: BlockPool | None = None
        self._looks_up = False
        self._load = LoadTracker(by_priority=vllm_config.scheduler_config.policy == "priority")
        self._step = self._computing_steps = 0
        self._prompts: dict[str, HeldPrompt] = {}  # queued or being computed here
        self._cache_map: object = None  # vLLM's; a new one each time it empties its prefix cache
        self._service: ControlService | None = None
        self._decode: DecodeSide | None = None
        self._prefill: PrefillSide | None = None
        self._undo: Callable[[], None] = lambda: None  # what we did to the process's signals
        self._journal = Journal()
        self._endpoints: tuple[RankEndpoint, ...] = ()
        self._ranks_are_ready = False
        self.figures = EngineStats(
            settings,
            self._journal,
            self._figures,
            ring_slots=lambda: sum(endpoint.ring_slots for endpoint in self._endpoints),
            ranks=lambda: len(self._endpoints),
        )
        self._spans = TransferSpans(active_tracer())
        self._journal.on_transfer_over(self._spans.transfer_over)
        self._unknown_holders: set[str] = set()
        self._queue: EngineQueue | None = None
        if settings.qos.enable_early_rejection:
            self._queue, self.figures.engine_state = EngineQueue(), self._engine_state
        self.inactive_reason = unsupported_engine(vllm_config, kv_cache_config) or "not started"
        self._announce_inactive = self.inactive_reason != "not started"

    # -- life --------------------------------------------------------------------------------------------------

    def bind_block_pool(self, block_pool: "BlockPool") -> None:
        self._block_pool = block_pool
        self._looks_up = can_look_up(block_pool)
        if not self._looks_up:
            logger.warning("disagg: this vLLM's prefix cache cannot be looked into: prompts are decided on late")

    def ranks_ready(self, ranks: dict[int, RankHandshake]) -> None:
        """All workers have registered their caches: start the side channel, or say once why not.

        vLLM 0.33 calls it again at each wake-up, also of an engine that never slept; the first call counts.
        """
        if self._ranks_are_ready:
            return
        self._ranks_are_ready = True
        if self.tier is not None:  # whatever becomes of the rest: it serves local prompts as well
            self.tier.ready([r.lmcache_problem for r in ranks.values()])
        problem = next((r.problem for r in ranks.values() if r.problem), "")
        if self._announce_inactive or problem:
            self.inactive_reason = problem or self.inactive_reason
            logger.warning(
                "disagg is installed but not active: %s. Every prompt is prefilled locally.", self.inactive_reason
            )
            return
        ordered = [ranks[rank] for rank in sorted(ranks)]
        geometry = ordered[0].geometry
        assert geometry is not None
        config = self._vllm_config
        self._endpoints = tuple(r.endpoint for r in ordered if r.endpoint is not None)
        facts = EngineFacts(
            model=model_identity(config, self._settings),
            geometry=geometry,
            endpoints=self._endpoints,
            max_prompt_tokens=config.model_config.max_model_len - 1,
            dp_rank=dp_rank_of(config.parallel_config),
            http_dp_rank=http_dp_rank_of(config.parallel_config),
            prefix_capacity_tokens=self._capacity_tokens() if config.cache_config.enable_prefix_caching else 0,
            by_priority=config.scheduler_config.policy == "priority",
        )
        self._service = service = ControlService(self._settings, facts, snapshot=self._snapshot, word=word())
        service.start()
        capacity = self._capacity_tokens()
        if service.decode is not None:
            self._decode = DecodeSide(
                self._settings,
                service.decode,
                engine=service.engine,
                kv_capacity_tokens=capacity,
                ranks=len(ordered),
                load=self._load,
                step_tokens=config.scheduler_config.max_num_batched_tokens,  # the workers' are not known; mostly equal
                journal=self._journal,
            )
        if service.prefill is not None:
            self._prefill = PrefillSide(
                self._settings,
                service.prefill,
                ranks=len(ordered),
                kv_capacity_tokens=capacity,
                journal=self._journal,
            )
            self._undo = before_handler(signal.SIGTERM, partial(service.prefill.leave, for_good=True))
        self.inactive_reason = ""
        for line in [*self._other_model(), *not_active_yet(self._settings)]:
            logger.warning("disagg: %s", line)
        logger.info(
            "disagg is active: role %s, side channel on %s:%d, %d prefill worker(s)",
            self._settings.role,
            self._settings.side_channel.host,
            service.port,
            len(self._settings.prefill_workers) if service.decode is not None else 0,
        )
        if service.decode is not None and not self._settings.prefill_workers and self._settings.role == "decode":
            logger.warning("disagg: role decode without prefill_workers: every prompt is prefilled locally")

    def close(self) -> None:
        self._undo()
        if self._decode is not None:
            self._decode.close()
        if self._service is not None:
            self._service.close()
            self._service = None
        if self.tier is not None:
            self.tier.child.close()
        self._spans.close()

    # -- the engine's calls, in the order of a step ------------------------------------------------------------

    def on_new_request(self, request: "Request") -> None:
        self.figures.request_came()
        self._spans.remember(request.request_id, request.trace_headers)
        if self._queue is not None:
            self._queue.arrived(request.request_id, request.num_prompt_tokens, request.priority)
        prompt_tokens = request.num_prompt_tokens
        ours = False
        if self._prefill is not None:
            transfer_id = transfer_id_of(request.kv_transfer_params)
            ours = transfer_id is not None and self._prefill.new_request(
                request.request_id, transfer_id, prompt_tokens, adapter=adapter_of(request)
            )
            if (prompt := held_prompt(request)) is not None:
                self._prompts[request.request_id] = prompt
                if not ours and wants_hold(request.kv_transfer_params):
                    held = Held(prompt.token_ids, (prompt.lora, prompt.salt), adapter_of(request))
                    self._prefill.hold(request.request_id, held)
                    ours = True
        if ours or self._decode is None:
            self._load.arrived(request.request_id, prompt_tokens, priority=request.priority)
        elif self._looks_up:
            self._decide_early(request)
        if self._prefill is not None:
            self._publish_load()

    def match(self, request: "Request", cached_tokens: int) -> tuple[int | None, bool]:
        """vLLM's form of an answer: (tokens or None for "not yet", loaded asynchronously)."""
        stored_tokens = self._stored(request, cached_tokens)
        if stored_tokens is None:
            return None, False
        self._undecided.pop(request.request_id, None)
        if self._queue is not None:
            self._queue.cached(request.request_id, cached_tokens + stored_tokens)
        wire_tokens = self._match_wire(request, cached_tokens, stored_tokens)
        if wire_tokens is None:
            return None, False
        if self.tier is not None:
            self.tier.promise(request.request_id, cached_tokens, stored_tokens)
        return stored_tokens + wire_tokens, stored_tokens + wire_tokens > 0

    def _stored(self, request: "Request", cached_tokens: int) -> int | None:
        """What LMCache will load beyond the engine's own cache; None for "not yet"."""
        return self.tier.look_up(request, cached_tokens) if self.tier is not None else 0

    def _decide_early(self, request: "Request") -> None:
        """At a request's arrival, and each step until LMCache has answered: its turn may be far away."""
        assert self._decode is not None
        assert self._block_pool is not None
        cached_tokens = cached_tokens_of(self._block_pool, request, self._block_size)
        stored_tokens = self._stored(request, cached_tokens)
        if stored_tokens is None:
            self._undecided[request.request_id] = request
        else:
            self._undecided.pop(request.request_id, None)
            self._answer(request, cached_tokens, stored_tokens, self._decode)

    def _match_wire(self, request: "Request", cached_tokens: int, stored_tokens: int) -> int | None:
        """What a prefill worker will send beyond what D's own cache and LMCache hold; None for "not yet"."""
        if self._decode is None or (self._prefill is not None and self._prefill.is_ours(request.request_id)):
            return 0
        match self._answer(request, cached_tokens, stored_tokens, self._decode):
            case Claim(tokens):
                return tokens
            case NotYet():
                return None
            case _:
                return 0

    def _answer(self, request: "Request", cached_tokens: int, stored_tokens: int, decode: DecodeSide) -> Answer:
        """Decide at the first call, when the request arrives; what became of it at the others, when its turn comes."""
        local_only, route = None, None
        if is_handed_over(request.kv_transfer_params) and not decode.knows(request.request_id):
            route = self._route_of(request)
            local_only = "unknown_holder" if route is None else None
        prompt = prompt_view(request, self._spans.headers_of(request.request_id), local_only=local_only, route=route)
        answer = decode.match(
            prompt,
            cached_tokens,
            free_tokens=self._free_tokens(),
            lmcache_tokens=cached_tokens + stored_tokens if stored_tokens else 0,
        )
        if self._queue is not None:
            self._queue.landing(request.request_id, not isinstance(answer, PrefillLocally))
        return answer

    def allocated(self, request: "Request", blocks: "KVCacheBlocks", external_tokens: int) -> None:
        wire_tokens = external_tokens
        if self.tier is not None:
            wire_tokens = self.tier.allocated(request, blocks, external_tokens)
        if self._decode is not None and wire_tokens:
            (block_ids,) = blocks.get_block_ids()
            self._decode.allocated(request.request_id, tuple(block_ids), wire_tokens)

    def hit_sources(self, request: "Request", external_tokens: int) -> "dict[CacheHitSource, int]":
        """Where an allocated request's external tokens come from, as vLLM counts them since 0.32."""
        from vllm.v1.metrics.cache_hit_source import CacheHitSource

        loads = self.tier.hit_tokens(request.request_id) if self.tier is not None else 0
        stored_tokens = min(loads, external_tokens)
        split = {CacheHitSource.HOST: stored_tokens, CacheHitSource.P2P: external_tokens - stored_tokens}
        return {source: tokens for source, tokens in split.items() if tokens}

    def build_commands(self, output: "SchedulerOutput") -> StepCommands:
        self._step += 1
        self._computing_steps += output.total_num_scheduled_tokens > 0
        commands: list[Command] = []
        for request in list(self._undecided.values()):
            self._decide_early(request)
        self._count_step(output)
        if self._prefill is not None:
            commands += self._prefill.step()
        if self._decode is not None:
            commands += self._decode.step()
        tier = self.tier.build_step(output) if self.tier is not None else None
        return StepCommands(tuple(commands), output.total_num_scheduled_tokens > 0, self._step, tier)

    def _count_step(self, output: "SchedulerOutput") -> None:
        """What this step computes: for the load, for the model of our own speed, and for what P exports."""
        for request_id in output.preempted_req_ids or ():
            self._load.preempted(request_id)
            if self._queue is not None:
                self._queue.preempted(request_id)
            if self._prefill is not None:
                self._prefill.preempted(request_id)
        computed = {r.req_id: r.num_computed_tokens for r in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        scheduled = output.num_scheduled_tokens
        if self._queue is not None:
            for request_id, before in computed.items():
                self._queue.computed(request_id, before + scheduled[request_id])
        steps = ((request_id, before, before + scheduled[request_id]) for request_id, before in computed.items())
        for work in self._load.step_of(self._step, steps):
            if self._prefill is not None:
                self._export(output, work, self._prefill)
        if self._prefill is not None:
            self._publish_load()

    def _export(self, output: "SchedulerOutput", work: PromptWork, prefill: PrefillSide) -> None:
        """Tell the prefill role what the step computes of one prompt, from the engine's own block tables."""
        request_id = work.request_id
        if prefill.is_ours(request_id):
            (block_ids,) = output.kv_connector_block_state.get_block_ids(request_id)
            prefill.scheduled(request_id, work.cached_tokens + work.new_tokens, block_ids)
        if work.done and (prompt := self._prompts.pop(request_id, None)) is not None and self._service is not None:
            assert self._service.prefill is not None
            self._service.prefill.holds(prompt)

    def update(self, output: "KVConnectorOutput") -> None:
        """What the workers said, and which loads and sends the engine now takes as ended."""
        reports = output.kv_connector_worker_meta
        if isinstance(reports, StepReports):
            if self._decode is not None:
                self._decode.reports(reports.reports)
            if self._prefill is not None:
                self._prefill.reports(reports.reports)
            self._load.step_ended(reports.number)
            if self._decode is not None:
                for request_id in set(reports.lmcache_failed):
                    self._decode.prefix_failed(request_id)
        if self.tier is not None:
            told = reports if isinstance(reports, StepReports) else StepReports()
            self.tier.update(output, told.lmcache_failed, told.lmcache_problem)
        if self._decode is not None:
            for request_id in output.finished_recving or ():
                self._decode.load_completed(request_id)
        if self._prefill is not None:
            for request_id in output.finished_sending or ():
                self._prefill.released(request_id)

    def finished(self, request: "Request", *, completed: bool) -> bool:
        """The request ended; True if its blocks must stay until the workers release them."""
        self.figures.request_ended()
        self._undecided.pop(request.request_id, None)
        if self._queue is not None:
            self._queue.finished(request.request_id)
        if self._decode is not None:
            self._decode.finished(request.request_id)
        self._load.finished(request.request_id)
        self._prompts.pop(request.request_id, None)
        wire = self._prefill is not None and self._prefill.finished(request.request_id, completed=completed)
        store = self.tier is not None and self.tier.finished(request)
        if self.tier is not None and (wire or store):
            self.tier.sent_by(request.request_id, store=store, wire=wire)
        return wire or store

    def hand_over(self, request: "Request", block_ids: list[int]) -> dict[str, Any] | None:
        """What a router's decode engine must be told to get the KV of a request that ended; None if it is not held."""
        if self._prefill is None or self._service is None:
            return None
        transfer_id = self._prefill.held_as(request.request_id)
        if transfer_id is None:
            return None
        return hand_over_params(
            transfer_id,
            engine=self._service.engine,
            host=self._service.advertised_host,
            port=self._service.port,
            block_ids=block_ids,
            tokens=request.num_prompt_tokens,
            tensor_parallel=len(self._endpoints),
        )

    @property
    def needs_steps(self) -> bool:
        late = self.tier is not None and self.tier.needs_steps
        return late or (self._prefill is not None and self._prefill.needs_steps)

    @property
    def holds_blocks(self) -> bool:
        return self._prefill is not None and self._prefill.holds_blocks

    def stats(self) -> DisaggStats | None:
        """What the API server should hear after this step."""
        deltas = self.figures.take(needs_steps=self.needs_steps)
        return DisaggStats(deltas.data) if deltas is not None else None

    def _figures(self) -> dict[str, object]:
        """What of the debug snapshot metrics are made from."""
        view: dict[str, object] = {"inactive_reason": self.inactive_reason}
        if self._decode is not None:
            view["decode"] = self._decode.figures()
        if self._prefill is not None:
            view["prefill"] = self._prefill.figures()
        if self.tier is not None:
            view["lmcache"] = self.tier.snapshot()
        if self._service is not None:
            view |= self._service.figures()
        return view

    def _engine_state(self) -> dict[str, Any] | None:
        """What admission in the API servers is told."""
        if self._queue is None:
            return None
        model, pool = self._load.model, self._block_pool
        decode = DecodeState(
            kv_usage=float(pool.get_usage()) if pool is not None else 0.0,
            prefill=model.prefill(HERE),
            decode=model.decode(),
        )
        scheduler = self._vllm_config.scheduler_config
        workers = self._service.decode.workers() if self._service is not None and self._service.decode else ()
        state = self._queue.state(
            decode,
            workers,
            reorders=scheduler.policy == "priority",
            kv_capacity_tokens=self._capacity_tokens() or None,
            max_running=scheduler.max_num_seqs,
            decode_stall_s=self._load.decode_stall_s,
        )
        return to_plain(state)

    # -- inside ------------------------------------------------------------------------------------------------

    def _route_of(self, request: "Request") -> Route | None:
        """Where a router had the prompt prefilled; None, said once a host, if we must not or cannot go there."""
        handed = handed_over(request.kv_transfer_params)
        if handed is None or self._service is None or self._service.decode is None:
            return None
        worker = self._service.decode.holder(handed)
        if worker is None:
            if len(self._unknown_holders) < MAX_SAID and handed.host not in self._unknown_holders:
                self._unknown_holders.add(handed.host)
                logger.warning(
                    "disagg: a request names %.80r:%d as its prefill engine, which is neither one of prefill_workers "
                    "nor in router.allowed_hosts: its prompt is prefilled locally",
                    *(handed.host, handed.port),
                )
            return None
        return Route(worker, held=handed.transfer_id)

    def _other_model(self) -> list[str]:
        """A warning where the settings name another model than the engine serves."""
        meant, config = self._settings.model, self._vllm_config.model_config
        names = config.served_model_name or config.model
        names = [names] if isinstance(names, str) else list(names)
        if meant is None or meant in names:
            return []
        return [f"the settings are for model {meant!r}, this engine serves {', '.join(map(repr, names))}"]

    def _publish_load(self) -> None:
        if self._service is not None and self._service.prefill is not None:
            pool = self._block_pool
            usage = pool.get_usage() if pool is not None else 0.0
            cache_map = getattr(pool, "cached_block_hash_to_block", None)
            if cache_map is not self._cache_map:
                if self._cache_map is not None:
                    self._service.prefill.cache_reset()
                self._cache_map = cache_map
            self._service.prefill.publish(self._load.load(), usage, Steps(self._step, self._computing_steps))

    def _capacity_tokens(self) -> int:
        return self._block_pool.num_gpu_blocks * self._block_size if self._block_pool is not None else 0

    def _free_tokens(self) -> int:
        if self._block_pool is None:
            raise DisaggError("the engine did not bind its block pool")
        return int(self._block_pool.get_num_free_blocks()) * self._block_size

    def _snapshot(self) -> dict[str, object]:
        view: dict[str, object] = {"inactive_reason": self.inactive_reason, "load": asdict(self._load.load())}
        if self._block_pool is not None:
            view["kv"] = {
                "free_blocks": self._block_pool.get_num_free_blocks(),
                "total_blocks": self._block_pool.num_gpu_blocks,
                "block_size": self._block_size,
            }
        if self.tier is not None:
            view["lmcache"] = self.tier.snapshot()
        if self._decode is not None:
            view["decode"] = self._decode.snapshot()
        if self._prefill is not None:
            view["prefill"] = self._prefill.snapshot()
        return view
