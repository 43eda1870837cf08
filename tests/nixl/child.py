"""One engine worker in a process of its own, as the tests in this folder drive it: JSON lines in, JSON lines out.

The loop at the bottom stands in for the engine: it steps the data plane as long as nobody asks for anything. The
transport is the real one, in a wrapper that can do to a chunk what a network or a hostile peer would.
"""

import dataclasses
import json
import os
import select
import sys
from collections import deque
from typing import Any

import torch
from faults.faulty_transport import FaultyTransport

from disagg_plugin.config import TransferSettings
from disagg_plugin.kv import commands as kv_commands
from disagg_plugin.kv.commands import RankEndpoint
from disagg_plugin.kv.dataplane import DataPlane, agent_name
from disagg_plugin.kv.geometry import HeadRange, KVGeometry
from disagg_plugin.kv.transport import NixlTransport
from disagg_plugin.testing import DenseView, canonical_noise


class Worker:
    """The data plane with everything it said so far."""

    def __init__(self, spec: dict[str, Any]) -> None:
        geometry = KVGeometry(**spec["geometry"])
        transfer = TransferSettings(**spec["transfer"])
        self.view = DenseView(geometry, blocks=spec["blocks"], block_size=spec["block_size"])
        name = agent_name(spec["engine"], 0, spec["epoch"])
        self.transport = FaultyTransport(NixlTransport(name), transfer.slot_bytes)
        self.plane = DataPlane(
            engine=spec["engine"],
            epoch=spec["epoch"],
            rank=0,
            view=self.view,
            transfer=transfer,
            transport=self.transport,
        )
        self.said: dict[str, list[Any]] = {
            key: [] for key in ("completed", "invalid", "released", "received", "receive_failed", "staged", "sent")
        } | {"send_failed": [], "codecs": []}

    def step(self) -> None:
        self.plane.after_forward(computed=False)
        completions = self.plane.take_completions()
        report = self.plane.report()
        self.said["completed"] += completions.received
        self.said["invalid"] += sorted(completions.invalid_block_ids)
        self.said["released"] += completions.released
        self.said["received"] += report.received
        self.said["receive_failed"] += report.receive_failed
        self.said["staged"] += [one.hex() for one in report.staged]
        self.said["sent"] += [one.hex() for one in report.sent]
        self.said["send_failed"] += [(one.hex(), reason) for one, reason in report.send_failed]
        self.said["codecs"] += [timing.codecs for timing in report.receive_timings]

    def do(self, request: dict[str, Any]) -> Any:
        match request.pop("do"):
            case "endpoint":
                fields = dataclasses.asdict(self.plane.endpoint)
                return fields | {"agent_metadata": fields["agent_metadata"].hex()}
            case "apply":
                self.plane.apply([_command(name, fields) for name, fields in request["commands"]])
            case "fill":
                self.view.fill(request["block_ids"], request["seed"], tokens=request["tokens"])
            case "worst_error":
                return self.worst_error(**request)
            case "faults":
                self.transport.next_faults = deque(request["names"])
                self.transport.all_corrupt = request.get("all_corrupt", False)
            case "notify":
                self.transport.to_send.append((request["peer"], bytes.fromhex(request["message"])))
            case "state":
                return {"said": self.said, "counters": self.plane.counters()}
            case "close":
                self.plane.close()
        return None

    def worst_error(self, block_ids: list[int], seed: int, start: int, end: int, tokens: int) -> float:
        """Largest deviation of the cache from what ``fill`` wrote on the other side."""
        wanted = canonical_noise(self.view.geometry, HeadRange(0, self.view.geometry.kv_heads), seed, tokens)
        found = self.view.read(block_ids, start, end)
        return float((found.float() - wanted[:, :, :, start:end].float()).abs().max())


def _command(name: str, fields: dict[str, Any]) -> kv_commands.Command:
    if name == "AddPeer":
        fields["endpoints"] = tuple(
            RankEndpoint(**one | {"agent_metadata": bytes.fromhex(one["agent_metadata"])})
            for one in fields["endpoints"]
        )
    if "transfer_id" in fields:
        fields["transfer_id"] = bytes.fromhex(fields["transfer_id"])
    if "block_ids" in fields:
        fields["block_ids"] = tuple(fields["block_ids"])
    command: kv_commands.Command = getattr(kv_commands, name)(**fields)
    return command


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # NIXL logs to stdout
    worker = Worker(json.loads(sys.argv[1]))
    torch.set_num_threads(1)
    print(json.dumps("ready"), file=replies, flush=True)
    unread = b""
    while True:
        readable, _, _ = select.select([0], [], [], 0.0005)
        if readable:
            received = os.read(0, 1 << 20)
            if not received:
                return
            *lines, unread = (unread + received).split(b"\n")
            for line in lines:
                print(json.dumps(worker.do(json.loads(line))), file=replies, flush=True)
        worker.step()


if __name__ == "__main__":
    main()
