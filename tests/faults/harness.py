"""Prefill and decode engines in processes of their own, and a relay in front of every port of theirs."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from faults.relay import Relay

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "UCX_TLS": "tcp,self",
    "UCX_NET_DEVICES": "lo",
    "UCX_LOG_LEVEL": "fatal",  # peers that go away are what this is about
    "NIXL_LOG_LEVEL": "FATAL",
    "OMP_NUM_THREADS": "1",
}
STALL_S = 0.8
DEADLINE_S = 4.0
PEER_TIMEOUT_S = 0.6
TRANSFER = {
    "codec": "raw",
    "compile": False,
    "guard_tokens": 0,
    "slot_bytes": 4096,  # 15 tokens
    "region_slots": 4,
    "ring_max_bytes": 16 * 4096,
    "offer_timeout_s": 0.4,
    "start_timeout_s": 0.8,
    "stall_timeout_s": STALL_S,
    "deadline_s": DEADLINE_S,
    "hold_s": 1.5,
    "linger_s": 0.2,
    "scatter_idle_budget_ms": 5.0,
}
PATIENT = {"offer_timeout_s": 5.0, "start_timeout_s": 4.0, "stall_timeout_s": 4.0, "deadline_s": 30.0}
PATIENT_PEER_TIMEOUT_S = 3.0
GAUGES = ("open_sends", "open_receives", "slots_in_use", "slots_quarantined", "private_buffers_in_use", "unanswered")
WAIT_S = 15.0


def eventually(condition: Callable[[], Any], what: Callable[[], str] | str, timeout_s: float = WAIT_S) -> Any:
    """The first true value of ``condition``."""
    deadline, pause = time.monotonic() + timeout_s, threading.Event()
    while time.monotonic() < deadline:
        if value := condition():
            return value
        pause.wait(0.01)
    raise AssertionError(f"not within {timeout_s} s: {what if isinstance(what, str) else what()}")


class Zygote:
    """The process that forks engines."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = str(folder / "z")
        paths = [str(ROOT), str(ROOT / "policies"), str(ROOT / "tests")]
        self.log = (folder / "zygote.log").open("ab")
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py")), self.address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(paths)},
        )
        assert self.process.stdout is not None
        if self.process.stdout.readline() != b"ready\n":
            raise AssertionError((folder / "zygote.log").read_text()[-3000:])

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()
        self.log.close()


