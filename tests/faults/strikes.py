"""How each fault of the matrix is made. ``arm`` runs before the request, ``strike`` at the moment, ``mend`` at the end.

A strike may run until the request is over (a pause that must outlast deadlines); what holds the moment is opened
by ``strike`` itself where it does not kill who holds it.
"""

import asyncio
import random
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from faults.harness import EngineProcess, Fleet, eventually
from faults.matrix import Moment

from disagg_plugin.control.channel import ChannelState, SideChannelClient
from disagg_plugin.control.keys import KeyRing
from disagg_plugin.control.messages import Cancel, Heartbeat, Offer, Ready, Snapshot, SnapshotRequest
from disagg_plugin.kv.wire import Kind, Notification

TOKENS = 300
HALF = 160


@dataclass
class Scene:
    """One cell while it runs."""

    fleet: Fleet
    moment: Moment
    request_id: str = ""
    victim: str = "p1"

    @property
    def p(self) -> EngineProcess:
        return self.fleet.engines[self.victim]

    @property
    def d(self) -> EngineProcess:
        return self.fleet.d

    def open_gates(self) -> None:
        """Let everybody go on."""
        for name, engine in self.fleet.engines.items():
            engine.gates(**({"decode": False, "steps": False} if name == "d" else {"queue": False, "tokens": 0}))

    def wait_until_served(self) -> None:
        self.fleet.wait_until(self.request_id, "finished", "running")


Action = Callable[[Scene], None]


def nothing(_scene: Scene) -> None:
    pass


@dataclass(frozen=True)
class Strike:
    """The parts of one fault."""

    strike: Action
    arm: Action = nothing
    mend: Action = nothing
    fleet: str = "one"  # or "two", "tight": how many prefill engines, how large D's ring
    held_at_queue: bool = True  # False: the request is not stopped in P's queue, it would never get there


def _kill_p(scene: Scene) -> None:
    scene.p.kill()
    del scene.fleet.engines[scene.victim]
    scene.open_gates()


def _start_p(scene: Scene) -> None:
    scene.fleet.start(scene.victim)


def _stop_p(scene: Scene) -> None:
    scene.p.signal(signal.SIGSTOP)
    stopped = scene.fleet.engines.pop(scene.victim)
    scene.open_gates()
    scene.wait_until_served()
    stopped.signal(signal.SIGCONT)
    scene.fleet.engines[scene.victim] = stopped
    scene.open_gates()


def _restart_p(scene: Scene) -> None:
    scene.fleet.restart(scene.victim)
    scene.open_gates()


def _slow_p(scene: Scene) -> None:
    scene.wait_until_served()  # P's gate is still closed
    scene.open_gates()


def _preempt_p(scene: Scene) -> None:
    scene.p.ask("preempt")
    scene.open_gates()


def _drain_p(scene: Scene) -> None:
    scene.p.ask("leave")
    eventually(lambda: scene.fleet.worker(scene.victim)["state"] == "draining", "D knows that P is to leave")
    if len(scene.fleet.names) == 1:
        before = scene.fleet.figures()["d.offered"]
        scene.fleet.wait_until(scene.fleet.send(TOKENS), "finished", "running")
        assert scene.fleet.figures()["d.offered"] == before, "a worker that is to leave was offered a prompt"
    scene.open_gates()


def _no_room_on_d(scene: Scene) -> None:
    scene.d.gates(no_room=True)


def _p_holds(scene: Scene) -> None:
    scene.p.gates(queue=False)
    scene.fleet.wait_until_counted("p.drop_hold_expired", scene.victim)
    scene.d.gates(no_room=False)


def _abort(scene: Scene) -> None:
    scene.d.ask("abort", request_id=scene.request_id)
    scene.open_gates()


def _abort_at_allocation(scene: Scene) -> None:
    scene.d.gates(abort_at_allocation=scene.request_id)
    scene.open_gates()


def _preempt_d(scene: Scene) -> None:
    assert scene.d.ask("preempt", request_id=scene.request_id)
    scene.open_gates()


def _kill_d(scene: Scene) -> None:
    scene.d.kill()
    del scene.fleet.engines["d"]
    scene.open_gates()
    eventually(lambda: not scene.fleet.leaks(), lambda: str(scene.fleet.leaks()))
    scene.fleet.start("d")


def _cut(link: str) -> Action:
    def cut(scene: Scene) -> None:
        front = scene.fleet.fronts[scene.victim]
        if link == "kv":
            scene.fleet.fronts["d"].kv.cut()
        getattr(front, link).cut()
        scene.open_gates()

    return cut


