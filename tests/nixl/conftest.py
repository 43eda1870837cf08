"""Real NIXL between two real processes on loopback: starting, asking and ending them."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
GEOMETRY = {"layers": 2, "kv_heads": 2, "head_dim": 16, "dtype": "bfloat16"}
REGION_SLOTS = 4
STALL_S = 3.0  # longer than a process takes to start
TRANSFER = {
    "codec": "raw",
    "compile": False,
    "guard_tokens": 0,
    "guard_limit": 10.0,
    "slot_bytes": 4096,
    "region_slots": REGION_SLOTS,
    "ring_max_bytes": 64 * 4096,
    "stall_timeout_s": STALL_S,
    "linger_s": 0.2,
    "scatter_idle_budget_ms": 5.0,
}
ENVIRONMENT = {"UCX_TLS": "tcp,self,sm,cma", "UCX_NET_DEVICES": "lo", "OMP_NUM_THREADS": "1"}


class Child:
    """A process running ``child.py``."""

    def __init__(self, engine: str, epoch: int, log: Path) -> None:
        self.engine, self.epoch, self.log = engine, epoch, log
        spec = {
            "engine": engine,
            "epoch": epoch,
            "geometry": GEOMETRY,
            "transfer": TRANSFER,
            "blocks": 4096,
            "block_size": 16 if engine == "p" else 8,
        }
        self._stderr = log.open("ab")
        paths = [str(ROOT), str(ROOT / "policies"), str(ROOT / "tests")]
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("child.py")), json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(paths)},
        )
        self._replies: queue.Queue[bytes] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._replies.put(line)

    def reply(self, timeout_s: float = 180.0) -> Any:
        try:
            return json.loads(self._replies.get(timeout=timeout_s))
        except queue.Empty:
            tail = self.log.read_text(errors="replace")[-3000:]
            raise AssertionError(f"{self.engine} does not answer; its log ends:\n{tail}") from None

    def ask(self, do: str, **fields: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do} | fields).encode() + b"\n")
        self.process.stdin.flush()
        return self.reply()

    def apply(self, *commands: tuple[str, dict[str, Any]]) -> None:
        self.ask("apply", commands=commands)

    def said(self, what: str) -> list[Any]:
        said: list[Any] = self.ask("state")["said"][what]
        return said

    def counters(self) -> dict[str, float]:
        counters: dict[str, float] = self.ask("state")["counters"]
        return counters

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        for pipe in (self.process.stdin, self.process.stdout, self._stderr):
            assert pipe is not None
            pipe.close()


def eventually(condition: Callable[[], Any], what: str, timeout_s: float = 30.0) -> Any:
    """The first true value of ``condition``; asks 50 times a second."""
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        pause.wait(0.02)
    raise AssertionError(f"not within {timeout_s} s: {what}")


class Pair:
    """A prefill and a decode process that know each other."""

    eventually = staticmethod(eventually)

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._transfers = 0
        self.prefill, self.decode = self.start("p", 1), self.start("d", 1)
        for child in (self.prefill, self.decode):
            assert child.reply() == "ready"
        self.introduce()

    def start(self, engine: str, epoch: int) -> Child:
        return Child(engine, epoch, self._folder / f"{engine}-{epoch}.log")

    def successor(self, engine: str) -> Child:
        """A process of the next epoch, ready to take over."""
        old = self.prefill if engine == "p" else self.decode
        new = self.start(engine, old.epoch + 1)
        assert new.reply() == "ready"
        return new

    def replace(self, engine: str, new: Child) -> None:
        """Kill the old process, if it still lives, and introduce the new one."""
        (self.prefill if engine == "p" else self.decode).kill()
        if engine == "p":
            self.prefill = new
        else:
            self.decode = new
        self.introduce()

    def introduce(self) -> None:
        region = {"region_first_slot": 8, "region_slots": REGION_SLOTS}
        for one, other, receives in ((self.prefill, self.decode, False), (self.decode, self.prefill, True)):
            endpoints = (other.ask("endpoint"),)
            peer = {"peer": other.engine, "epoch": other.epoch, "endpoints": endpoints, "receives": receives}
            one.apply(("AddPeer", peer | region))

    def begin(self, tokens: int, *, codec: str = "raw", first_token: int = 0) -> "Transfer":
        """Compute a prompt on P and begin to send it."""
        self._transfers += 1
        transfer = Transfer(self, self._transfers, tokens, first_token)
        transfer.begin(codec)
        return transfer

    def assert_nothing_leaks(self) -> None:
        """Every gauge goes back to zero, on both sides."""
        gauges = ("open_sends", "open_receives", "slots_in_use", "slots_quarantined", "private_buffers_in_use")
        for child in (self.prefill, self.decode):
            eventually(
                lambda child=child: not any(child.counters()[gauge] for gauge in (*gauges, "unanswered")),
                f"{child.engine} idle, but: {child.counters()}",
            )
            errors = {key: child.counters()[key] for key in ("internal_errors", "hook_errors")}
            assert errors == {"internal_errors": 0, "hook_errors": 0}

    def close(self) -> None:
        for child in (self.prefill, self.decode):
            child.signal(signal.SIGCONT)
            child.kill()


class Transfer:
    """One request that D takes from P."""

    def __init__(self, pair: Pair, number: int, tokens: int, first_token: int) -> None:
        self.pair, self.number, self.tokens, self.first_token = pair, number, tokens, first_token
        self.request_id = f"request-{number}"
        self.transfer_id = number.to_bytes(16, "big").hex()
        self.nonce = number * 0x9E3779B97F4A7C15 % 2**64
        self.prefill_blocks = list(range(-(-tokens // 16)))[::-1]
        self.decode_blocks = list(range(7, 7 + -(-tokens // 8)))

    def begin(self, codec: str) -> None:
        ids = {"transfer_id": self.transfer_id, "nonce": self.nonce}
        tokens = {"first_token": self.first_token, "end_token": self.tokens}
        receive = ids | tokens | {"request_id": self.request_id, "peer": "p", "block_ids": self.decode_blocks}
        computed = {"computed_tokens": self.tokens, "block_ids": self.prefill_blocks}
        self.pair.decode.apply(("OpenReceive", receive))
        self.pair.prefill.ask("fill", block_ids=self.prefill_blocks, seed=self.number, tokens=self.tokens)
        self.pair.prefill.apply(
            ("OpenSend", ids | tokens | {"peer": "d", "codec": codec}),
            ("Computed", computed | {"transfer_id": self.transfer_id}),
        )

    def wait_received(self) -> None:
        eventually(lambda: self.request_id in self.pair.decode.said("completed"), f"{self.request_id} received")
        assert self.request_id in self.pair.decode.said("received")
        assert self.pair.decode.said("completed").count(self.request_id) == 1

    def wait_failed(self, side: str) -> str:
        """The reason with which a side gave up."""
        child, what = (self.pair.prefill, "send_failed") if side == "p" else (self.pair.decode, "receive_failed")
        key = self.transfer_id if side == "p" else self.request_id
        return str(eventually(lambda: dict(child.said(what)).get(key), f"{self.request_id} fails on {side}"))

    def abandon(self) -> list[int]:
        """Give up on D; the blocks that D must compute itself."""
        known = len(self.pair.decode.said("invalid"))
        self.pair.decode.apply(("AbandonReceive", {"request_id": self.request_id, "reason": "test"}))
        eventually(lambda: self.request_id in self.pair.decode.said("completed"), f"{self.request_id} completed")
        assert self.pair.decode.said("completed").count(self.request_id) == 1
        return self.pair.decode.said("invalid")[known:]

    def worst_error(self, end: int | None = None) -> float:
        end = self.tokens if end is None else end
        if end <= self.first_token:
            return 0.0
        error: float = self.pair.decode.ask(
            "worst_error",
            block_ids=self.decode_blocks,
            seed=self.number,
            start=self.first_token,
            end=end,
            tokens=self.tokens,
        )
        return error


@pytest.fixture(scope="module")
def shared_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("nixl"))
    try:
        yield pair
    finally:
        pair.close()


@pytest.fixture
def pair(shared_pair: Pair) -> Iterator[Pair]:
    """Two processes, idle before the test and after it."""
    yield shared_pair
    shared_pair.assert_nothing_leaks()


@pytest.fixture
def own_pair(tmp_path: Path) -> Iterator[Pair]:
    """Two processes for one test that kills or replaces them; idle after it."""
    pair = Pair(tmp_path)
    try:
        yield pair
        pair.assert_nothing_leaks()
    finally:
        pair.close()