class EngineProcess:
    """One synthetic engine; ``ask`` what ``engine.py`` answers."""

    def __init__(self, zygote: Zygote, spec: Mapping[str, Any]) -> None:
        self.name, self.epoch = spec["name"], spec["epoch"]
        self.log = zygote.folder / f"{self.name}-{self.epoch}.log"
        self._control = socket.socket(socket.AF_UNIX)
        self._control.settimeout(30.0)
        self._control.connect(zygote.address)
        self._lines = self._control.makefile("rb")
        self._control.sendall(json.dumps({**spec, "log": str(self.log)}).encode() + b"\n")
        self.pid: int = self._reply()
        self.ports: dict[str, int] = self._reply()

    def _reply(self) -> Any:
        try:
            line = self._lines.readline()
        except TimeoutError:
            self.signal(signal.SIGUSR1)  # it writes its stacks
            raise AssertionError(f"{self.name} does not answer, see {self.log}") from None
        if not line:
            raise AssertionError(f"{self.name} has ended; its log ends:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)

    def ask(self, do: str, **fields: Any) -> Any:
        self._control.sendall(json.dumps({"do": do} | fields).encode() + b"\n")
        return self._reply()

    def gates(self, **gates: Any) -> None:
        self.ask("gates", **gates)

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = self.ask("state")
        return state

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        self.signal(signal.SIGKILL)
        while True:
            try:
                if not self._control.recv(1 << 16):
                    break
            except OSError:
                break
        self.close()

    def close(self) -> None:
        """Hang up: the engine ends."""
        self._lines.close()
        self._control.close()


class Front:
    """One engine's relays: side channel, HTTP, KV."""

    def __init__(self) -> None:
        self.side, self.http, self.kv = Relay(), Relay(), Relay()

    def aim(self, ports: Mapping[str, int]) -> None:
        self.side.target, self.kv.target, self.http.target = ports["side"], ports["kv"], ports.get("http", 0)

    def all(self) -> tuple[Relay, Relay, Relay]:
        return self.side, self.http, self.kv


class Fleet:
    """``prefills`` prefill engines and one decode engine.

    Args:
        keys: Folder of keys per engine name.
        transfer: Laid over the usual settings.
        patient: No time-out passes because a busy machine lets a process wait; for what is not about time.
    """

    def __init__(
        self,
        zygote: Zygote,
        *,
        prefills: int = 1,
        blocks: int = 512,
        keys: Mapping[str, str] | None = None,
        transfer: Mapping[str, Any] | None = None,
        patient: bool = False,
        decode: bool = True,
        connect: bool = True,
    ) -> None:
        self.zygote = zygote
        self.keys = dict(keys or {})
        self.transfer = {**TRANSFER, **(PATIENT if patient else {}), **(transfer or {})}
        self.suspect_after_s = PATIENT_PEER_TIMEOUT_S if patient else 1.0
        self.peer_timeout_s = PATIENT_PEER_TIMEOUT_S if patient else PEER_TIMEOUT_S
        self.blocks = blocks
        self.names = [f"p{n}" for n in range(1, prefills + 1)]
        self.fronts = {name: Front() for name in [*self.names, "d"]}
        self.engines: dict[str, EngineProcess] = {}
        self._epochs = dict.fromkeys(self.fronts, 0)
        self._requests = 0
        self._marked: dict[str, float] = {}
        for name in [*self.names, *(["d"] if decode else [])]:
            self.start(name)
        if decode and connect:
            self.wait_until_connected()

    @property
    def p(self) -> EngineProcess:
        return self.engines["p1"]

    @property
    def d(self) -> EngineProcess:
        return self.engines["d"]

    # -- engines -----------------------------------------------------------------------------------------------

    def start(self, name: str, **spec: Any) -> EngineProcess:
        """Start an engine, or its next epoch."""
        self._epochs[name] += 1
        front = self.fronts[name]
        engine = EngineProcess(
            self.zygote,
            {
                "name": name,
                "epoch": self._epochs[name],
                "blocks": self.blocks,
                "kv_relay_port": front.kv.port,
                "settings": self.settings(name),
                **spec,
            },
        )
        front.aim(engine.ports)
        self.engines[name] = engine
        return engine

    def settings(self, name: str) -> dict[str, Any]:
        channel = {"port": 0, "heartbeat_s": 0.1, "peer_timeout_s": self.peer_timeout_s}
        if name in self.keys:
            channel["keys_dir"] = self.keys[name]
        settings = {
            "role": "decode" if name == "d" else "prefill",
            "side_channel": channel,
            "transfer": self.transfer,
            "policy": {"offload": "threshold", "log_interval_s": None},
            # a prefill engine's own limit is what it refuses by, whatever the decode engine thinks
            # who is asked first is decided by load alone, not by what relays cost
            "split_policy": {
                "prompt_length_threshold": 32,
                "prefill_queue_max": 64 if name == "d" else 16,
                "link_weight": 0.0,
                "suspect_after_s": self.suspect_after_s,
            },
        }
        if name == "d":
            fronts = [self.fronts[p] for p in self.names]
            settings["prefill_workers"] = [
                {"url": f"http://127.0.0.1:{f.http.port}", "side_channel": f"127.0.0.1:{f.side.port}"} for f in fronts
            ]
        return settings

    def restart(self, name: str, **spec: Any) -> None:
        """Kill it if it lives, and start it again behind the same ports."""
        self.engines[name].kill()
        self.start(name, **spec)

    def worker(self, name: str = "p1") -> dict[str, Any]:
        """What D says of a prefill worker."""
        workers = self.d.state()["view"]["prefill_workers"]["workers"]
        found: dict[str, Any] = workers[f"127.0.0.1:{self.fronts[name].side.port}"]
        return found

    def wait_until_connected(self, *names: str) -> None:
        for name in names or self.names:
            eventually(lambda name=name: self.worker(name)["healthy"], lambda name=name: str(self.worker(name)))

    # -- requests ----------------------------------------------------------------------------------------------

    def send(self, tokens: int = 300) -> str:
        self._requests += 1
        request_id = f"r{self._requests}"
        self.d.ask("send", request_id=request_id, seed=self._requests, tokens=tokens)
        return request_id

    def job(self, request_id: str) -> dict[str, Any]:
        job: dict[str, Any] = self.d.ask("job", request_id=request_id)
        return job

    def wait_until(self, request_id: str, *states: str, timeout_s: float = WAIT_S) -> dict[str, Any]:
        def reached() -> dict[str, Any] | None:
            job = self.job(request_id)
            return job if job["state"] in states else None

        job: dict[str, Any] = eventually(reached, lambda: f"{request_id} {states}: {self.describe()}", timeout_s)
        return job

    # -- counters ----------------------------------------------------------------------------------------------

    def figures(self) -> dict[str, float]:
        """All that is counted, flat: ``d.nacks``, ``p1.accepted``, ``d.fallback_stalled``..."""
        found: dict[str, float] = {}
        for name, engine in self.engines.items():
            state = engine.state()
            view = state["view"]
            role = view["decode" if name == "d" else "prefill"]
            counted = {**state["counters"], **role["totals"], **view["side_channel"]}
            if name == "d":
                counted |= {f"decision_{reason}": by for reason, by in role["decisions"].items()}
                counted |= view["prefill_workers"]["counters"]
                counted |= {f"fallback_{reason}": by for reason, by in role["fallbacks"].items()}
                counted["repairs"] = sum(role["repairs"].values())
            else:
                counted |= {key: by for key, by in view["prefill_service"].items() if isinstance(by, int)}
                counted |= {f"drop_{reason}": by for reason, by in role["drops"].items()}
                counted["drops"] = sum(role["drops"].values())
            found |= {f"{name}.{key}": by for key, by in counted.items()}
        return found

    def mark(self) -> None:
        """``risen`` counts from now."""
        self._marked = self.figures()

    def risen(self, key: str, victim: str = "p1") -> float:
        """By how much a counter rose; ``p.`` is the victim."""
        key = f"{victim}.{key[2:]}" if key.startswith("p.") else key
        return self.figures().get(key, 0) - self._marked.get(key, 0)

    def fallbacks(self) -> dict[str, float]:
        """Why D computed itself, since the mark."""
        prefix = "d.fallback_"
        risen = {k: by - self._marked.get(k, 0) for k, by in self.figures().items() if k.startswith(prefix)}
        return {key.removeprefix(prefix): by for key, by in risen.items() if by}

    def wait_until_counted(self, key: str, victim: str = "p1", at_least: int = 1) -> None:
        eventually(lambda: self.risen(key, victim) >= at_least, lambda: f"{key}\n{self.describe()}")

    # -- afterwards --------------------------------------------------------------------------------------------

    def describe(self) -> str:
        """All there is to know, for a failed test."""
        lines = []
        for name, engine in self.engines.items():
            state = engine.state()
            state["view"].get("decode", {}).pop("decision_log", None)
            lines.append(f"{name}: {json.dumps(state, indent=1)[:6000]}")
            lines.append(engine.log.read_text()[-1500:])
        return "\n".join(lines)

    def leaks(self) -> dict[str, Any]:
        """What is not as it was before any request; empty if all is well."""
        found: dict[str, Any] = {}
        for name, engine in self.engines.items():
            state = engine.state()
            view, counters = state["view"], state["counters"]
            values = {gauge: counters[gauge] for gauge in GAUGES}
            values |= {error: counters[error] for error in ("internal_errors", "hook_errors")}
            values |= {"blocks_taken": state["blocks_taken"], "violations": state["violations"]}
            values["callback_errors"] = view["side_channel"]["callback_errors"]
            if name == "d":
                decode = view["decode"]
                values |= {"open": decode["open"], "held": decode["held_tokens"], "awaited": state["awaited"]}
                values |= {"tracked": decode["tracked_requests"], "wrong": state["wrong"]}
                values["calls"] = view["prefill_workers"]["calls"]
            else:
                prefill = view["prefill"]
                values |= {"open": prefill["open"], "held": prefill["held_tokens"], "prompts": state["prompts"]}
                values |= {"held_blocks": state["held"], "awaited": view["prefill_service"]["awaited"]}
            found |= {f"{name}.{key}": value for key, value in values.items() if value}
        return found

    def assert_nothing_leaks(self, timeout_s: float = WAIT_S) -> None:
        eventually(lambda: not self.leaks(), lambda: f"{self.leaks()}\n{self.describe()}", timeout_s)

    def heal(self) -> None:
        """Relays as at first, gates open, every engine running."""
        for front in self.fronts.values():
            for relay in front.all():
                relay.heal()
        for engine in self.engines.values():
            engine.signal(signal.SIGCONT)

    def close(self) -> None:
        for engine in self.engines.values():
            engine.signal(signal.SIGCONT)
            engine.close()
        for front in self.fronts.values():
            for relay in front.all():
                relay.close()
