"""The decode role's half of the side channel: one link to each prefill worker, offers, and the offload calls.

Everything but the port methods (``workers``, ``offer``, ``ready``, ``cancel``, ``drain``) runs in the I/O thread.
"""

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import aiohttp

from disagg_plugin.config import CodecChoice, DisaggSettings, PrefillWorkerSettings, is_loopback
from disagg_plugin.control.channel import ChannelState, SideChannelClient
from disagg_plugin.control.decode_side import OfferCall
from disagg_plugin.control.events import (
    DecodeEvent,
    PeerJoined,
    PeerLeft,
    PrefillAccepted,
    PrefillEnded,
    PrefillFailed,
    PrefillStarted,
)
from disagg_plugin.control.messages import (
    Accepted,
    AnyMessage,
    Cancel,
    Heartbeat,
    Hello,
    LoadReport,
    Offer,
    Ready,
    Refused,
    Rejected,
    Started,
    Welcome,
)
from disagg_plugin.control.offload_call import DIALECTS, post_prompt, prompt_digest
from disagg_plugin.errors import PeerLost, PeerRefused
from disagg_plugin.kv.commands import AddPeer
from disagg_policies.offload import WorkerState

logger = logging.getLogger(__name__)

MakeClient = Callable[..., SideChannelClient]


def wire_codec(choice: CodecChoice, worker_host: str, kv_dtype: str) -> str:
    """The codec for a link: ``auto`` is raw within one host, where a copy beats the encoder, and int8 between hosts.

    A quantized cache always travels as it is.
    """
    if kv_dtype not in ("float32", "bfloat16", "float16"):
        return "raw"
    if choice != "auto":
        return choice
    return "raw" if is_loopback(worker_host) else "int8"


def same_host(one: str, other: str) -> bool:
    """Whether two texts name one host; every name of this machine's loopback is the same."""
    return one.lower() == other.lower() or (is_loopback(one) and is_loopback(other))


@dataclass(slots=True)
class _Worker:
    """One configured prefill worker and the link to it."""

    name: str
    settings: PrefillWorkerSettings
    hello: Hello
    client: SideChannelClient | None = None
    welcome: Welcome | None = None
    problem: str = "connecting"
    heard_s: float = 0.0
    load: LoadReport | None = None
    answers: dict[bytes, asyncio.Future[Accepted | Refused]] = field(default_factory=dict)
    unstarted: set[bytes] = field(default_factory=set)  # accepted, not started: not in its load report yet

    def state(self) -> WorkerState:
        queued = self.load.queued_requests if self.load else 0
        return WorkerState(
            worker=self.name,
            healthy=self.welcome is not None and not self.problem,
            queued_requests=max(queued, len(self.unstarted)) + len(self.answers),
            max_prompt_tokens=self.welcome.max_prompt_tokens if self.welcome else 0,
        )


