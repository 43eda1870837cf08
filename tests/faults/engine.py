"""A synthetic engine: everything of the plugin is real, the model is arithmetic; driven by JSON lines.

    scheduler, paged cache, "model"     here, in one thread, as an engine would drive a connector
    roles, side channel, HTTP           the product's, over real sockets
    data plane                          the product's, over real NIXL

Both engines check their half of the contract with an engine: what is reported must be awaited, and once; blocks are
never freed twice. Violations are kept, and make every test fail. What a hook raises ends this engine as it would end a
real one: whoever asks it next gets the traceback.
"""

import faulthandler
import json
import select
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from faults.faulty_transport import FaultyTransport, RelayedNixl
from faults.synthetic_kv import kv_of

from disagg_plugin.config import DisaggSettings, load_settings
from disagg_plugin.control import service
from disagg_plugin.control.messages import ModelIdentity
from disagg_plugin.control.service import ControlService, EngineFacts
from disagg_plugin.kv.commands import Command, RankReport
from disagg_plugin.kv.dataplane import Completions, DataPlane, agent_name
from disagg_plugin.kv.geometry import KVGeometry
from disagg_plugin.testing import DenseView

GEOMETRY = KVGeometry(layers=2, kv_heads=2, head_dim=16, dtype="bfloat16")
MAX_PROMPT_TOKENS = 4_000
POISON = -300.0  # no KV of ours


@dataclass
class Request:
    """One prompt in a synthetic engine."""

    request_id: str
    tokens: np.ndarray
    computed: int = 0
    blocks: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.tokens)


class SyntheticEngine:
    """What both roles share: cache, blocks, data plane, side channel, and the loop."""

    block_size = 16

    def __init__(self, spec: dict[str, Any]) -> None:
        self.settings: DisaggSettings = load_settings(spec["settings"])
        self.view = DenseView(GEOMETRY, blocks=spec["blocks"], block_size=self.block_size)
        nixl = RelayedNixl(agent_name(spec["name"], 0, spec["epoch"]), spec["kv_relay_port"])
        self.transport = FaultyTransport(nixl, self.settings.transfer.slot_bytes)
        self.plane = DataPlane(
            engine=spec["name"],
            epoch=spec["epoch"],
            rank=0,
            view=self.view,
            transfer=self.settings.transfer,
            transport=self.transport,
        )
        facts = EngineFacts(
            model=ModelIdentity("synthetic", spec.get("weights", "weights"), "synthetic"),
            geometry=GEOMETRY,
            endpoints=(self.plane.endpoint,),
            max_prompt_tokens=MAX_PROMPT_TOKENS,
        )
        if "protocol" in spec:
            service.PROTOCOL_VERSION = spec["protocol"]
        self.service = ControlService(self.settings, facts, snapshot=self.roles)
        self.service.start()
        self.chunk_tokens = 64  # of one step
        self.gates: dict[str, Any] = {}
        self.free = list(range(1, spec["blocks"]))
        self.capacity = len(self.free)
        self.violations: list[str] = []
        self.answers: dict[str, Callable[..., Any]] = {
            "state": self.state,
            "gates": self.gates.update,
            "faults": self.faults,
            "late_writes": self.transport.let_late_writes_go,
            "replay": self.transport.replay_last,
            "say": lambda peer, message: self.transport.to_send.append((peer, bytes.fromhex(message))),
        }

    def ports(self) -> dict[str, int]:
        """Where the real sockets are."""
        return {"side": self.service.port, "kv": self.transport.port}

    def faults(self, names: list[str] = (), all_corrupt: bool = False) -> None:  # type: ignore[assignment]
        self.transport.next_faults = deque(names)
        self.transport.all_corrupt = all_corrupt

    def roles(self) -> dict[str, object]:
        raise NotImplementedError

    def step(self) -> bool:
        """One step of the engine; True if there is more to do at once."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        return {
            "view": self.service.snapshot(),
            "counters": self.plane.counters(),
            "blocks_taken": self.capacity - len(self.free),
            "violations": self.violations,
            "threads": sorted(thread.name for thread in threading.enumerate()),
        }

    def allocate(self, tokens: int) -> list[int] | None:
        """Blocks for so many tokens, full of nonsense; None if there are not enough."""
        count = -(-tokens // self.block_size)
        if count > len(self.free):
            return None
        taken, self.free = self.free[:count], self.free[count:]
        self.view.cache[taken] = POISON
        return taken

    def give_back(self, request: Request) -> None:
        if set(request.blocks) & set(self.free):
            self.violations.append(f"blocks of {request.request_id} are free already")
        self.free += request.blocks
        request.blocks = []

    def compute(self, request: Request, until: int) -> None:
        """The model: KV of the tokens up to ``until``."""
        start = request.computed
        kv = kv_of(request.tokens[start:until], start, GEOMETRY)
        for layer in range(GEOMETRY.layers):
            for side in range(GEOMETRY.sides):
                self.view.scatter(layer, side, request.blocks, start, until, kv[layer, side])
        request.computed = until

    def run_plane(self, commands: list[Command], *, computed: bool) -> tuple[Completions, RankReport]:
        self.plane.apply(commands)
        self.plane.after_forward(computed=computed)
        return self.plane.take_completions(), self.plane.report()

    def serve(self, control: socket.socket) -> None:
        """Step, and answer the test, until it hangs up."""
        unread, busy = b"", True
        while True:
            readable, _, _ = select.select([control], [], [], 0.0005 if busy else 0.005)
            if readable:
                received = control.recv(1 << 20)
                if not received:
                    return
                *lines, unread = (unread + received).split(b"\n")
                for line in lines:
                    control.sendall(json.dumps(self.answer(json.loads(line)), default=str).encode() + b"\n")
            busy = self.step()

    def answer(self, request: dict[str, Any]) -> Any:
        return self.answers[request.pop("do")](**request)


def forked(spec: dict[str, Any], control: socket.socket) -> None:
    """The life of one engine process."""
    from faults.decode_engine import DecodeEngine
    from faults.prefill_engine import PrefillEngine

    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    engine = (PrefillEngine if spec["settings"]["role"] == "prefill" else DecodeEngine)(spec)
    control.sendall(json.dumps(engine.ports()).encode() + b"\n")
    engine.serve(control)
