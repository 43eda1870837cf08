"""The plugin in an engine's API process, where that process gets the scheduler's figures over a socket of ours.

    around         what the settings ask for, in front of the engine's HTTP server
    leave_when     likewise: a server that is about to end takes no more prompts for others
    take_reports   runs on the server's event loop, from its start to its end
    check          each prompt, with its token ids, before it goes to the scheduler

prometheus_client is imported only when the first process of this kind is made: an engine that runs it in multi-process
mode has named its folder by then, and whatever is counted here appears on the engine's /metrics.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from disagg_plugin.admission.gate import Refusal, Ticket
from disagg_plugin.admission.middleware import AdmissionMiddleware, App, current_ticket
from disagg_plugin.admission.site import Site
from disagg_plugin.config import DisaggSettings
from disagg_plugin.control.leaving import LeavingWord
from disagg_plugin.meeting_folder import meeting_folder
from disagg_plugin.observability.admin_route import AdminPaths
from disagg_plugin.observability.deltas import Deltas
from disagg_plugin.observability.frontend import Frontend
from disagg_plugin.observability.metrics import Kind, MetricSet, make_instrument
from disagg_plugin.observability.report_channel import ReportReceiver

LOOK_S = 0.2  # how soon the end of the server is noticed


class ApiProcess:
    """All calls on the server's event loop.

    Attributes:
        figures: About requests.
        site: Admission, or None: everybody is admitted.
    """

    def __init__(self, settings: DisaggSettings, *, model_name: str, by_priority: bool, caches_prefixes: bool) -> None:
        """
        Args:
            by_priority: The engine schedules by priority, the lowest first.
        """
        from prometheus_client import Counter, Gauge, Histogram

        classes: Mapping[Kind, Any] = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}
        self._settings = settings
        folder = meeting_folder()
        self._word = LeavingWord(folder) if settings.role != "decode" and folder is not None else None
        self.figures = Frontend(
            MetricSet(lambda metric: make_instrument(metric, classes)),
            model_name=model_name,
            objective=settings.observability.slo_objective,
        )
        self.site: Site | None = None
        if settings.qos.enable_early_rejection:
            self.site = Site(settings, by_priority=by_priority, caches_prefixes=caches_prefixes)
            self.site.gate.has_exact = settings.qos.exact_check
            self.site.observe(self.figures)
            self.site.say()

    def around(self, app: App) -> App:
        """The app with what the settings ask for in front of it."""
        site = self.site
        if self._settings.observability.admin_route:
            app = AdminPaths(
                app,
                figures=lambda: self.figures,
                gate=lambda: site.gate if site is not None else None,
                word=lambda: self._word,
            )
        return AdmissionMiddleware(app, site.gate, sets_priority=lambda: site.by_priority) if site is not None else app

    def check(
        self, request_id: str, token_ids: Sequence[int], *, salt: str = "", lora: str = ""
    ) -> Ticket | Refusal | None:
        """Of the current request; None: it passed no gate, and is sent as it is."""
        ticket, site = current_ticket.get(), self.site
        if ticket is None or site is None:
            return None
        refusal = site.exact(ticket, request_id, token_ids, salt=salt, lora=lora)
        if refusal is not None:
            return refusal
        self.figures.classify(request_id, ticket.service_class.name)
        return ticket

    async def leave_when(self, is_ending: Callable[[], bool]) -> None:
        """Have the engine take no more prompts for others once ``is_ending``; until then, or until cancelled."""
        while self._word is not None:
            if is_ending():
                self._word.say()
                return
            await asyncio.sleep(LOOK_S)

    async def take_reports(self, address: str) -> None:
        """Until cancelled."""
        await ReportReceiver(address).run(self._heard)

    def _heard(self, deltas: Deltas) -> None:
        for request_id, (path, estimated_s) in deltas.notes():
            self.figures.note(request_id, path, estimated_s)
        state = deltas.engine_state
        self.figures.engine_said(deltas)
        if self.site is not None and state is not None:
            self.site.heard(0, state)
        self.figures.refresh()
