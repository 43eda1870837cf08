"""Real SGLang servers, shared by all tests of the session: a prefill, a decode, and a stock one beside them.

Four starts here, five in the whole suite: ``test_2_faults`` restarts the prefill server.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from engines import free_port, serving, sglang_command, sglang_env
from lmcache_servers import LMCacheServer
from models import tiny
from sglang_e2e.client import Engine, Offloads, at_once, prompt_of

THRESHOLD = 24  # below every prompt that is to be offloaded, above the ones that are to stay
PAGE = 16
CHUNK_TOKENS = 256
PREFILL_QUEUE = 8  # that the prefill server takes; its decode server would send it more
TOKEN_BYTES = 4 * 2 * 2 * 64 * 4  # tiny: layers × sides × heads × head_dim × float32

SPLIT = {
    "prompt_length_threshold": THRESHOLD,
    "prefill_queue_max": 64,
    "suspect_after_s": 8.0,  # as below: a report that a busy machine kept back is one
}
CLASSES = {
    "high": {"ttft_slo_s": 600.0},
    "normal": {"ttft_slo_s": 600.0},
    "low": {"ttft_slo_s": 1.0, "degrade": ["max_tokens:4"]},
}
TRANSFER = {
    "codec": "raw",
    "slot_bytes": 1 << 20,  # 255 tokens of the tiny model
    "region_slots": 4,
    "ring_max_bytes": 16 << 20,
    "stall_timeout_s": 15.0,
    "offer_timeout_s": 20.0,  # a prefill server in slices answers late
    "compile": False,
    "guard_tokens": 256,
}


@dataclass
class Plan:
    """How one server is started; the same plan starts its replacement."""

    name: str
    port: int
    mode: str | None = None
    settings: dict[str, Any] | None = None
    bootstrap_port: int = 0
    flags: tuple[str, ...] = ()

    def start(self, stack: ExitStack, folder: Path) -> Engine:
        """Start the server; ``stack`` ends it."""
        extra = ["--chunked-prefill-size", str(CHUNK_TOKENS), *self.flags]
        side_port = 0
        if self.mode is not None and self.settings is not None:
            config = folder / f"{self.name}.yaml"
            config.write_text(yaml.safe_dump(self.settings))
            extra += ["--disaggregation-transfer-backend", "disagg", "--disaggregation-mode", self.mode]
            extra += ["--disagg-config", str(config)]
            side_port = self.settings["side_channel"]["port"]
        if self.bootstrap_port:
            extra += ["--disaggregation-bootstrap-port", str(self.bootstrap_port)]
        url = f"http://127.0.0.1:{self.port}"
        model = str(tiny())
        process = stack.enter_context(
            serving(
                sglang_command(model, self.port, extra=extra),
                f"{url}/health",
                folder / f"{self.name}.log",
                start_s=900,
                env=sglang_env(),
            )
        )
        engine = Engine(url, model, side_port, process.pid, self.bootstrap_port)
        stack.callback(engine.http.close)
        return engine


@dataclass
class Fleet:
    """The servers of a session and what is needed to start more of them."""

    prefill_plan: Plan
    prefill: Engine
    decode: Engine
    stock: Engine
    folder: Path
    prefill_life: ExitStack
    threads: list[str]
    lmcache: LMCacheServer  # of the prefill server; not running until test_5_lmcache starts it

    def restart_prefill(self) -> None:
        """Start the prefill server again at the same address; it must have ended."""
        self.prefill_life.close()
        self.prefill = self.prefill_plan.start(self.prefill_life, self.folder)

    def local(self, prompt: list[int], **more: Any) -> Any:
        """What an SGLang without the plugin says."""
        self.stock.flush()
        return self.stock.generate(prompt, **more)


def settings(side_port: int, **more: Any) -> dict[str, Any]:
    """A settings file's content."""
    return {
        "side_channel": {"port": side_port, "peer_timeout_s": 8.0},  # servers that spin on two cores starve each other
        "transfer": TRANSFER,
        "split_policy": SPLIT,
        "policy": {"offload": "threshold"},
        **more,
    }


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    p_port, p_side, p_bootstrap, d_port, d_side, s_port = (free_port() for _ in range(6))
    split = {"prompt_length_threshold": THRESHOLD, "prefill_queue_max": PREFILL_QUEUE}
    lmcache = LMCacheServer("prefill", folder)
    patience = {"lookup_timeout_ms": 5_000, "request_timeout_s": 15.0}
    cache = {"reuse_prefix": True, "lmcache": {"url": lmcache.url, "on_unreachable": "warn", **patience}}
    p_settings = settings(p_side, split_policy=split, cache=cache, observability={"admin_route": True})
    p_plan = Plan("prefill", p_port, "prefill", p_settings, p_bootstrap, ("--enable-metrics",))
    worker = {"url": f"http://127.0.0.1:{p_port}", "side_channel": f"127.0.0.1:{p_side}"}
    d_plan = Plan("decode", d_port, "decode", settings(d_side, prefill_workers=[worker]))
    with ExitStack() as stack:
        prefill_life = stack.enter_context(ExitStack())
        lives = [(p_plan, prefill_life), (d_plan, stack.enter_context(ExitStack()))]
        lives.append((Plan("stock", s_port), stack.enter_context(ExitStack())))
        prefill, decode, stock = at_once([lambda p=p, s=s: p.start(s, folder) for p, s in lives])
        decode.when(connected)
        offload(decode, prompt_of(600, seed=39))  # the first transfer wires the NIXL agents up
        decode.flush()
        threads = our_threads(decode.snapshot())
        yield Fleet(p_plan, prefill, decode, stock, folder, prefill_life, threads, lmcache)


