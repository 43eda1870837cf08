"""The plugin in SGLang's API process: early rejection, figures on SGLang's /metrics, ``/disagg/...``, and SIGTERM.

set_up     once, before the HTTP server runs
Front      ASGI middleware, and how the server's start and end are noticed
sends      each prompt, before it goes to the scheduler
measured   each request, when SGLang has measured it

SIGTERM reaches this process only, and SGLang ends once no request is left: a prefill server that went on taking prompts
for others never would. So the word is passed on from here.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from disagg_plugin.admission.gate import Refusal
from disagg_plugin.admission.middleware import App, Receive, Scope, Send, current_ticket
from disagg_plugin.api_process import ApiProcess
from disagg_plugin.boundary import guarded
from disagg_plugin.config import DisaggSettings
from disagg_plugin.meeting_folder import make_meeting_folder
from disagg_plugin.observability.report_channel import address_in
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

    def __init__(self, app: App, server: ApiServer, is_ending: Callable[[], bool]) -> None:
        """
        Args:
            is_ending: Whether SGLang has heard SIGTERM.
        """
        self._app = server.around(app)
        self._server = server
        self._is_ending = is_ending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return
        folder = make_meeting_folder()  # made already, by the step that resolved the arguments
        tasks = [
            asyncio.create_task(self._server.take_reports(address_in(folder))),
            asyncio.create_task(self._server.leave_when(self._is_ending)),
        ]
        try:
            await self._app(scope, receive, send)
        finally:
            for task in tasks:
                task.cancel()


def set_up(settings: DisaggSettings, args: Any, *, is_ending: Callable[[], bool]) -> ApiServer:
    """Put the plugin in front of SGLang's HTTP server.

    Args:
        args: The server's resolved arguments.
        is_ending: Whether SGLang has heard SIGTERM.
    """
    from sglang.srt.entrypoints import http_server

    server = ApiServer(
        settings,
        model_name=str(args.served_model_name),
        by_priority=bool(args.enable_priority_scheduling and args.schedule_low_priority_values_first),
        caches_prefixes=not args.disable_radix_cache,
    )
    http_server.app.add_middleware(Front, server=server, is_ending=is_ending)
    return server
