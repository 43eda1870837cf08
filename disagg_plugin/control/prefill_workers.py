"""The decode role's half of the side channel: all prefill workers, as the scheduler sees and uses them.

    worker_directory   which workers there are
    ring_regions       where each may write
    worker_link        one worker: handshake, health, load reports, back-off
    offloads           one prompt: offers and the HTTP call

What the scheduler's thread calls returns at once: it reads what the I/O thread has published last, or posts a call to
it. Rows of workers are made when something arrives, not when they are read; only offers that the I/O thread has not
seen yet are added while reading, so that several decisions of one engine step know of each other.
"""

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

import msgspec

from disagg_plugin.allowed_hosts import AllowedHosts
from disagg_plugin.config import DisaggSettings, is_loopback
from disagg_plugin.control.decode_port import OfferCall
from disagg_plugin.control.events import DecodeEvent
from disagg_plugin.control.messages import Hello, Ready
from disagg_plugin.control.offloads import Offloads
from disagg_plugin.control.own_pauses import OwnPauses
from disagg_plugin.control.ring_regions import RingRegions
from disagg_plugin.control.router_flow import HandedOver
from disagg_plugin.control.worker_directory import (
    LOOK_AGAIN_S,
    Resolve,
    WorkerAddress,
    WorkerDirectory,
    resolve_all,
)
from disagg_plugin.control.worker_health import Health
from disagg_plugin.control.worker_link import MakeClient, Surroundings, WorkerLink
from disagg_plugin.serving.latency import LatencyModel
from disagg_plugin.serving.prefix_hash import CHUNK_TOKENS
from disagg_plugin.serving.prefix_index import PrefixIndex
from disagg_policies.snapshots import CodecChoices, PrefillModel, WorkerState

ROUTERS_WORKERS_MAX = 64  # that only requests name
FORGET_AFTER_S = 30.0  # one of those, if it is not there
LEAVE_AFTER_S = 60.0  # a worker that its name does not list any more may end what it has begun

logger = logging.getLogger(__name__)


def same_host(one: str, other: str) -> bool:
    """Whether two texts name one host; every name of this machine's loopback is the same."""
    return one.lower() == other.lower() or (is_loopback(one) and is_loopback(other))


@dataclass(frozen=True, slots=True, eq=False)
class _View:
    """What the I/O thread has published: a row a worker, and the number of the last offer that they include."""

    rows: tuple[WorkerState, ...] = ()
    names: tuple[str, ...] = ()
    offers: int = 0


@dataclass(frozen=True, slots=True)
class _Posted:
    """An offer on its way to the I/O thread."""

    number: int
    worker: str
    tokens: int