def _stall_kv(scene: Scene) -> None:
    links = scene.fleet.fronts[scene.victim].kv, scene.fleet.fronts["d"].kv
    for link in links:
        link.stall()
    scene.open_gates()
    scene.wait_until_served()
    for link in links:
        link.heal()


def _throttle_kv(scene: Scene) -> None:
    for name in (scene.victim, "d"):
        scene.fleet.fronts[name].kv.throttle(200_000.0)
    scene.open_gates()


def _chunk(*names: str, all_corrupt: bool = False) -> Action:
    def arm(scene: Scene) -> None:
        scene.p.ask("faults", names=names, all_corrupt=all_corrupt)
        scene.open_gates()

    return arm


def _stop_faults(scene: Scene) -> None:
    for name, engine in scene.fleet.engines.items():
        if name != "d":
            engine.ask("faults")


def _late(scene: Scene) -> None:
    _chunk("late")(scene)
    scene.wait_until_served()
    scene.p.ask("late_writes")
    wire_up(scene)
    scene.fleet.wait_until_counted("d.late")


def _foreign(scene: Scene) -> None:
    name = agent_of(scene.d)
    unknown = Notification(Kind.CHUNK, slot=1, sequence=0, attempt=0, nonce=0xBAD, nbytes=4096)
    scene.p.ask("say", peer=name, message=unknown.pack().hex())
    if scene.moment != "streaming":
        wire_up(scene)
    scene.fleet.wait_until_counted("d.foreign")
    scene.open_gates()


def _replay(scene: Scene) -> None:
    if scene.moment == "streaming":
        _chunk("replay")(scene)
        return
    scene.p.ask("replay")
    wire_up(scene)
    scene.fleet.wait_until_counted("d.late")
    scene.open_gates()


def _fill_ring(scene: Scene) -> None:
    scene.d.gates(steps=True)
    scene.p.gates(tokens=0)
    scene.fleet.wait_until_counted("p.credit_waits", scene.victim)
    scene.fleet.wait_until_counted("d.buffer_waits")
    scene.open_gates()


def _load_p(scene: Scene) -> None:
    scene.p.gates(load=20)
    scene.p.state()  # a step later: it has been published


def _no_region(scene: Scene) -> None:
    assert scene.fleet.worker("p2")["state"] == "ring_exhausted"
    scene.open_gates()


def agent_of(engine: EngineProcess) -> str:
    """The name under which its peers' transports know it."""
    return f"{engine.name}-0-{engine.epoch}"


def wire_up(scene: Scene) -> None:
    """A data-plane thread without an open transfer sleeps: give it something to do."""
    request_id = scene.fleet.send(TOKENS)
    scene.p.gates(queue=False)
    scene.fleet.wait_until(request_id, "finished", "running")


def _wrong(**spec: object) -> Action:
    def strike(scene: Scene) -> None:
        fleet = scene.fleet
        keys = fleet.keys[scene.victim]
        if "keys" in spec:
            fleet.keys[scene.victim] = str(Path(keys).parent / str(spec["keys"]))
        fleet.restart(scene.victim, **{name: value for name, value in spec.items() if name != "keys"})
        fleet.keys[scene.victim] = keys
        scene.open_gates()
        scene.wait_until_served()
        eventually(lambda: fleet.worker(scene.victim)["state"] == "refused", lambda: str(fleet.worker(scene.victim)))
        before = fleet.figures()["d.offered"]
        fleet.wait_until(fleet.send(TOKENS), "finished")
        assert fleet.figures()["d.offered"] == before, "a worker that does not fit was offered a prompt"

    return strike


def _right_p(scene: Scene) -> None:
    scene.fleet.restart(scene.victim)


def _garbage(scene: Scene) -> None:
    noise = random.Random(1)
    for name in (scene.victim, "d"):
        port = scene.fleet.engines[name].ports["side"]
        for message in (b"GET / HTTP/1.1\r\n\r\n", noise.randbytes(4096), b"\xff" + bytes(8) + b"\x01\x7f"):
            with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
                connection.sendall(message)
        asyncio.run(_say(scene.fleet, name, [noise.randbytes(size) for size in (0, 1, 100, 10_000)]))
    scene.p.ask("say", peer=agent_of(scene.d), message=noise.randbytes(40).hex())
    if scene.moment != "streaming":
        wire_up(scene)
    scene.fleet.wait_until_counted("d.unparsable")
    scene.fleet.wait_until_counted("p.handshake_failed", scene.victim)
    scene.open_gates()


