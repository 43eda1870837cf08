"""The synthetic prefill engine: an HTTP API, a queue, and prompts that are computed chunk by chunk.

Gates: ``queue`` keeps prompts in the queue; ``tokens`` stops every prompt there; ``http_status`` answers at once with
it; ``load`` is how many queued requests it claims to have besides.
"""

import asyncio
import threading
from collections import deque
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from aiohttp import web
from faults.engine import Request, SyntheticEngine

from disagg_plugin.control.load import Load
from disagg_plugin.control.offload_call import transfer_id_of
from disagg_plugin.control.prefill_side import PrefillSide


@dataclass
class Prompt(Request):
    """A request that came over HTTP."""

    answer: Any = None  # asyncio future of the HTTP handler
    ours: bool = False


class HttpApi:
    """``/v1/completions`` on a loop of its own; a client that goes away aborts its request, as in vLLM."""

    def __init__(self, engine: "PrefillEngine") -> None:
        self._engine = engine
        self._count = 0
        self.port = 0
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()
        threading.Thread(target=self._run, args=(ready,), name="http", daemon=True).start()
        ready.wait()

    def answer(self, prompt: Prompt) -> None:
        def set_result() -> None:
            if not prompt.answer.done():
                prompt.answer.set_result(None)

        self._loop.call_soon_threadsafe(set_result)

    def _run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._open())
        ready.set()
        self._loop.run_forever()

    async def _open(self) -> None:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_post("/v1/completions", self._completions)
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.port = runner.addresses[0][1]

    async def _completions(self, request: web.Request) -> web.Response:
        body = msgspec.json.decode(await request.read())
        if status := self._engine.gates.get("http_status"):
            return web.Response(status=status)
        self._count += 1
        tokens = np.array(body["prompt"], dtype=np.int64)
        prompt = Prompt(f"cmpl-{self._count}", tokens, answer=self._loop.create_future())
        self._engine.arrivals.append((prompt, body.get("kv_transfer_params")))
        try:
            await prompt.answer
        except asyncio.CancelledError:
            self._engine.gone.append(prompt.request_id)
            raise
        return web.json_response({"choices": []})


class PrefillEngine(SyntheticEngine):
    """See the module."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        assert self.service.prefill is not None
        self._service = self.service.prefill
        self.side = PrefillSide(
            self.settings, self._service, ranks=1, kv_capacity_tokens=spec["blocks"] * self.block_size
        )
        self.arrivals: deque[tuple[Prompt, Any]] = deque()
        self.gone: deque[str] = deque()
        self.prompts: dict[str, Prompt] = {}
        self.held: dict[str, Prompt] = {}
        self.not_ours = 0
        self.http = HttpApi(self)
        self.answers |= {"preempt": self.preempt_all, "leave": self._service.leave, "stay": self._service.stay}

    def ports(self) -> dict[str, int]:
        return super().ports() | {"http": self.http.port}

    def roles(self) -> dict[str, object]:
        return {"prefill": self.side.snapshot()}

    def state(self) -> dict[str, Any]:
        prompts = {p.request_id: p.computed for p in self.prompts.values()}
        return super().state() | {"prompts": prompts, "held": sorted(self.held), "not_ours": self.not_ours}

    def preempt_all(self) -> None:
        """The engine takes the blocks of every running prompt away."""
        for prompt in self.prompts.values():
            if prompt.blocks:
                self.give_back(prompt)
                prompt.computed = 0
                self.side.preempted(prompt.request_id)

    def step(self) -> bool:
        self._hear()
        prompt = next((p for p in self.prompts.values() if self._may_compute(p)), None)
        if prompt is not None:
            self.compute(prompt, min(self._limit(prompt), prompt.computed + self.chunk_tokens))
            if prompt.ours:
                self.side.scheduled(prompt.request_id, prompt.computed, prompt.blocks)
        done, report = self.run_plane(self.side.step(), computed=prompt is not None)
        self.side.reports((report,))
        for request_id in done.released:
            self._release(request_id)
        if prompt is not None and prompt.computed == prompt.length:
            self._end(prompt, completed=True)
            self.http.answer(prompt)
        self._publish()
        return bool(self.prompts) or self.side.needs_steps

    def _limit(self, prompt: Prompt) -> int:
        return min(prompt.length, int(self.gates.get("tokens") or prompt.length))

    def _may_compute(self, prompt: Prompt) -> bool:
        if prompt.computed >= self._limit(prompt) or (self.gates.get("queue") and not prompt.blocks):
            return False
        if not prompt.blocks:
            prompt.blocks = self.allocate(prompt.length) or []
        return bool(prompt.blocks)

    def _hear(self) -> None:
        while self.arrivals:
            prompt, params = self.arrivals.popleft()
            transfer_id = transfer_id_of(params)
            if transfer_id is not None:
                prompt.ours = self.side.new_request(
                    prompt.request_id, transfer_id, prompt.length, prompt=prompt.tokens.tolist()
                )
            self.not_ours += not prompt.ours
            self.prompts[prompt.request_id] = prompt
        while self.gone:
            if (prompt_or_none := self.prompts.get(self.gone.popleft())) is not None:
                self._end(prompt_or_none, completed=False)

    def _end(self, prompt: Prompt, *, completed: bool) -> None:
        del self.prompts[prompt.request_id]
        if prompt.ours and self.side.finished(prompt.request_id, completed=completed):
            self.held[prompt.request_id] = prompt
        else:
            self.give_back(prompt)

    def _release(self, request_id: str) -> None:
        prompt = self.held.pop(request_id, None)
        if prompt is None:
            self.violations.append(f"{request_id} was released, which nobody holds")
            return
        self.give_back(prompt)
        self.side.released(request_id)

    def _publish(self) -> None:
        queued = [p for p in self.prompts.values() if not p.blocks]
        more = int(self.gates.get("load") or 0)
        load = Load(queued_requests=len(queued) + more, queued_prefill_tokens=100 * (len(queued) + more))
        self._service.publish(load, 1.0 - len(self.free) / self.capacity)
