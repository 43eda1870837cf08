"""The data plane alone, between two processes: int8 against raw over slow links, payload against a plain NIXL copy.

    sudo .venv/bin/python benchmarks/transfer.py --json [--no-netns] [--mib 96] [--engines]

Two worker ranks with real NIXL and synthetic KV (8 layers, 8 heads of 128), no engines; with ``--engines`` also what
``transfer_engines.py`` measures: hand-over beside stock NixlConnector's, and what transfers cost running decodes.

- ``int8_vs_raw``: effective bandwidth (bytes of cache a second, whatever the wire carries) of int8 over raw, across
  two network namespaces with ``tc tbf`` on the sender's side at 200 Mbit/s and 1 Gbit/s. Needs root; says so otherwise.
- ``payload_vs_copy``: on loopback, payload rate of a raw transfer (gather, checksum, write, copy, verify, scatter) over
  the rate of bare NIXL writes of full slots through the same number of slots, each acknowledged.
- ``cpu_s_per_gb``: CPU seconds of each process per GB of cache moved, on loopback.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SLOT_BYTES = 4 << 20
SLOTS = 8
RATES = {"200mbit": "200mbit", "1gbit": "1gbit"}
BLOCK = 32
SHAPE = {"layers": 8, "kv_heads": 8, "head_dim": 128}
GAP_S = 0.0002


class Worker:
    """One worker rank in a process of its own; answers JSON lines."""

    def __init__(self, spec: dict[str, Any]) -> None:
        import torch

        from disagg_plugin.config import TransferSettings
        from disagg_plugin.kv.codec import KVCodec
        from disagg_plugin.kv.dataplane import DataPlane, agent_name
        from disagg_plugin.kv.geometry import HeadRange, KVGeometry
        from disagg_plugin.kv.transport import NixlTransport
        from disagg_vllm.kv_views import PagedView

        torch.set_num_threads(1)
        geometry = KVGeometry(**SHAPE, dtype=spec["dtype"])
        shape = (spec["blocks"] + 1, geometry.kv_heads, BLOCK, 2, geometry.head_dim)  # as vLLM lays it out on a CPU
        self.caches = [torch.zeros(shape, dtype=getattr(torch, geometry.dtype)) for _ in range(geometry.layers)]
        sides = [(cache[..., 0, :], cache[..., 1, :]) for cache in self.caches]
        heads = HeadRange(0, geometry.kv_heads)
        self.view = PagedView(sides, geometry=geometry, heads=heads, block_size=BLOCK)
        codec = KVCodec(head_dim=geometry.head_dim, dtype=getattr(torch, geometry.dtype), compile=True)
        codec.warm_up(encode=spec["engine"] == "p", decode=spec["engine"] == "d")
        transfer = TransferSettings(
            codec="raw",
            slot_bytes=SLOT_BYTES,
            region_slots=SLOTS,
            ring_max_bytes=SLOTS * SLOT_BYTES,
            stall_timeout_s=60.0,
            scatter_idle_budget_ms=20.0,
            guard_tokens=0,
            guard_limit=10.0,
        )
        self.transport = NixlTransport(agent_name(spec["engine"], 0, 1))
        self.plane = DataPlane(
            engine=spec["engine"],
            epoch=1,
            rank=0,
            view=self.view,
            transfer=transfer,
            transport=self.transport,
            codec=codec,
        )

    def endpoint(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self.plane.endpoint)
        return fields | {"agent_metadata": fields["agent_metadata"].hex()}

    def meet(self, endpoint: dict[str, Any], receives: bool) -> None:
        from disagg_plugin.kv.commands import AddPeer, RankEndpoint

        other = RankEndpoint(**endpoint | {"agent_metadata": bytes.fromhex(endpoint["agent_metadata"])})
        self.peer = other
        self.plane.apply([AddPeer("d" if not receives else "p", 1, (other,), 0, SLOTS, receives=receives)])

    def fill(self, tokens: int) -> None:
        import torch

        noise = torch.Generator().manual_seed(1)
        for cache in self.caches:
            cache.copy_(torch.randn(cache.shape, generator=noise).to(cache.dtype))

    def begin(self, number: int, tokens: int, codec: str, sends: bool) -> None:
        """Tell the rank of a transfer; ``finish`` runs it."""
        from disagg_plugin.kv.commands import Computed, OpenReceive, OpenSend

        transfer_id, blocks = number.to_bytes(16, "big"), tuple(range(1, -(-tokens // BLOCK) + 1))
        if sends:
            self.plane.apply(
                [
                    OpenSend(transfer_id, number, "d", 0, tokens, codec),
                    Computed(transfer_id, tokens, blocks),
                ]
            )
        else:
            self.plane.apply([OpenReceive(f"r{number}", transfer_id, number, "p", 0, tokens, blocks)])

    def finish(self, sends: bool) -> dict[str, float]:
        """Step until the open transfer is over; when that was, and what it cost."""
        cpu_s = time.process_time()
        while True:
            self.plane.after_forward(computed=False)
            done, report = self.plane.take_completions(), self.plane.report()
            if report.send_failed or report.receive_failed:
                raise RuntimeError(f"{report.send_failed} {report.receive_failed}")
            if report.sent if sends else done.received:
                break
            time.sleep(GAP_S)
        return {"ended_s": time.monotonic(), "cpu_s": time.process_time() - cpu_s}

    def copy(self, slots: int, sends: bool) -> dict[str, float]:
        """Bare writes of full slots, each acknowledged: what NIXL itself does through so many slots."""
        memory, transport = self.plane._memory, self.transport
        self.plane._loop.stop()
        seen = 0
        if not sends:
            while seen < slots:
                for agent, message in transport.poll():
                    transport.notify(agent, message)
                    seen += 1
            return {"ended_s": time.monotonic()}
        free, pending, sent = list(range(SLOTS)), [], 0
        while seen < slots:
            while free and sent < slots:
                slot = free.pop()
                handle = transport.write(
                    self.peer.agent_name,
                    local_address=memory.staging.slot_address(slot),
                    remote_address=self.peer.ring_address + slot * SLOT_BYTES,
                    nbytes=SLOT_BYTES,
                    notification=slot.to_bytes(4, "big"),
                )
                pending.append(handle)
                sent += 1
            pending = [handle for handle in pending if handle.state().value == "pending"]
            for _, message in transport.poll():
                free.append(int.from_bytes(message, "big"))
                seen += 1
        return {"ended_s": time.monotonic()}

    def serve(self) -> None:
        replies = os.fdopen(os.dup(3), "w")
        print(json.dumps("ready"), file=replies, flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            print(json.dumps(getattr(self, request.pop("do"))(**request)), file=replies, flush=True)


class Process:
    """A worker's process, if need be in a network namespace."""

    def __init__(self, spec: dict[str, Any], prefix: list[str], env: dict[str, str]) -> None:
        reading, writing = os.pipe()
        argv = [*prefix, sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(spec)]
        script = f'exec 3>&{writing}; exec "$@" 2>/dev/null >/dev/null'
        self.process = subprocess.Popen(
            ["bash", "-c", script, "worker", *argv],
            stdin=subprocess.PIPE,
            pass_fds=(writing,),
            env=os.environ
            | env
            | {"PYTHONPATH": f"{ROOT}:{ROOT / 'connectors'}:{ROOT / 'policies'}", "OMP_NUM_THREADS": "1"},
        )
        os.close(writing)
        self._replies = os.fdopen(reading)

    def reply(self) -> Any:
        line = self._replies.readline()
        if not line:
            raise RuntimeError("a worker has ended")
        return json.loads(line)

    def tell(self, do: str, **fields: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do} | fields).encode() + b"\n")
        self.process.stdin.flush()

    def ask(self, do: str, **fields: Any) -> Any:
        self.tell(do, **fields)
        return self.reply()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self._replies.close()