class PrefillWorkers:
    """Links to all prefill workers; implements :class:`disagg_plugin.control.decode_side.DecodePort`."""

    def __init__(
        self,
        settings: DisaggSettings,
        hello: Hello,
        *,
        make_client: MakeClient,
        post: Callable[..., None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._make_client = make_client
        self._post = post
        self._clock = clock
        self._hello = hello
        self._workers: dict[str, _Worker] = {}
        self._calls: dict[bytes, asyncio.Task[None]] = {}
        self._events: deque[DecodeEvent] = deque()
        self._states: tuple[WorkerState, ...] = ()
        self._session: aiohttp.ClientSession | None = None
        self.counters: Counter[str] = Counter()

    # -- scheduler's thread ------------------------------------------------------------------------------------

    def workers(self) -> Sequence[WorkerState]:
        return self._states

    def offer(self, call: OfferCall) -> None:
        self._post(self._start_call, call)

    def ready(self, transfer_id: bytes, peer: str, first_token: int, end_token: int) -> None:
        self._post(self._send, peer, Ready(transfer_id, first_token, end_token))

    def cancel(self, transfer_id: bytes, peer: str, reason: str) -> None:
        self._post(self._cancel, transfer_id, peer, reason)

    def worker_at(self, host: str, bootstrap_port: int) -> str | None:
        """The configured worker that a router's request names; None if none fits or it is not there."""
        for worker in list(self._workers.values()):
            if worker.welcome is None or worker.welcome.bootstrap_port != bootstrap_port:
                continue
            if same_host(host, urlsplit(worker.settings.url).hostname or ""):
                return worker.name
        return None

    def drain(self) -> Iterable[DecodeEvent]:
        while self._events:
            yield self._events.popleft()

    # -- I/O thread: life --------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Connect to every configured worker; none needs to be up."""
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._settings.transfer.offer_timeout_s),
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
        )
        for index, settings in enumerate(self._settings.prefill_workers):
            await self._add_worker(index, settings)
        self._publish()

    async def close(self) -> None:
        """Cancel every call and close every link."""
        for task in list(self._calls.values()):
            task.cancel()
        await asyncio.gather(*self._calls.values(), return_exceptions=True)
        for worker in self._workers.values():
            if worker.client is not None:
                await worker.client.close()
        if self._session is not None:
            await self._session.close()

    def sweep(self) -> None:
        """Heartbeats out, silent workers lost; called every heartbeat interval."""
        now = self._clock()
        for worker in self._workers.values():
            if worker.client is None:
                continue
            if worker.welcome is not None:
                if now - worker.heard_s > self._settings.side_channel.peer_timeout_s:
                    self._lose(worker, "peer_silent")
                else:
                    worker.client.send(Heartbeat(self._hello.epoch))
            elif worker.problem == "peer_silent":
                worker.client.send(worker.hello)
        self._publish()

    async def _add_worker(self, index: int, settings: PrefillWorkerSettings) -> None:
        host, port = settings.side_channel_address(self._settings.side_channel.port)
        name = f"{host}:{port}"
        region_slots = self._settings.transfer.region_slots
        first_slot = index * region_slots
        hello = Hello(
            protocol=self._hello.protocol,
            features=self._hello.features,
            engine=self._hello.engine,
            epoch=self._hello.epoch,
            model=self._hello.model,
            geometry=self._hello.geometry,
            endpoints=self._hello.endpoints,
            region_first_slot=first_slot,
            region_slots=region_slots,
        )
        worker = _Worker(name=name, settings=settings, hello=hello)
        self._workers[name] = worker
        if first_slot + region_slots > min(e.ring_slots for e in self._hello.endpoints):
            worker.problem = "ring_exhausted"
            logger.error("disagg: no ring slots left for prefill worker %s: raise transfer.ring_max_bytes", name)
            return
        worker.client = self._make_client(
            host=host,
            port=port,
            identity=f"{self._hello.engine}#{self._hello.epoch}".encode(),
            on_message=lambda message, worker=worker: self._on_message(worker, message),
            on_state=lambda state, reason, worker=worker: self._on_state(worker, state, reason),
        )
        await worker.client.start()

    def _on_state(self, worker: _Worker, state: ChannelState, reason: str) -> None:
        match state:
            case ChannelState.UP:
                worker.problem = "handshake"
                if worker.client is not None:
                    worker.client.send(worker.hello)
            case ChannelState.AUTHENTICATION_FAILED:
                self.counters["authentication_failed"] += 1
                self._lose(worker, "authentication_failed")
            case ChannelState.DOWN:
                self._lose(worker, "unreachable" if worker.welcome is None else "peer_lost")
            case ChannelState.CONNECTING:
                pass
        if reason:
            logger.debug("disagg: side channel to %s: %s (%s)", worker.name, state.name, reason)
        self._publish()

    def _lose(self, worker: _Worker, problem: str) -> None:
        had = worker.welcome is not None
        worker.welcome, worker.load, worker.problem = None, None, problem
        worker.unstarted.clear()
        for answer in worker.answers.values():
            if not answer.done():
                answer.set_exception(PeerLost(problem))
        if had:
            self.counters[problem] += 1
            logger.warning(
                "disagg: prefill worker %s is lost (%s); its prompts are prefilled elsewhere", worker.name, problem
            )
            self._events.append(PeerLeft(worker.name, problem))
        self._publish()

    # -- I/O thread: messages ----------------------------------------------------------------------------------

    def _on_message(self, worker: _Worker, message: AnyMessage) -> None:
        worker.heard_s = self._clock()
        match message:
            case Welcome():
                self._welcome(worker, message)
            case Rejected(reason, theirs, ours):
                self._rejected(worker, reason, ours=ours, theirs=theirs)
            case Accepted(transfer_id) | Refused(transfer_id):
                answer = worker.answers.get(transfer_id)
                if answer is not None and not answer.done():
                    answer.set_result(message)
            case Started(transfer_id):
                worker.unstarted.discard(transfer_id)
                self._events.append(PrefillStarted(transfer_id))
            case Cancel(transfer_id, reason):
                worker.unstarted.discard(transfer_id)
                self._events.append(PrefillFailed(transfer_id, reason))
            case LoadReport():
                worker.load = message
            case _:
                self.counters["unexpected_messages"] += 1
        self._publish()

    def _welcome(self, worker: _Worker, welcome: Welcome) -> None:
        if worker.welcome is not None and worker.welcome.epoch != welcome.epoch:
            self._events.append(PeerLeft(worker.name, "peer_restarted"))
        worker.welcome, worker.problem = welcome, ""
        logger.info("disagg: prefill worker %s is ready (epoch %d)", worker.name, welcome.epoch)
        self._events.append(
            PeerJoined(
                AddPeer(
                    peer=worker.name,
                    epoch=welcome.epoch,
                    endpoints=welcome.endpoints,
                    region_first_slot=worker.hello.region_first_slot,
                    region_slots=worker.hello.region_slots,
                    receives=True,
                )
            )
        )

    def _rejected(self, worker: _Worker, reason: str, *, ours: str, theirs: str) -> None:
        if reason == "unknown_peer":  # it restarted, or had given us up: introduce ourselves again
            self._lose(worker, "peer_restarted")
            if worker.client is not None:
                worker.client.send(worker.hello)
            return
        if worker.problem != reason:
            logger.warning(
                "disagg: prefill worker %s refused this decode engine: %s differs, ours %s, theirs %s; "
                "prompts are prefilled locally",
                worker.name,
                reason,
                ours,
                theirs,
            )
        self.counters[f"rejected_{reason}"] += 1
        self._lose(worker, reason)

    # -- I/O thread: one offload -------------------------------------------------------------------------------

    def _start_call(self, call: OfferCall) -> None:
        task = asyncio.get_running_loop().create_task(self._offload(call))
        self._calls[call.transfer_id] = task
        task.add_done_callback(lambda _: self._calls.pop(call.transfer_id, None))

    async def _offload(self, call: OfferCall) -> None:
        reason = "no_healthy_worker"
        try:
            for name in call.workers:
                worker = self._workers[name]
                if worker.welcome is None:
                    continue
                accepted, reason = await self._ask(worker, call)
                if accepted is not None:
                    await self._prefill(worker, call, accepted)
                    return
        except (aiohttp.ClientError, OSError) as error:
            reason = "http_unreachable" if isinstance(error, aiohttp.ClientConnectorError) else "http_connection_lost"
        except PeerRefused as error:
            reason = str(error)
        except Exception:  # the boundary of one request: whatever it was, the request must not hang
            logger.exception("disagg: the offload call failed unexpectedly")
            reason = "internal_error"
        self.counters[f"failed_{reason}"] += 1
        self._events.append(PrefillFailed(call.transfer_id, reason))

    async def _ask(self, worker: _Worker, call: OfferCall) -> tuple[Accepted | None, str]:
        """Offer the prompt; (Accepted, "") or (None, why not)."""
        assert worker.client is not None
        answer: asyncio.Future[Accepted | Refused] = asyncio.get_running_loop().create_future()
        worker.answers[call.transfer_id] = answer
        host, _ = worker.settings.side_channel_address(self._settings.side_channel.port)
        codec = wire_codec(self._settings.transfer.codec, host, self._hello.geometry.dtype)
        try:
            worker.client.send(
                Offer(
                    transfer_id=call.transfer_id,
                    nonce=call.nonce,
                    prompt_tokens=len(call.token_ids),
                    cached_tokens=call.cached_tokens,
                    deadline_s=self._settings.transfer.deadline_s,
                    codec=codec,
                    prompt_digest=0 if call.post else prompt_digest(call.token_ids),
                )
            )
            message = await asyncio.wait_for(answer, self._settings.transfer.offer_timeout_s)
        except TimeoutError:
            worker.client.send(Cancel(call.transfer_id, "offer_timeout"))
            return None, "offer_timeout"
        except PeerLost as error:
            return None, str(error)
        except asyncio.CancelledError:
            worker.client.send(Cancel(call.transfer_id, "cancelled"))
            raise
        finally:
            worker.answers.pop(call.transfer_id, None)
        if isinstance(message, Refused):
            return None, f"refused_{message.reason}"
        return message, ""

    async def _prefill(self, worker: _Worker, call: OfferCall, accepted: Accepted) -> None:
        assert self._session is not None
        assert worker.welcome is not None
        worker.unstarted.add(call.transfer_id)
        self._events.append(PrefillAccepted(call.transfer_id, worker.name, accepted.eta_s))
        if not call.post:  # whoever routed the request posts it
            worker.unstarted.discard(call.transfer_id)
            return
        dialect = DIALECTS[worker.welcome.kind]
        body = dialect.body(
            model=worker.welcome.model.served_name,
            token_ids=call.token_ids,
            transfer_id=call.transfer_id,
            fields=call.http_fields,
        )
        try:
            await post_prompt(self._session, worker.settings, dialect, body)
        except asyncio.CancelledError as cancelled:
            self._send(worker.name, Cancel(call.transfer_id, str(cancelled)))
            raise
        finally:
            worker.unstarted.discard(call.transfer_id)
        self._events.append(PrefillEnded(call.transfer_id))

    def _cancel(self, transfer_id: bytes, peer: str, reason: str) -> None:
        if (task := self._calls.get(transfer_id)) is not None:
            task.cancel(reason)  # closes the HTTP connection, which aborts the request there
        elif peer:
            self._send(peer, Cancel(transfer_id, reason))

    def _send(self, name: str, message: AnyMessage) -> None:
        worker = self._workers.get(name)
        if worker is not None and worker.client is not None:
            worker.client.send(message)

    def _publish(self) -> None:
        self._states = tuple(worker.state() for worker in self._workers.values())

    def snapshot(self) -> dict[str, object]:
        """The debug view."""
        return {
            "counters": dict(self.counters),
            "calls": len(self._calls),
            "workers": {
                w.name: {
                    "url": w.settings.url,
                    "healthy": w.welcome is not None,
                    "problem": w.problem,
                    "epoch": w.welcome.epoch if w.welcome else 0,
                    "queued_requests": w.load.queued_requests if w.load else 0,
                }
                for w in list(self._workers.values())
            },
        }
