"""Real engines, shared by all tests of the session: a prefill engine, a decode engine, and a stock one beside them.

Three starts here; the whole suite is allowed eight (CONTRIBUTING.md).
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from e2e.client import Engine, at_once
from e2e.running import FLEET
from engine_processes import is_alive
from engines import free_port, serving, vllm_command, vllm_env
from models import tiny

BLOCK = 32
THRESHOLD = 24  # below every prompt that is to be offloaded, above the ones that are to stay
DECODE_BLOCKS = 480  # five prompts of 3,000 tokens
TINY_TOKEN_BYTES = 4 * 2 * 2 * 64 * 4  # layers × sides × heads × head_dim × float32

SPLIT = {
    "prompt_length_threshold": THRESHOLD,
    "prefill_queue_max": 64,
    "suspect_after_s": 8.0,  # and so do its reports
}
TRANSFER = {
    "codec": "raw",
    "slot_bytes": 1 << 20,  # 255 tokens of the tiny model: half a scheduler chunk
    "region_slots": 4,
    "ring_max_bytes": 16 << 20,
    "stall_timeout_s": 15.0,
    "offer_timeout_s": 20.0,  # an engine that a test has slowed answers late
    "compile": False,
}


@dataclass
class Plan:
    """How one engine is started; the same plan starts its replacement."""

    name: str
    model: Path
    port: int
    core: int
    settings: dict[str, Any] | None
    extra: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)

    def start(self, stack: ExitStack, folder: Path) -> Engine:
        """Start the engine; ``stack`` ends it."""
        extra = ["--max-num-batched-tokens", "512", *self.extra]
        side_port = 0
        if self.settings is not None:
            config = folder / f"{self.name}.yaml"
            config.write_text(yaml.safe_dump(self.settings))
            extra += ["--kv-connector", "disagg", "--disagg-config", str(config)]
            extra += ["--disagg-role", str(self.settings["role"])]
            side_port = self.settings["side_channel"]["port"]
        argv = vllm_command(str(self.model), self.port, core=self.core, extra=extra)
        process = stack.enter_context(
            serving(
                argv,
                f"http://127.0.0.1:{self.port}/health",
                folder / f"{self.name}.log",
                start_s=600,
                env={**vllm_env(core=self.core), **self.env},
            )
        )
        engine = Engine(f"http://127.0.0.1:{self.port}", str(self.model), side_port, process.pid)
        stack.callback(engine.http.close)
        return engine


@dataclass
class Fleet:
    """The engines of a session and what is needed to start more of them."""

    prefill_plan: Plan
    prefill: Engine
    decode: Engine
    stock: Engine
    folder: Path
    prefill_life: ExitStack
    stock_life: ExitStack
    warm_decode: dict[str, Any]

    def restart_prefill(self) -> None:
        """Start the prefill engine again at the same address; it must have ended."""
        self.prefill_life.close()
        self.prefill = self.prefill_plan.start(self.prefill_life, self.folder)


def settings(role: str, side_port: int, **more: Any) -> dict[str, Any]:
    """A settings file's content."""
    return {
        "role": role,
        "side_channel": {"port": side_port},
        "transfer": TRANSFER,
        "policy": {"offload": "threshold"},  # what is to be offloaded must not depend on the machine's speed
        "split_policy": SPLIT,
        **more,
    }


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    model = tiny()
    p_port, p_side, d_port, d_side, s_port, other_side = (free_port() for _ in range(6))
    other_port = free_port()
    p_plan = Plan(
        "prefill",
        model,
        p_port,
        0,
        settings("prefill", p_side, observability={"admin_route": True}),
        extra=("--shutdown-timeout", "120"),
    )
    workers = [
        {"url": f"http://127.0.0.1:{p_port}", "side_channel": f"127.0.0.1:{p_side}"},
        # comes up late in the session, with other weights, to be refused
        {"url": f"http://127.0.0.1:{other_port}", "side_channel": f"127.0.0.1:{other_side}"},
    ]
    d_plan = Plan(
        "decode",
        model,
        d_port,
        1,
        settings("decode", d_side, prefill_workers=workers),
        extra=("--num-gpu-blocks-override", str(DECODE_BLOCKS)),
    )
    s_plan = Plan("stock", model, s_port, 0, None)
    with FLEET as stack:
        prefill_life = stack.enter_context(ExitStack())
        stock_life = stack.enter_context(ExitStack())
        decode_life = stack.enter_context(ExitStack())
        with_engines = [(p_plan, prefill_life), (d_plan, decode_life), (s_plan, stock_life)]
        prefill, decode, stock = at_once([lambda p=p, s=s: p.start(s, folder) for p, s in with_engines])
        decode.when(lambda v: any(w["healthy"] for w in v["prefill_workers"]["workers"].values()))
        decode.complete(range(1_000, 1_600), cache_salt="warm-up")  # the first transfer wires the NIXL agents up
        yield Fleet(p_plan, prefill, decode, stock, folder, prefill_life, stock_life, warm_decode=settle(decode))


def is_quiet(view: dict[str, Any]) -> bool:
    """Nothing open, held, or in use on this engine; every block but the null block is free."""
    free = view["kv"]["free_blocks"] == view["kv"]["total_blocks"] - 1
    for role in ("decode", "prefill"):
        if role in view:
            side = view[role]
            free = free and not side["open"] and not side["held_tokens"]
            for counters in side["ranks"].values():
                gauges = ("open_sends", "open_receives", "slots_in_use", "private_buffers_in_use")
                free = free and not any(counters.get(g, 0) for g in gauges)
    return bool(free)


def not_vllms(threads: list[str]) -> list[str]:
    """vLLM compiles grammars in a pool of its own, from the first structured output on."""
    return [name for name in threads if not name.startswith("ThreadPoolExecutor")]


def settle(engine: Engine) -> dict[str, Any]:
    """Wait until the engine is quiet; its snapshot."""
    return engine.when(is_quiet)


@pytest.fixture
def pair(fleet: Fleet) -> Iterator[Fleet]:
    """The fleet; afterwards nothing may have leaked: blocks, slots, transfers, tickets, threads."""
    yield fleet
    view = settle(fleet.decode)
    assert not_vllms(view["threads"]) == not_vllms(fleet.warm_decode["threads"])
    assert view["decode"]["tracked_requests"] == 0
    if is_alive(fleet.prefill):
        settle(fleet.prefill)