def _flood(scene: Scene) -> None:
    port = scene.p.ports["side"]
    half_open = [socket.create_connection(("127.0.0.1", port), timeout=5) for _ in range(200)]
    ids = [bytes([n]) * 16 for n in range(200)]
    messages = [Offer(one, 1, 1_000, 0, 1.0, "raw") for one in ids]
    asyncio.run(
        _say(scene.fleet, scene.victim, [*messages, *[Ready(one, 0, 10) for one in ids], *[Cancel(ids[0], "x")] * 200])
    )
    asyncio.run(_say(scene.fleet, scene.victim, [Heartbeat(7)] * 300))
    scene.fleet.wait_until_counted("p.refused_unknown_peer", scene.victim, at_least=100)
    scene.open_gates()
    scene.wait_until_served()
    for connection in half_open:
        connection.close()


async def _say(fleet: Fleet, name: str, messages: list) -> None:  # type: ignore[type-arg]
    """As a client with the right keys: messages, or bytes that are none."""
    up, heard, state = asyncio.Event(), asyncio.Event(), []

    def on_state(new: ChannelState, _reason: str) -> None:
        state.append(new)
        if new is ChannelState.UP:
            up.set()

    client = SideChannelClient(
        host="127.0.0.1",
        port=fleet.engines[name].ports["side"],
        keys=KeyRing.load(Path(fleet.keys[name])),
        identity=b"a stranger",
        on_message=lambda message: heard.set() if isinstance(message, Snapshot) else None,
        on_state=on_state,
    )
    await client.start()
    try:
        await asyncio.wait_for(up.wait(), 10)
        for message in messages:
            if isinstance(message, bytes):
                assert client._live is not None
                client._live.socket.send_multipart([message])
            else:
                client.send(message)
        for _ in range(100):  # answered after all that came before it; a flooded socket drops it
            client.send(SnapshotRequest())
            with suppress(TimeoutError):
                await asyncio.wait_for(heard.wait(), 0.1)
                return
        raise AssertionError(f"{name} does not answer")
    finally:
        await client.close()


STRIKES: dict[str, Strike] = {
    "p_killed": Strike(_kill_p, mend=_start_p),
    "p_killed_of_two": Strike(_kill_p, mend=_start_p, fleet="two"),
    "p_stopped": Strike(_stop_p),
    "p_restarted": Strike(_restart_p),
    "p_refuses": Strike(nothing, _load_p, lambda s: s.p.gates(load=0), held_at_queue=False),
    "p_answers_429": Strike(
        nothing, lambda s: s.p.gates(http_status=429), lambda s: s.p.gates(http_status=0), held_at_queue=False
    ),
    "p_answers_503_of_two": Strike(
        nothing,
        lambda s: s.p.gates(http_status=503),
        lambda s: s.p.gates(http_status=0),
        fleet="two",
        held_at_queue=False,
    ),
    "p_slow": Strike(_slow_p),
    "p_preempts": Strike(_preempt_p),
    "p_drains": Strike(_drain_p, mend=lambda s: s.p.ask("stay")),
    "p_drains_of_two": Strike(_drain_p, mend=lambda s: s.p.ask("stay"), fleet="two"),
    "p_holds": Strike(_p_holds, arm=_no_room_on_d),
    "d_aborts": Strike(_abort),
    "d_aborts_at_allocation": Strike(_abort_at_allocation, mend=lambda s: s.d.gates(abort_at_allocation="")),
    "d_preempts": Strike(_preempt_d),
    "d_killed": Strike(_kill_d),
    "http_cut": Strike(_cut("http")),
    "side_cut": Strike(_cut("side")),
    "kv_cut": Strike(_cut("kv")),
    "kv_stalled": Strike(_stall_kv),
    "kv_throttled": Strike(_throttle_kv),
    "chunk_corrupt": Strike(_chunk("corrupt"), mend=_stop_faults),
    "chunk_corrupt_twice": Strike(_chunk(all_corrupt=True), mend=_stop_faults),
    "chunk_corrupt_twice_of_two": Strike(_chunk(all_corrupt=True), mend=_stop_faults, fleet="two"),
    "chunk_truncated": Strike(_chunk("truncate"), mend=_stop_faults),
    "chunk_late": Strike(_late, mend=_stop_faults),
    "chunk_foreign": Strike(_foreign),
    "chunk_replayed": Strike(_replay, mend=_stop_faults),
    "ring_full": Strike(_fill_ring),
    "no_region": Strike(_no_region, fleet="tight"),
    "p_with_a_wrong_key": Strike(_wrong(keys="other"), mend=_right_p),
    "p_with_other_weights": Strike(_wrong(weights="others"), mend=_right_p),
    "p_with_an_old_protocol": Strike(_wrong(protocol=0), mend=_right_p),
    "garbage": Strike(_garbage),
    "flood": Strike(_flood),
}