class PrefillWorkers:
    """All prefill workers; implements :class:`disagg_plugin.control.decode_port.DecodePort`."""

    def __init__(
        self,
        settings: DisaggSettings,
        hello: Hello,
        *,
        make_client: MakeClient,
        post: Callable[..., None],
        clock: Callable[[], float] = time.monotonic,
        resolve: Resolve = resolve_all,
    ) -> None:
        self._settings = settings
        self._make_client = make_client
        self._post = post
        self._clock = clock
        self._hello = hello
        self._directory = WorkerDirectory(
            settings.prefill_workers, default_port=settings.side_channel.port, resolve=resolve
        )
        self._regions = RingRegions(
            ring_slots=min([e.ring_slots for e in hello.endpoints], default=0), slots_each=hello.region_slots
        )
        self._allowed = AllowedHosts(settings.router.allowed_hosts, default_port=settings.side_channel.port)
        self._said_exhausted = False
        self._pauses = OwnPauses(settings.side_channel.heartbeat_s)
        self._links: dict[str, WorkerLink] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._events: deque[DecodeEvent] = deque()
        self._assumed: PrefillModel | None = None
        self._codec_policy: Callable[[str, CodecChoices], str] | None = None
        self._index = PrefixIndex()
        self._latency = LatencyModel(clock)
        self.counters: Counter[str] = Counter()
        self._offloads = Offloads(settings.transfer, self._links, emit=self._events.append, counters=self.counters)
        self._around = Surroundings(
            clock=clock,
            latency=self._latency,
            index=self._index,
            counters=self.counters,
            emit=self._events.append,
            changed=lambda _: self._publish(),
            codec=settings.transfer.codec,
            silent_after_s=settings.side_channel.peer_timeout_s,
            suspect_after_s=settings.split_policy.suspect_after_s,
            assumed=lambda: self._assumed,
            choose_codec=lambda name, choices: self._codec_policy(name, choices) if self._codec_policy else None,
        )
        # handed over by the I/O thread
        self._view = _View()
        self._seen_offers = 0
        # the scheduler's thread only
        self._posted: deque[_Posted] = deque()
        self._offers = 0
        self._handed = self._handed_from = self._view
        self._handed_offers = 0

    # -- scheduler's thread ------------------------------------------------------------------------------------

    def workers(self) -> tuple[WorkerState, ...]:
        """A row for each worker that is known, healthy or not."""
        view, posted = self._view, self._posted
        while posted and posted[0].number <= view.offers:
            posted.popleft()
        if view is not self._handed_from or self._offers != self._handed_offers:
            self._handed = _with_posted(view, posted) if posted else view
            self._handed_from, self._handed_offers = view, self._offers
        return self._handed.rows

    def overlap_tokens(self, hashes: Sequence[int]) -> tuple[int, ...]:
        """Leading tokens of a prompt that each worker holds, in the order of the last ``workers()``.

        Args:
            hashes: From ``serving.prefix_hash.prefix_hashes`` with its standard chunk.
        """
        return self._index.overlap_tokens(hashes, self._handed.names, chunk_tokens=CHUNK_TOKENS)

    def worker_at(self, host: str, bootstrap_port: int) -> str | None:
        """The worker that a router's request names; None if none of ours fits or it is not there."""
        for link in list(self._links.values()):
            welcome = link.welcome
            if welcome is None or welcome.bootstrap_port != bootstrap_port:
                continue
            if same_host(host, link.address.host) or same_host(host, urlsplit(link.address.url).hostname or ""):
                return link.name
        return None

    def holder(self, handed: HandedOver) -> str | None:
        """The worker that holds a prompt's KV, of ours or allowed; None: such a host must not be connected to.

        One that is only allowed is connected to now; the offer waits for that.
        """
        links = list(self._links.values())
        for link in links:
            if handed.port == link.address.port and same_host(handed.host, link.address.host):
                return link.name
        for link in links:
            if link.welcome is not None and handed.engine and link.welcome.engine == handed.engine:
                return link.name
        if not self._allowed.allows(handed.host, handed.port):
            return None
        name = f"{handed.host}:{handed.port}"
        self._post(self._meet, WorkerAddress(name, handed.host, handed.port, url=""))
        return name

    def offer(self, call: OfferCall) -> None:
        self._offers += 1
        self._posted.append(_Posted(self._offers, call.workers[0], len(call.token_ids)))
        self._post(self._start_call, call, self._offers)

    def ready(self, transfer_id: bytes, peer: str, first_token: int, end_token: int) -> None:
        self._post(self._ready, peer, Ready(transfer_id, first_token, end_token))

    def cancel(self, transfer_id: bytes, peer: str, reason: str) -> None:
        self._post(self._offloads.cancel, transfer_id, peer, reason)

    def drain(self) -> Iterable[DecodeEvent]:
        while self._events:
            yield self._events.popleft()

    def landed(self, peer: str, *, wire_bytes: int, tokens: int) -> None:
        """KV of an offload to ``peer`` has landed whole: that also ends a back-off."""
        self._post(self._landed, peer, wire_bytes, tokens)

    def saw_overhead(self, peer: str, *, seconds: float) -> None:
        """An offload to ``peer`` landed, and took so much longer than its queue, prefill and transfer."""
        self._post(self._saw_overhead, peer, seconds)

    def failed(self, peer: str, reason: str) -> None:
        """An offload failed after ``peer`` had accepted it, and not because the connection was lost."""
        self._post(self._failed, peer, reason)

    def assume(self, prefill: PrefillModel) -> None:
        """Take ``prefill`` for workers that have measured nothing yet: ours, as the same model on the same kind of
        machine; a guess that is too slow would keep every prompt away from them, and so from being measured."""
        self._assumed = prefill

    def ask_for_codecs(self, policy: Callable[[str, CodecChoices], str]) -> None:
        """From now on ``policy(worker, choices)`` says how KV from a worker travels; called in the I/O thread."""
        self._codec_policy = policy

    # -- I/O thread: life --------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Connect to every configured worker; none needs to be up."""
        await self._offloads.open()
        await self._apply(self._directory.known())
        if self._directory.changes:
            self._spawn(self._look_again())

    async def close(self) -> None:
        """Cancel every call and close every link."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._offloads.close()
        for link in self._links.values():
            await link.close()

    def sweep(self) -> None:
        """Heartbeats out, silent workers lost, rows as of now; called every heartbeat interval."""
        now_s = self._clock()
        away_s = self._pauses.since_last_look_s(now_s)
        for link in list(self._links.values()):
            link.heartbeat(away_s)
            left = link.left_s is not None and (link.welcome is None or now_s - link.left_s > LEAVE_AFTER_S)
            forgotten = not link.address.url and link.welcome is None and link.forgotten_s > FORGET_AFTER_S
            if left or forgotten:
                self._remove(link)
        self._offloads.renew()
        self._publish()

    async def _look_again(self) -> None:
        while True:
            await self._directory.look()
            await self._apply(self._directory.known())
            await asyncio.sleep(LOOK_AGAIN_S)

    async def _apply(self, known: dict[str, WorkerAddress]) -> None:
        """Make the links those of ``known``, without touching the ones that stay."""
        for name, link in list(self._links.items()):
            if name in known or not link.address.url:
                link.left_s = None
            elif link.left_s is None:
                logger.info("disagg: prefill worker %s is not listed any more", name)
                link.left_s = self._clock()
        for link in list(self._links.values()):
            if link.left_s is not None and link.welcome is None:
                self._remove(link)
        for name, address in known.items():
            old = self._links.get(name)
            if old is not None and not old.address.url:
                old.address = address  # until now only a router knew it
            await self._add(address)
        for link in self._links.values():
            link.refresh()
        self._publish()

    async def _add(self, address: WorkerAddress) -> None:
        if (old := self._links.get(address.name)) is not None and old.health is not Health.RING_EXHAUSTED:
            return
        first_slot = self._regions.take(address.name)
        hello = msgspec.structs.replace(self._hello, region_first_slot=first_slot or 0)
        link = self._links[address.name] = WorkerLink(address, hello, self._around)
        if first_slot is not None:
            await link.connect(self._make_client)
            return
        link.health, link.reason = Health.RING_EXHAUSTED, f"all {self._regions.total} regions are taken"
        if not self._said_exhausted:
            self._said_exhausted = True
            logger.error(
                "disagg: no ring slots left for prefill worker %s: raise transfer.ring_max_bytes, "
                "or lower transfer.region_slots; said once",
                address.name,
            )

    def _remove(self, link: WorkerLink) -> None:
        link.lose(Health.LEAVING, "left")
        del self._links[link.name]
        self._regions.give(link.name)
        self._latency.forget(link.name)
        self._spawn(link.close())

    def _spawn(self, coroutine: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- I/O thread: calls of the scheduler --------------------------------------------------------------------

    def _start_call(self, call: OfferCall, number: int) -> None:
        self._seen_offers = number
        self._offloads.start(call)
        self._publish()

    def _ready(self, name: str, ready: Ready) -> None:
        self._offloads.ready(ready.transfer_id)
        if (link := self._links.get(name)) is not None:
            link.send(ready)

    def _meet(self, address: WorkerAddress) -> None:
        """Connect to a worker that only a router knows."""
        if address.name in self._links:
            return
        if sum(not link.address.url for link in self._links.values()) >= ROUTERS_WORKERS_MAX:
            self.counters["too_many_routed_workers"] += 1
            return
        self._spawn(self._add(address))

    def _landed(self, name: str, wire_bytes: int, tokens: int) -> None:
        if (link := self._links.get(name)) is not None:
            link.landed(wire_bytes=wire_bytes, tokens=tokens)
            link.succeeded()
            self._refresh(link)

    def _saw_overhead(self, name: str, seconds: float) -> None:
        if (link := self._links.get(name)) is not None:
            if link.wired:
                self._latency.saw_overhead(name, seconds=seconds)
            link.wired = True
            self._refresh(link)

    def _failed(self, name: str, reason: str) -> None:
        if (link := self._links.get(name)) is not None:
            link.failed(reason)

    def _refresh(self, link: WorkerLink) -> None:
        link.refresh()
        self._publish()

    def _publish(self) -> None:
        links = self._links
        names = tuple(links)
        if names == self._view.names:
            names = self._view.names
        self._view = _View(tuple([link.row for link in links.values()]), names, self._seen_offers)

    def figures(self) -> dict[str, object]:
        """The part of it that metrics are made from, several times a second."""
        links = list(self._links.values())
        return {
            "counters": dict(self.counters),
            "workers": {link.name: link.figures() for link in links},
            "model_errors": self._latency.errors(),
        }

    def snapshot(self) -> dict[str, object]:
        """The debug view."""
        return {
            "counters": dict(self.counters),
            "calls": len(self._offloads),
            "workers": {link.name: link.describe() for link in list(self._links.values())},
            "latency": self._latency.snapshot(),
            "directory": self._directory.snapshot(),
        }


def _with_posted(view: _View, posted: Iterable[_Posted]) -> _View:
    """The view with offers that the I/O thread has not seen."""
    requests: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    for offer in posted:
        requests[offer.worker] += 1
        tokens[offer.worker] += offer.tokens
    rows = tuple(
        [
            replace(
                row,
                in_flight_requests=row.in_flight_requests + requests[row.worker],
                in_flight_tokens=row.in_flight_tokens + tokens[row.worker],
            )
            if row.worker in requests
            else row
            for row in view.rows
        ]
    )
    return _View(rows, view.names, view.offers)