@pytest.fixture(scope="session")
def second_decode(fleet: Fleet) -> Iterator[Engine]:
    """Another decode server of the same prefill server: it asks for int8, refuses early, and has /metrics."""
    worker = {"url": fleet.prefill.url, "side_channel": f"127.0.0.1:{fleet.prefill.side_port}"}
    more = {
        "prefill_workers": [worker],
        "transfer": {**TRANSFER, "codec": "int8"},
        "split_policy": {**SPLIT, "suspect_after_s": 1.0},  # test_4_admission looks at it beside a hanging worker
        "qos": {"enable_early_rejection": True, "classes": CLASSES},
        "observability": {"admin_route": True},
    }
    plan = Plan("second", free_port(), "decode", settings(free_port(), **more), flags=("--enable-metrics",))
    with ExitStack() as stack:
        decode = plan.start(stack, fleet.folder)
        decode.when(connected)
        offload(decode, prompt_of(600, seed=40))  # the guard measures the model's own KV before it lets int8 through
        yield decode


def offload(decode: Engine, prompt: list[int]) -> None:
    """A prompt that is prefilled elsewhere, also where servers have just started and stand still for seconds."""
    for _ in range(20):
        counted = Offloads(decode)
        decode.generate(prompt)
        if counted.totals()["landed"]:
            return
        decode.flush()
        decode.when(connected)
    raise AssertionError(f"{decode.snapshot()['decode']} {decode.snapshot()['prefill_workers']}")


def connected(view: dict[str, Any]) -> bool:
    """Some prefill worker can be used."""
    return any(worker["healthy"] for worker in view["prefill_workers"]["workers"].values())


def our_threads(view: dict[str, Any]) -> list[str]:
    """SGLang starts others as it goes."""
    return [name for name in view["threads"] if name.startswith("disagg")]


def is_quiet(view: dict[str, Any]) -> bool:
    """Nothing open, held, or in use on this server; every page is free or evictable."""
    free = view["kv"]["free_blocks"] == view["kv"]["total_blocks"] and not any(view.get("waiting", {}).values())
    for role in ("decode", "prefill"):
        if role in view:
            side = view[role]
            free = free and not side["open"] and not side["held_tokens"]
            for counters in side["ranks"].values():
                gauges = ("open_sends", "open_receives", "slots_in_use", "private_buffers_in_use")
                free = free and not any(counters.get(gauge, 0) for gauge in gauges)
    return bool(free)


@pytest.fixture
def pair(fleet: Fleet) -> Iterator[Fleet]:
    """The fleet, caches empty; afterwards nothing may have leaked, and every health endpoint answers."""
    fleet.decode.flush()
    yield fleet
    view = fleet.decode.when(lambda view: is_quiet(view) and not view["decode"]["tracked_requests"])
    assert our_threads(view) == fleet.threads
    fleet.decode.flush()
    for path in ("/health", "/health_generate"):
        assert fleet.decode.http.get(f"{fleet.decode.url}{path}").status_code == 200
