"""The connector inside SGLang's scheduler process: data plane, side channel, and the half of this server's role.

SGLang runs scheduler and model in one process and, here, one rank: what vLLM splits into a scheduler side and a worker
side is one object. ``step`` runs once per turn of the scheduler's loop, between two forwards.
"""

import atexit
import logging
import time
from typing import Any

from disagg_plugin.config import DisaggSettings, not_active_yet
from disagg_plugin.control.decode_side import DecodeSide
from disagg_plugin.control.load import LoadTracker
from disagg_plugin.control.offload_decisions import DEFAULT_STEP_TOKENS
from disagg_plugin.control.prefill_side import PrefillSide
from disagg_plugin.control.service import ControlService, EngineFacts
from disagg_plugin.kv.commands import Command
from disagg_plugin.kv.rank import open_data_plane
from disagg_sglang.identity import model_identity
from disagg_sglang.kv_backend import PromptExport
from disagg_sglang.kv_views import build_view
from disagg_sglang.prompt_fill import PromptFill

logger = logging.getLogger(__name__)

YIELD_S = 0.0005  # a loop with nothing to compute spins: let the I/O and data-plane threads have the interpreter


class EngineSide:
    """One SGLang server's plugin.

    Attributes:
        fill: The decode role; None on a prefill server.
        export: The prefill role; None on a decode server.
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
        )
        self._service = service = ControlService(settings, facts, snapshot=self._snapshot)
        service.start()
        atexit.register(self.close)
        self._load = LoadTracker()
        self._forwards = 0
        self.fill: PromptFill | None = None
        self.export: PromptExport | None = None
        self._decode: DecodeSide | None = None
        self._prefill: PrefillSide | None = None
        if service.decode is not None:
            self._decode = DecodeSide(
                settings,
                service.decode,
                engine=service.engine,
                kv_capacity_tokens=capacity_tokens,
                load=self._load,
                step_tokens=max(int(args.chunked_prefill_size or 0), 0) or DEFAULT_STEP_TOKENS,
            )
            self.fill = PromptFill(scheduler, self._decode, service.decode)
        if service.prefill is not None:
            self._prefill = PrefillSide(settings, service.prefill, ranks=1, kv_capacity_tokens=capacity_tokens)
            self.export = PromptExport(
                self._prefill,
                service.prefill,
                self._load,
                pages_wait_s=settings.transfer.start_timeout_s,
                step=self.step,
                kv_usage=lambda: 1.0 - self._free_tokens() / max(capacity_tokens, 1),
            )
            scheduler.disagg_prefill_bootstrap_queue.kv_manager.export = self.export
        self._busy = False
        for line in not_active_yet(settings):
            logger.warning("disagg: %s", line)
        logger.info(
            "disagg is active: role %s, side channel on %s:%d, %d prefill worker(s)",
            settings.role,
            settings.side_channel.host,
            service.port,
            len(settings.prefill_workers) if service.decode is not None else 0,
        )

    def step(self) -> None:
        """One turn: commands to the data plane, what landed into the pool, what ended back to the role's half."""
        self._load.step_ended(self._forwards)
        commands: list[Command] = []
        if self.fill is not None:
            commands += self.fill.commands()
        if self.export is not None:
            commands += self.export.commands()
        if not commands and not self._busy:
            self._let_others_run()
            return
        plane = self._plane
        plane.apply(commands)
        plane.after_forward(computed=not self._scheduler.running_batch.is_empty())
        done, report = plane.take_completions(), plane.report()
        self._busy = report.busy
        if self.fill is not None:
            self.fill.ended(report, done)
        if self.export is not None:
            self.export.ended(report, done)
        self._let_others_run()

    def batch_starts(self, batch: Any) -> None:
        """A forward is about to be launched."""
        self._forwards += 1
        extends = batch.forward_mode.is_extend()
        computed = [
            (req.rid, int(req.prefix_len), int(req.extend_end)) if extends else (req.rid, req.seqlen - 1, req.seqlen)
            for req in batch.reqs
        ]
        works = self._load.step_of(self._forwards, computed)
        if self.export is not None:
            self.export.batch_starts(works)

    @property
    def holds_pages(self) -> bool:
        """Whether requests wait, or pages are in use, that SGLang does not know of: it is not idle then."""
        return self.fill is not None and self.fill.open

    def close(self) -> None:
        """End our threads; idempotent."""
        if self._decode is not None:
            self._decode.close()
        self._service.close()
        self._plane.close()

    def _let_others_run(self) -> None:
        scheduler = self._scheduler
        waiting = self._busy or self.holds_pages
        if waiting and scheduler.running_batch.is_empty() and not scheduler.waiting_queue:
            time.sleep(YIELD_S)

    def _free_tokens(self) -> int:
        scheduler = self._scheduler
        return int(scheduler.token_to_kv_pool_allocator.available_size() + scheduler.tree_cache.evictable_size())

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
        return view
