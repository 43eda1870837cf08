"""What the plugin does in SGLang's API process: early rejection, its figures on /metrics, and ``/disagg/status``.

    set_up     once, before the HTTP server runs
    Front      ASGI middleware; from the server's start to its end, takes the scheduler process's reports too
    sends      each prompt, with its token ids, before it goes to the scheduler
    measured   each request, when SGLang has measured it

SGLang's /metrics are made from files that each of its processes writes (prometheus_client's multi-process mode), so
whatever is counted here appears there; prometheus_client is imported only once SGLang has named the folder.
"""

import asyncio
import logging
import os
from collections.abc import Mapping
from typing import Any

from disagg_plugin.admission.middleware import AdmissionMiddleware, App, Receive, Scope, Send, current_ticket
from disagg_plugin.admission.site import Site
from disagg_plugin.boundary import guarded
from disagg_plugin.config import DisaggSettings
from disagg_plugin.observability.admin_route import AdminPaths
from disagg_plugin.observability.deltas import Deltas
from disagg_plugin.observability.frontend import Frontend
from disagg_plugin.observability.metrics import Kind, MetricSet, make_instrument
from disagg_plugin.observability.report_channel import ReportReceiver
from disagg_sglang.launch import REPORTS_VARIABLE
from disagg_sglang.support import ROUTING_KEY

logger = logging.getLogger(__name__)

_SERVED = frozenset({"stop", "length"})


class ApiServer:
    """One SGLang API process; everything on its event loop."""

    def __init__(self, settings: DisaggSettings, args: Any) -> None:
        """
        Args:
            args: The server's resolved arguments.
        """
        from prometheus_client import Counter, Gauge, Histogram

        classes: Mapping[Kind, Any] = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}
        self._settings = settings
        self.figures = Frontend(
            MetricSet(lambda metric: make_instrument(metric, classes)),
            model_name=str(args.served_model_name),
            objective=settings.observability.slo_objective,
        )
        self.site: Site | None = None
        if settings.qos.enable_early_rejection:
            by_priority = args.enable_priority_scheduling and args.schedule_low_priority_values_first
            self.site = Site(settings, by_priority=by_priority, caches_prefixes=not args.disable_radix_cache)
            self.site.gate.has_exact = settings.qos.exact_check
            self.site.observe(self.figures)
            self.site.say()

    def around(self, app: App) -> App:
        """The app with what the settings ask for in front of it."""
        site = self.site
        if self._settings.observability.admin_route:
            app = AdminPaths(app, figures=lambda: self.figures, gate=lambda: site.gate if site is not None else None)
        return AdmissionMiddleware(app, site.gate, sets_priority=lambda: site.by_priority) if site is not None else app

    def sends(self, prompt: Any) -> None:
        """A prompt (SGLang's ``TokenizedGenerateReqInput``) is about to be sent to the scheduler.

        Raises:
            ValueError: It is refused; the middleware puts our answer in place of SGLang's.
        """
        ticket, site, token_ids = current_ticket.get(), self.site, prompt.input_ids
        if ticket is None or site is None or token_ids is None:
            return
        refusal = site.exact(ticket, prompt.rid, token_ids, salt=prompt.cache_salt or "", lora=prompt.lora_id or "")
        if refusal is not None:
            raise ValueError(f"overloaded ({refusal.answer.reason})")
        if site.by_priority:
            prompt.priority = ticket.service_class.priority
        if (routing := ticket.routing) is not None:
            params = prompt.sampling_params
            params.custom_params = {**(params.custom_params or {}), ROUTING_KEY: routing}
        self.figures.classify(prompt.rid, ticket.service_class.name)

    @guarded
    def measured(self, request_id: str, finished_reason: Mapping[str, Any], times: Any, tokens: int) -> None:
        """A request ended; SGLang measured it as ``times`` say."""
        if finished_reason.get("type") in _SERVED:
            self.figures.finished(
                request_id,
                ttft_s=times.get_first_token_latency(),
                tpot_s=times.get_time_per_output_token(tokens),
                e2e_s=times.get_e2e_latency(),
            )
        elif int(finished_reason.get("status_code") or 0) >= 500:
            self.figures.failed(request_id)
        else:
            self.figures.aborted(request_id)

    async def take_reports(self) -> None:
        """Until cancelled."""
        await ReportReceiver(os.environ[REPORTS_VARIABLE]).run(self._heard)

    def _heard(self, deltas: Deltas) -> None:
        for request_id, (path, estimated_s) in deltas.notes():
            self.figures.note(request_id, path, estimated_s)
        state = deltas.engine_state
        self.figures.engine_said(deltas)
        if self.site is not None and state is not None:
            self.site.heard(0, state)
        self.figures.refresh()


class Front:
    """Added to SGLang's FastAPI application."""

    def __init__(self, app: App, server: ApiServer) -> None:
        self._app = server.around(app)
        self._server = server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return
        reports = asyncio.create_task(self._server.take_reports())
        try:
            await self._app(scope, receive, send)
        finally:
            reports.cancel()


def set_up(settings: DisaggSettings, args: Any) -> ApiServer:
    """Put the plugin in front of SGLang's HTTP server."""
    from sglang.srt.entrypoints import http_server

    server = ApiServer(settings, args)
    http_server.app.add_middleware(Front, server=server)
    return server
