"""The connector inside SGLang's scheduler process: data plane, side channel, and the half of this server's role.

SGLang runs scheduler and model in one process and, here, one rank: what vLLM splits into a scheduler side and a worker
side is one object. ``step`` runs once per turn of the scheduler's loop, between two forwards.
"""

import atexit
import logging
import time
from collections.abc import Callable
from typing import Any

import torch

from disagg_lmcache.prefix_tier import PrefixTier, open_store
from disagg_plugin.admission.engine_queue import EngineQueue
from disagg_plugin.admission.engine_state import to_plain
from disagg_plugin.boundary import boundary, guarded
from disagg_plugin.config import DisaggSettings, not_active_yet
from disagg_plugin.control.decode_side import DecodeSide
from disagg_plugin.control.leaving import LeavingWord
from disagg_plugin.control.load import LoadTracker
from disagg_plugin.control.offload_decisions import DEFAULT_STEP_TOKENS
from disagg_plugin.control.prefill_side import PrefillSide
from disagg_plugin.control.prompt_export import PromptExport
from disagg_plugin.control.prompt_fill import PromptFill
from disagg_plugin.control.service import ControlService, EngineFacts
from disagg_plugin.kv.commands import Command
from disagg_plugin.kv.rank import open_data_plane
from disagg_plugin.meeting_folder import make_meeting_folder
from disagg_plugin.observability.deltas import Deltas
from disagg_plugin.observability.engine_stats import EngineStats
from disagg_plugin.observability.journal import Journal
from disagg_plugin.observability.report_channel import ReportSender, address_in
from disagg_plugin.serving.latency import HERE
from disagg_policies.snapshots import DecodeState
from disagg_sglang.fill_engine import SchedulerQueue
from disagg_sglang.identity import model_identity
from disagg_sglang.kv_views import build_view
from disagg_sglang.tree_pages import ExportedPrefixes, Reserved, TreePages

logger = logging.getLogger(__name__)

YIELD_S = 0.0005  # a loop with nothing to compute spins: let the I/O and data-plane threads have the interpreter