@contextmanager
def namespaces(rate: str) -> Iterator[tuple[list[str], list[str]]]:
    """Two network namespaces and a cable of that rate between them; prefixes of commands that run in them."""
    name = f"disagg{os.getpid()}"
    one, two, near, far = f"{name}a", f"{name}b", f"v{os.getpid()}a", f"v{os.getpid()}b"

    def run(command: str) -> None:
        subprocess.run(command.split(), check=True, capture_output=True)

    try:
        for space in (one, two):
            run(f"ip netns add {space}")
            run(f"ip netns exec {space} ip link set lo up")
        run(f"ip link add {near} netns {one} type veth peer name {far} netns {two}")
        for space, link, host in ((one, near, 1), (two, far, 2)):
            run(f"ip netns exec {space} ip addr add 10.77.0.{host}/24 dev {link}")
            run(f"ip netns exec {space} ip link set {link} up")
        run(f"ip netns exec {one} tc qdisc replace dev {near} root tbf rate {rate} burst 256kb latency 50ms")
        yield (
            ["ip", "netns", "exec", one, "env", f"UCX_NET_DEVICES={near}"],
            ["ip", "netns", "exec", two, "env", f"UCX_NET_DEVICES={far}"],
        )
    finally:
        for space in (one, two):
            subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True)


