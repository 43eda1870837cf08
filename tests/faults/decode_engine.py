"""The synthetic decode engine: a scheduler in the manner of vLLM's, with its asserts about loads that end.

Gates: ``decode`` keeps requests running once their prompt is complete; ``steps`` freezes the engine: nothing is
staged, scattered or reported; ``no_room`` says that the cache is full; ``abort_at_allocation`` aborts a request in the
step that allocates for it.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from faults.engine import GEOMETRY, Request, SyntheticEngine
from faults.synthetic_kv import kv_of, prompt_of

from disagg_plugin.control.decode_port import Claim, NotYet, PromptView
from disagg_plugin.control.decode_side import DecodeSide

DECODE_STEPS = 3


@dataclass
class Job(Request):
    """A client's request.

    Attributes:
        state: waiting, loading, running, finished or aborted.
    """

    state: str = "waiting"
    landed: int = 0  # tokens that came from elsewhere
    locally: int = 0  # tokens computed here
    preemptions: int = 0
    steps_left: int = DECODE_STEPS


class DecodeEngine(SyntheticEngine):
    """See the module."""

    block_size = 8

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        assert self.service.decode is not None
        self.side = DecodeSide(
            self.settings,
            self.service.decode,
            engine=self.service.engine,
            kv_capacity_tokens=spec["blocks"] * self.block_size,
        )
        self.jobs: dict[str, Job] = {}
        self.awaited: Counter[str] = Counter()  # loads that the workers still owe a report for
        self.wrong: list[str] = []
        self.answers |= {
            "send": self.send,
            "abort": self.abort,
            "preempt": self.preempt,
            "job": self.job,
            "jobs": lambda: {name: self.job(name) for name in self.jobs},
            "forget": self.forget,
        }

    def roles(self) -> dict[str, object]:
        return {"decode": self.side.snapshot()}

    def state(self) -> dict[str, Any]:
        return super().state() | {"wrong": self.wrong, "awaited": sum(self.awaited.values())}

    # -- what a client, or the engine itself, does -------------------------------------------------------------

    def send(self, request_id: str, seed: int, tokens: int) -> None:
        self.jobs[request_id] = Job(request_id, prompt_of(seed, tokens))

    def abort(self, request_id: str) -> None:
        job = self.jobs[request_id]
        if job.state in ("finished", "aborted"):
            return
        loading = self.awaited[request_id] > 0
        job.state = "aborted"
        self.side.finished(request_id)
        if not loading:  # else the workers still write to its blocks
            self.give_back(job)

    def preempt(self, request_id: str) -> bool:
        """Take a running request's blocks; a loading one's are not taken."""
        job = self.jobs[request_id]
        if job.state != "running":
            return False
        self.give_back(job)
        job.state, job.preemptions = "waiting", job.preemptions + 1
        job.computed = job.landed = job.locally = 0
        return True

    def job(self, request_id: str) -> dict[str, Any]:
        job = self.jobs[request_id]
        return {
            "state": job.state,
            "landed": job.landed,
            "locally": job.locally,
            "computed": job.computed,
            "preemptions": job.preemptions,
        }

    def forget(self) -> None:
        self.jobs = {name: job for name, job in self.jobs.items() if job.state not in ("finished", "aborted")}

    # -- the engine's step -------------------------------------------------------------------------------------

    def step(self) -> bool:
        if self.gates.get("steps"):
            return False
        for job in list(self.jobs.values()):
            if job.state == "waiting":
                self._match(job)
        computed = False
        for job in self.jobs.values():
            if job.state == "running":
                computed |= self._run(job)
        done, report = self.run_plane(self.side.step(), computed=computed)
        self.side.reports((report,))
        for request_id in done.received:
            self._loaded(request_id, done.invalid_block_ids)
        return bool(self.jobs)

    def _match(self, job: Job) -> None:
        prompt = PromptView(job.request_id, job.tokens.tolist())
        answer = self.side.match(prompt, 0, free_tokens=self._free_tokens())
        if isinstance(answer, NotYet):
            return
        blocks = self.allocate(job.length)
        if blocks is None:
            return
        job.blocks = blocks
        if not isinstance(answer, Claim):
            job.state = "running"
            return
        job.state = "loading"
        self.awaited[job.request_id] += 1
        self.side.allocated(job.request_id, tuple(blocks), answer.tokens)
        if self.gates.get("abort_at_allocation") == job.request_id:
            self.abort(job.request_id)

    def _free_tokens(self) -> int:
        return 0 if self.gates.get("no_room") else len(self.free) * self.block_size

    def _run(self, job: Job) -> bool:
        if job.computed < job.length:
            until = min(job.length, job.computed + self.chunk_tokens)
            job.locally += until - job.computed
            self.compute(job, until)
            return True
        if self.gates.get("decode"):
            return False
        job.steps_left -= 1
        if job.steps_left <= 0:
            self._finish(job)
        return True

    def _finish(self, job: Job) -> None:
        found = self.view.read(job.blocks, 0, job.length)
        if not torch.equal(found, kv_of(job.tokens, 0, GEOMETRY)):
            self.wrong.append(job.request_id)
        job.state = "finished"
        self.give_back(job)
        self.side.finished(job.request_id)

    def _loaded(self, request_id: str, invalid: frozenset[int]) -> None:
        """A worker reports the end of a load: once for each, and never for another request."""
        if self.awaited[request_id] != 1:
            self.violations.append(f"{request_id} was reported, {self.awaited[request_id]} reports were due")
            return
        del self.awaited[request_id]
        job = self.jobs[request_id]
        self.side.load_completed(request_id)
        if job.state == "aborted":
            self.give_back(job)
            return
        bad = next((at for at, block in enumerate(job.blocks) if block in invalid), None)
        job.state = "running"
        job.computed = job.landed = job.length - 1 if bad is None else bad * self.block_size