class EngineSide:
    """One SGLang server's plugin.

    Attributes:
        fill: The decode role; None on a prefill server.
        export: The prefill role; None on a decode server.
        broken: It gave up; SGLang serves as if it were not there, and as a prefill server nothing.
    """

    def __init__(self, scheduler: Any, settings: DisaggSettings) -> None:
        """Open everything; takes seconds.

        Raises:
            ConfigError: The model, its KV pool or the settings cannot be served; SGLang ends with this line.
        """
        from sglang.srt.arg_groups.overrides import resolving_view

        self._scheduler = scheduler
        model, args = scheduler.model_config, resolving_view(scheduler.server_args)
        pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
        view = build_view(pool, model.get_total_num_kv_heads())
        self._plane = open_data_plane(view, 0, settings)
        capacity_tokens = int(scheduler.max_total_num_tokens)
        facts = EngineFacts(
            model=model_identity(model, args, settings),
            geometry=view.geometry,
            endpoints=(self._plane.endpoint,),
            max_prompt_tokens=min(int(model.context_len), capacity_tokens) - 1,
            kind="sglang",
            bootstrap_port=int(args.disaggregation_bootstrap_port) if settings.role == "prefill" else 0,
            prefix_capacity_tokens=0 if args.disable_radix_cache else capacity_tokens,
            by_priority=bool(args.enable_priority_scheduling and args.schedule_low_priority_values_first),
        )
        folder = make_meeting_folder()  # the launching process has; a scheduler started by hand meets nobody
        self._service = service = ControlService(settings, facts, snapshot=self._snapshot, word=LeavingWord(folder))
        service.start()
        atexit.register(self.close)
        self._load = LoadTracker(by_priority=facts.by_priority)
        self._forwards = 0
        journal = Journal()
        self._queue = EngineQueue()
        self._stats = EngineStats(
            settings,
            journal,
            self._figures,
            ring_slots=lambda: self._plane.endpoint.ring_slots,
            ranks=lambda: 1,
        )
        self._reorders = facts.by_priority
        if settings.qos.enable_early_rejection:
            self._stats.engine_state = self._engine_state
        self._reports = ReportSender(address_in(folder))
        self.fill: PromptFill[Any, Reserved] | None = None
        self.export: PromptExport | None = None
        self._decode: DecodeSide | None = None
        self._prefill: PrefillSide | None = None
        self._prefixes: PrefixTier[Reserved] | None = None
        self._transfer = settings.transfer
        if service.decode is not None:
            self._decode = DecodeSide(
                settings,
                service.decode,
                engine=service.engine,
                kv_capacity_tokens=capacity_tokens,
                load=self._load,
                step_tokens=max(int(args.chunked_prefill_size or 0), 0) or DEFAULT_STEP_TOKENS,
                journal=journal,
            )
            self.fill = PromptFill(SchedulerQueue(scheduler, service.decode), self._decode, self._queue)
        if service.prefill is not None:
            self._prefill = PrefillSide(
                settings, service.prefill, ranks=1, kv_capacity_tokens=capacity_tokens, journal=journal
            )
            if (lmcache := settings.cache.active_lmcache) is not None:
                store = open_store(lmcache, facts.model, view)
                self._prefixes = PrefixTier(store, view, ExportedPrefixes(TreePages(scheduler)))
            self.export = PromptExport(
                self._prefill,
                service.prefill,
                self._load,
                self._queue,
                pages_wait_s=settings.transfer.start_timeout_s,
                step=self.step,
                give_up=self.give_up,
                kv_usage=lambda: 1.0 - self._free_tokens() / max(capacity_tokens, 1),
                prefixes=self._prefixes,
            )
            scheduler.disagg_prefill_bootstrap_queue.kv_manager.export = self.export
        self._busy = False
        self.broken = False
        self._held_back = 0
        self._forward_stream = scheduler.forward_stream if str(pool.device).startswith("cuda") else None
        for line in not_active_yet(settings):
            logger.warning("disagg: %s", line)
        logger.info(
            "disagg is active: role %s, side channel on %s:%d, %d prefill worker(s)",
            settings.role,
            settings.side_channel.host,
            service.port,
            len(settings.prefill_workers) if service.decode is not None else 0,
        )

    @boundary
    def step(self) -> None:
        """One turn: commands to the data plane, what landed into the pool, what ended back to the role's half."""
        self._load.step_ended(self._forwards)
        commands: list[Command] = []
        if self.fill is not None:
            commands += self.fill.commands()
        if self.export is not None:
            commands += self.export.commands()
        self._publish_held_back()
        self._send_report()
        computed = not self._scheduler.running_batch.is_empty()
        self._copy_prefixes(computed=computed)
        if not commands and not self._busy:
            self._let_others_run()
            return
        plane = self._plane
        plane.apply(commands)
        if self.fill is not None and self.fill.receiving:
            self._await_forward()
        plane.after_forward(computed=computed)
        done, report = plane.take_completions(), plane.report()
        self._busy = report.busy
        if self.fill is not None:
            self.fill.ended(report, done)
        if self.export is not None:
            self.export.ended(report, done)
        self._let_others_run()

    @boundary
    def batch_starts(self, batch: Any) -> None:
        """A forward is about to be launched."""
        self._forwards += 1
        extends = batch.forward_mode.is_extend()
        computed = [
            (req.rid, int(req.prefix_len), int(req.extend_end)) if extends else (req.rid, req.seqlen - 1, req.seqlen)
            for req in batch.reqs
        ]
        works = self._load.step_of(self._forwards, computed)
        if extends:
            for rid, _, upto in computed:
                self._queue.computed(rid, upto)
        if self.export is not None:
            self.export.batch_starts(works)

    def take(self, req: Any, enqueue: Callable[[], None]) -> bool:
        """True: a request waits here, and ``enqueue`` is called when it need not any more; or was already."""
        enqueued: list[Any] = []

        def once() -> None:
            enqueued.append(req)
            enqueue()

        return bool(self._take(req, once)) or bool(enqueued)

    @boundary
    def _take(self, req: Any, enqueue: Callable[[], None]) -> bool:
        if self.fill is None:
            return False
        self._queue.arrived(req.rid, len(req.origin_input_ids), req.priority or 0)
        return self.fill.take(req, enqueue)

    @boundary
    def retracted(self, rid: str) -> None:
        """A running request lost its KV and waits again."""
        self._load.preempted(rid)
        self._queue.preempted(rid)

    @boundary
    def aborted(self, rid: str, *, everything: bool) -> None:
        """SGLang is about to abort what begins with ``rid``."""
        if self.fill is not None:
            self.fill.abort(rid, everything=everything)

    @boundary
    def dropped(self, req: Any) -> None:
        """SGLang drops a request unserved."""
        self._queue.finished(req.rid)
        if self.fill is not None:
            self.fill.dropped(req)

    @boundary
    def weights_updated(self) -> None:
        """Digest and fingerprint are those of the old weights: KV of old and new ones must never meet."""
        logger.warning("disagg: the model's weights were updated in place: no KV is exchanged until a restart")
        if self.fill is not None:
            self.fill.stop("weights_updated")
        if self._service.prefill is not None:
            self._service.prefill.refuse_all("weights_updated")
        if self._prefixes is not None:
            self._prefixes.stop("weights_updated")

    def give_up(self) -> None:
        """After an error of ours: nothing lands any more, and what waits here is SGLang's again."""
        self.broken = True
        self._say_inactive()
        guarded(self._close_threads)()  # what went wrong may have left them in disorder; the requests come first
        if self._prefixes is not None:
            self._prefixes.give_up()
        if self.export is not None:
            self.export.broken = True
        if self.fill is not None:
            self.fill.give_up()

    @property
    def holds_pages(self) -> bool:
        """Whether requests wait, or pages are in use, that SGLang does not know of: it is not idle then."""
        return (self.fill is not None and self.fill.open) or (self._prefixes is not None and self._prefixes.open)

    def close(self) -> None:
        """End our threads; idempotent."""
        self._close_threads()
        self._reports.close()

    def _close_threads(self) -> None:
        if self._decode is not None:
            self._decode.close()
        self._service.close()
        self._plane.close()
        if self._prefixes is not None:
            self._prefixes.close()

    def _copy_prefixes(self, *, computed: bool) -> None:
        if self._prefixes is not None and self._prefixes.open:
            self._await_forward()
            transfer = self._transfer
            self._prefixes.step((transfer.scatter_budget_ms if computed else transfer.scatter_idle_budget_ms) / 1e3)

    def _await_forward(self) -> None:
        """A forward still under way may write to pages that were freed since: what we write must come after it."""
        if self._forward_stream is not None:
            torch.cuda.current_stream().wait_stream(self._forward_stream)

    def _say_inactive(self) -> None:
        deltas = Deltas()
        deltas.set("disagg_active", to=0)
        deltas.set("disagg_inactive", "internal_error", to=1)
        self._reports.send(deltas)

    def _publish_held_back(self) -> None:
        """SGLang publishes its load after forwards only; whoever reads it should see what waits for KV too."""
        if self.fill is not None and (held := self.fill.waiting + self.fill.receiving) != self._held_back:
            self._held_back = held
            self._scheduler.publish_load_snapshot(force=True)

    def _send_report(self) -> None:
        """Figures for the API process, when they are due; the last ones as the engine comes to rest."""
        scheduler = self._scheduler
        rests = scheduler.running_batch.is_empty() and not scheduler.waiting_queue and not self.holds_pages
        if (deltas := self._stats.take(needs_steps=not rests)) is not None:
            self._reports.send(deltas)

    def _let_others_run(self) -> None:
        scheduler = self._scheduler
        waiting = self._busy or self.holds_pages
        if waiting and scheduler.running_batch.is_empty() and not scheduler.waiting_queue:
            time.sleep(YIELD_S)

    def _free_tokens(self) -> int:
        scheduler = self._scheduler
        return int(scheduler.token_to_kv_pool_allocator.available_size() + scheduler.tree_cache.evictable_size())

    def _figures(self) -> dict[str, object]:
        """What of the debug snapshot metrics are made from."""
        view: dict[str, object] = {
            "inactive_reason": "",
            **self._service.figures(),
        }
        if self._decode is not None:
            view["decode"] = self._decode.figures()
        if self._prefill is not None:
            view["prefill"] = self._prefill.figures()
        return self._with_lmcache(view)

    def _with_lmcache(self, view: dict[str, object]) -> dict[str, object]:
        if self._prefixes is not None:
            view["lmcache"] = self._prefixes.figures()
        return view

    def _engine_state(self) -> dict[str, Any]:
        """What admission in the API process is told: SGLang's own load signals, and what we know besides."""
        loads, model = self._scheduler.load_inquirer.get_loads(), self._load.model
        state = self._queue.state(
            DecodeState(kv_usage=loads.token_usage, prefill=model.prefill(HERE), decode=model.decode()),
            self._service.decode.workers() if self._service.decode is not None else (),
            reorders=self._reorders,
            kv_capacity_tokens=loads.max_total_num_tokens,
            max_running=loads.max_running_requests,
        )
        return to_plain(state)

    def _snapshot(self) -> dict[str, object]:
        page = int(self._scheduler.page_size)
        view: dict[str, object] = {
            "inactive_reason": "",
            "kv": {
                "free_blocks": self._free_tokens() // page,
                "total_blocks": int(self._scheduler.max_total_num_tokens) // page,
                "block_size": page,
            },
        }
        if self._decode is not None and self.fill is not None:
            view["decode"] = self._decode.snapshot()
            view["waiting"] = self.fill.snapshot()
        if self._prefill is not None:
            view["prefill"] = self._prefill.snapshot()
        return self._with_lmcache(view)