class Pair:
    """A sending and a receiving worker."""

    def __init__(self, dtype: str, tokens: int, prefixes: tuple[list[str], list[str]], env: dict[str, str]) -> None:
        blocks = -(-tokens // BLOCK)
        specs = [{"engine": engine, "dtype": dtype, "blocks": blocks} for engine in "pd"]
        self.tokens, self._number = tokens, 0
        self.p, self.d = (Process(spec, prefix, env) for spec, prefix in zip(specs, prefixes, strict=True))
        for worker in (self.p, self.d):
            assert worker.reply() == "ready"
        p_end, d_end = self.p.ask("endpoint"), self.d.ask("endpoint")
        self.p.ask("fill", tokens=tokens)
        self.p.ask("meet", endpoint=d_end, receives=False)
        self.d.ask("meet", endpoint=p_end, receives=True)
        self.token_bytes = (
            2 * SHAPE["layers"] * SHAPE["kv_heads"] * SHAPE["head_dim"] * (4 if dtype == "float32" else 2)
        )

    def transfer(self, codec: str, tokens: int = 0) -> dict[str, float]:
        """Bytes of cache a second, and CPU seconds of both sides per GB."""
        tokens = tokens or self.tokens
        self._number += 1
        self.d.ask("begin", number=self._number, tokens=tokens, codec=codec, sends=False)
        self.d.tell("finish", sends=False)
        began_s = time.monotonic()
        self.p.ask("begin", number=self._number, tokens=tokens, codec=codec, sends=True)
        sent = self.p.ask("finish", sends=True)
        received = self.d.reply()
        gigabytes = tokens * self.token_bytes / 1e9
        return {
            "bytes_per_s": gigabytes * 1e9 / (received["ended_s"] - began_s),
            "p_cpu_s_per_gb": sent["cpu_s"] / gigabytes,
            "d_cpu_s_per_gb": received["cpu_s"] / gigabytes,
        }

    def copy(self, slots: int) -> float:
        """Bytes a second of bare NIXL writes; the last thing that this pair does."""
        self.d.tell("copy", slots=slots, sends=False)
        began_s = time.monotonic()
        ended = self.p.ask("copy", slots=slots, sends=True)
        self.d.reply()
        return float(slots * SLOT_BYTES / (ended["ended_s"] - began_s))

    def close(self) -> None:
        for worker in (self.p, self.d):
            worker.close()


def slow_links(mib: int) -> dict[str, Any]:
    """``int8_vs_raw`` per rate, and in what the ratio consists."""
    if os.geteuid() != 0:
        return {"int8_vs_raw": "needs root for network namespaces", "links": {}}
    ratios: dict[str, float] = {}
    links: dict[str, Any] = {}
    for rate in RATES:
        for dtype in ("bfloat16", "float32"):
            with namespaces(RATES[rate]) as prefixes:
                token_bytes = (
                    2 * SHAPE["layers"] * SHAPE["kv_heads"] * SHAPE["head_dim"] * (2 if dtype == "bfloat16" else 4)
                )
                pair = Pair(dtype, (mib << 20) // token_bytes, prefixes, {"UCX_TLS": "tcp,self"})
                try:
                    pair.transfer("raw", 64)  # wires the agents up
                    pair.transfer("int8", 64)
                    measured = {codec: pair.transfer(codec)["bytes_per_s"] for codec in ("raw", "int8")}
                finally:
                    pair.close()
            key = rate if dtype == "bfloat16" else f"{rate}_fp32"
            ratios[key] = round(measured["int8"] / measured["raw"], 2)
            links[key] = {f"{codec}_mb_per_s": round(speed / 1e6, 1) for codec, speed in measured.items()}
    return {"int8_vs_raw": ratios, "links": links}


def loopback(mib: int, repeats: int) -> dict[str, Any]:
    """``payload_vs_copy`` and CPU time, over shared memory and TCP."""
    found: dict[str, Any] = {"payload_vs_copy": {}, "payload_gb_per_s": {}, "copy_gb_per_s": {}, "cpu_s_per_gb": {}}
    for name, tls in (("shared_memory", "tcp,self,sm,cma"), ("tcp", "tcp,self")):
        token_bytes = 2 * SHAPE["layers"] * SHAPE["kv_heads"] * SHAPE["head_dim"] * 2
        pair = Pair("bfloat16", (mib << 20) // token_bytes, ([], []), {"UCX_TLS": tls, "UCX_NET_DEVICES": "lo"})
        try:
            pair.transfer("raw", 64)
            runs = sorted([pair.transfer("raw") for _ in range(repeats)], key=lambda run: run["bytes_per_s"])
            middle = runs[len(runs) // 2]
            copied = pair.copy((mib << 20) // SLOT_BYTES * repeats)
        finally:
            pair.close()
        found["payload_vs_copy"][name] = round(middle["bytes_per_s"] / copied, 2)
        found["payload_gb_per_s"][name] = round(middle["bytes_per_s"] / 1e9, 2)
        found["copy_gb_per_s"][name] = round(copied / 1e9, 2)
        found["cpu_s_per_gb"][name] = {side: round(middle[f"{side}_cpu_s_per_gb"], 2) for side in "pd"}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--no-netns", action="store_true", help="skip the slow links")
    parser.add_argument("--mib", type=int, default=96, help="cache moved by one transfer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--engines", action="store_true", help="also on real engines (transfer_engines.py)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        Worker(json.loads(arguments.worker)).serve()
        return
    figures = loopback(arguments.mib, arguments.repeats)
    if not arguments.no_netns:
        figures |= slow_links(arguments.mib)
    if arguments.engines:
        import transfer_engines

        figures |= transfer_engines.measured(arguments.repeats)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
