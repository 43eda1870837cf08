"""The plugin in SGLang's API process: early rejection, its figures on SGLang's /metrics, and ``/disagg/status``.

set_up     once, before the HTTP server runs
Front      ASGI middleware, and how the server's start and end are noticed
sends      each prompt, before it goes to the scheduler
measured   each request, when SGLang has measured it
"""

import asyncio
import os
from collections.abc import Mapping
from typing import Any

from disagg_plugin.admission.gate import Refusal
from disagg_plugin.admission.middleware import App, Receive, Scope, Send, current_ticket
from disagg_plugin.api_process import ApiProcess
from disagg_plugin.boundary import guarded
from disagg_plugin.config import DisaggSettings
from disagg_sglang.launch import REPORTS_VARIABLE
from disagg_sglang.support import ROUTING_KEY

_SERVED = frozenset({"stop", "length"})


class ApiServer(ApiProcess):
    """One SGLang API process."""

    def sends(self, prompt: Any) -> None:
        """SGLang is about to send a ``TokenizedGenerateReqInput`` to the scheduler.

        Raises:
            ValueError: It is refused; the middleware puts our answer in place of SGLang's.
        """
        if current_ticket.get() is None or prompt.input_ids is None:
            return
        answer = self.check(prompt.rid, prompt.input_ids, salt=prompt.cache_salt or "", lora=prompt.lora_id or "")
        if isinstance(answer, Refusal):
            raise ValueError(f"overloaded ({answer.answer.reason})")
        if answer is None or self.site is None:
            return
        if self.site.by_priority:
            prompt.priority = answer.service_class.priority
        if answer.routing is not None:
            params = prompt.sampling_params
            params.custom_params = {**(params.custom_params or {}), ROUTING_KEY: answer.routing}

    @guarded
    def measured(self, request_id: str, finished_reason: Mapping[str, Any], times: Any, tokens: int) -> None:
        """A request ended; SGLang measured it as ``times`` say."""
        if not tokens and finished_reason.get("type") in _SERVED:
            return  # of several samples: SGLang first asks for none of them, to have the prompt cached
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


class Front:
    """Added to SGLang's FastAPI application."""

    def __init__(self, app: App, server: ApiServer) -> None:
        self._app = server.around(app)
        self._server = server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return
        reports = asyncio.create_task(self._server.take_reports(os.environ[REPORTS_VARIABLE]))
        try:
            await self._app(scope, receive, send)
        finally:
            reports.cancel()


def set_up(settings: DisaggSettings, args: Any) -> ApiServer:
    """Put the plugin in front of SGLang's HTTP server.

    Args:
        args: The server's resolved arguments.
    """
    from sglang.srt.entrypoints import http_server

    server = ApiServer(
        settings,
        model_name=str(args.served_model_name),
        by_priority=bool(args.enable_priority_scheduling and args.schedule_low_priority_values_first),
        caches_prefixes=not args.disable_radix_cache,
    )
    http_server.app.add_middleware(Front, server=server)
    return server
