"""The link to one prefill worker: handshake, health, what it reports, and what it was offered since; I/O thread."""

import asyncio
import logging
import math
import secrets
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import msgspec

from disagg_plugin.config import CodecChoice, is_loopback
from disagg_plugin.control.backoff import Backoff
from disagg_plugin.control.channel import ChannelState, SideChannelClient
from disagg_plugin.control.compatibility import find_lane_mismatch, find_mismatch, party_of
from disagg_plugin.control.digest_stream import DigestFollower
from disagg_plugin.control.events import DecodeEvent, PeerJoined, PeerLeft, PrefillFailed, PrefillStarted
from disagg_plugin.control.messages import (
    PRIORITY,
    Accepted,
    AnyMessage,
    Cancel,
    DigestPart,
    DigestRequest,
    Heartbeat,
    Hello,
    LoadReport,
    Refused,
    Rejected,
    Sent,
    Started,
    Welcome,
)
from disagg_plugin.control.own_pauses import excused
from disagg_plugin.control.received_load import ReceivedLoad, sane_eta_s
from disagg_plugin.control.uncounted_offers import UncountedOffers
from disagg_plugin.control.wire_cost import codec_choices, wire_bytes_per_token, wire_codec
from disagg_plugin.control.worker_directory import WorkerAddress
from disagg_plugin.control.worker_health import Health, standing
from disagg_plugin.errors import PeerLost
from disagg_plugin.kv.commands import AddPeer
from disagg_plugin.serving.latency import OVERHEAD_PRIOR_S, LatencyModel
from disagg_plugin.serving.prefix_index import PrefixIndex
from disagg_policies.snapshots import CodecChoices, PrefillModel, WorkerState

REPORTS_EVERY_S = 0.5  # at least, by P's promise
DIGEST_ASK_AGAIN_S = 1.0
FADES_BY_HALF_S = 10.0
NEWEST_SHARE = 0.2  # of the newest transfer in what a token takes on the wire

logger = logging.getLogger(__name__)

MakeClient = Callable[..., SideChannelClient]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all links of one decode engine share.

    Attributes:
        emit: Hands an event to the scheduler's thread.
        changed: This link's row is another one now.
        silent_after_s: A worker that says nothing for longer is lost.
        suspect_after_s: A worker whose report is older is not asked.
    """

    clock: Callable[[], float]
    latency: LatencyModel
    index: PrefixIndex
    counters: Counter[str]
    emit: Callable[[DecodeEvent], None]
    changed: Callable[["WorkerLink"], None]
    codec: CodecChoice = "auto"
    silent_after_s: float = 3.0
    suspect_after_s: float = 1.0
    assumed: Callable[[], PrefillModel | None] = lambda: None
    choose_codec: Callable[[str, CodecChoices], str | None] = lambda _name, _choices: None


@dataclass(slots=True)
class WorkerLink:
    """One prefill worker; everything runs in the I/O thread."""

    address: WorkerAddress
    hello: Hello
    around: Surroundings
    row: WorkerState = field(init=False)
    client: SideChannelClient | None = None
    welcome: Welcome | None = None
    health: Health = Health.CONNECTING
    reason: str = ""
    left_s: float | None = None  # since when its name does not list it
    welcomed: asyncio.Event = field(default_factory=asyncio.Event)
    answers: dict[bytes, asyncio.Future[Accepted | Refused]] = field(default_factory=dict)
    codec: str = field(init=False)
    backoff: Backoff = Backoff()  # noqa: RUF009 - frozen
    probe: bytes = b""  # transfer id
    made_s: float = field(init=False)
    wired: bool = False  # the data plane's agents have met: the first transfer takes much longer than any other
    _epoch: int = 0  # of the process that was welcome last
    _heard_s: float = 0.0
    _load: ReceivedLoad = ReceivedLoad()  # noqa: RUF009 - frozen
    _reported_s: float | None = None
    _offers: UncountedOffers = field(default_factory=UncountedOffers)
    _digest: DigestFollower = field(default_factory=DigestFollower)
    _digest_asked_s: float = float("-inf")
    _bytes_per_token: float | None = None  # measured
    _landed_s: float = 0.0  # when an offload did so last

    def __post_init__(self) -> None:
        self.made_s = self.around.clock()
        self.codec = wire_codec(self.around.codec, self.address.host, self.hello.geometry.dtype)
        self.refresh()

    @property
    def name(self) -> str:
        return self.address.name

    # -- life --------------------------------------------------------------------------------------------------

    async def connect(self, make_client: MakeClient) -> None:
        """Begin to connect, for ever; returns at once."""
        self.client = make_client(
            host=self.address.host,
            port=self.address.port,
            identity=f"{self.hello.engine}#{self.hello.epoch}#{secrets.token_hex(8)}".encode()[-255:],
            on_message=self.on_message,
            on_state=self.on_state,
        )
        await self.client.start()

    async def close(self) -> None:
        """Disconnect."""
        if self.client is not None:
            await self.client.close()

    def send(self, message: AnyMessage) -> None:
        """Hand a message over; one that does not get through shows as silence."""
        if self.client is not None:
            self.client.send(message)

    def heartbeat(self, away_s: float = 0.0) -> None:
        """Say that we live, notice that it does not; called every heartbeat interval.

        Args:
            away_s: In which we could not have heard it, as our thread did not run.
        """
        now_s = self.around.clock()
        self._heard_s = excused(self._heard_s, away_s, now_s)
        if self._reported_s is not None:
            self._reported_s = excused(self._reported_s, away_s, now_s)
        if self.welcome is not None:
            if now_s - self._heard_s > max(self.around.silent_after_s, 2 * REPORTS_EVERY_S):
                self.lose(Health.SILENT, "peer_silent")
            else:
                self.send(Heartbeat(self.hello.epoch))
        elif self.health is Health.SILENT:
            self.send(self.hello)
        self.refresh()

    def lose(self, health: Health, problem: str) -> None:
        """Nothing can be expected from it until it says Welcome again."""
        had = self.welcome is not None
        self.welcome, self.health, self.reason = None, health, problem
        self.welcomed.clear()
        self._load, self._reported_s, self._digest = ReceivedLoad(), None, DigestFollower()
        self._offers.clear()
        self.around.index.forget(self.name)
        for answer in self.answers.values():
            if not answer.done():
                answer.set_exception(PeerLost(problem))
        if had:
            self.around.counters[problem] += 1
            logger.warning(
                "disagg: prefill worker %s is lost (%s); its prompts are prefilled elsewhere", self.name, problem
            )
            self.around.emit(PeerLeft(self.name, problem))
        self._changed()

    # -- what comes from it ------------------------------------------------------------------------------------

    def on_state(self, state: ChannelState, reason: str) -> None:
        match state:
            case ChannelState.UP:
                self.health, self.reason = Health.CONNECTING, "handshake"
                self.send(self.hello)
            case ChannelState.AUTHENTICATION_FAILED:
                self.around.counters["authentication_failed"] += 1
                self.lose(Health.REFUSED, "authentication_failed")
            case ChannelState.DOWN:
                self.lose(Health.CONNECTING, "unreachable" if self.welcome is None else "peer_lost")
            case ChannelState.CONNECTING:
                pass
        if reason:
            logger.debug("disagg: side channel to %s: %s (%s)", self.name, state.name, reason)
        self._changed()

    def on_message(self, message: AnyMessage) -> None:
        self._heard_s = self.around.clock()
        match message:
            case Welcome():
                self._welcomed(message)
            case Rejected(reason, theirs, ours):
                self._rejected(reason, ours=ours, theirs=theirs)
            case Accepted(transfer_id) | Refused(transfer_id):
                if isinstance(message, Accepted):
                    message = Accepted(transfer_id, sane_eta_s(message.eta_s))
                    self._offers.accepted(transfer_id)  # here, not where it is awaited: a report may follow at once
                elif message.reason == "draining":  # the report that says so may come after the next prompt
                    self._load = replace(self._load, draining=True)
                    self._changed()
                answer = self.answers.get(transfer_id)
                if answer is not None and not answer.done():
                    answer.set_result(message)
            case Started(transfer_id):
                self.around.emit(PrefillStarted(transfer_id, self.name))
            case Cancel(transfer_id, reason):
                self.around.emit(PrefillFailed(transfer_id, reason, self.name))
            case LoadReport():
                self._reported(message)
            case Sent(_, wire_bytes, wire_s) if wire_bytes > 0 and 0 < wire_s < math.inf:
                self.around.latency.saw_transfer(self.name, wire_bytes=wire_bytes, seconds=wire_s)
                self._choose_codec()
                self._changed()
            case _:
                self.around.counters["unexpected_messages"] += 1

    def _welcomed(self, welcome: Welcome) -> None:
        ours, theirs = party_of(self.hello), party_of(welcome)
        mismatch = find_mismatch(ours, theirs) or find_lane_mismatch(theirs, ours, region_slots=self.hello.region_slots)
        if mismatch is not None:  # it compares as well, but by its own version's rules
            self._rejected(mismatch.reason, ours=mismatch.ours, theirs=mismatch.theirs)
            return
        if self.welcome is not None and self.welcome.epoch != welcome.epoch:
            self.around.emit(PeerLeft(self.name, "peer_restarted"))
        self.welcome, self.health, self.reason = welcome, Health.HEALTHY, ""
        if welcome.epoch != self._epoch:  # another process: what the one before did wrong does not count
            self._epoch, self.backoff, self.probe, self.wired = welcome.epoch, Backoff(), b"", False
        self.welcomed.set()
        self._choose_codec()
        logger.info("disagg: prefill worker %s is ready (epoch %d)", self.name, welcome.epoch)
        self.around.emit(
            PeerJoined(
                AddPeer(
                    peer=self.name,
                    epoch=welcome.epoch,
                    endpoints=welcome.endpoints,
                    region_first_slot=self.hello.region_first_slot,
                    region_slots=self.hello.region_slots,
                    receives=True,
                    our_ranks=len(self.hello.endpoints),
                )
            )
        )
        self._changed()

    def _choose_codec(self) -> None:
        """Ask the codec policy, where the settings leave the choice open and there is a wire to speak of."""
        if self.around.codec != "auto" or is_loopback(self.address.host) or self.welcome is None:
            return
        geometry = self.welcome.geometry
        choices = codec_choices(
            self.around.latency.link(self.name, wire_bytes_per_token=self.row.link.wire_bytes_per_token),
            self.codec,
            geometry,
            senders=self.welcome.endpoints,
            receivers=self.hello.endpoints,
        )
        chosen = self.around.choose_codec(self.name, choices) if choices is not None else None
        if chosen is not None and chosen != self.codec:
            logger.info("disagg: KV from %s travels as %s from now on", self.name, chosen)
            self.codec, self._bytes_per_token = chosen, None

    def _rejected(self, reason: str, *, ours: str, theirs: str) -> None:
        if reason == "unknown_peer":  # it restarted, or had given us up: introduce ourselves again
            self.lose(Health.CONNECTING, "peer_restarted")
            self.send(self.hello)
            return
        if reason == "engine_in_use":  # by whoever has another key; it may be our own former self: heartbeats ask again
            self.lose(Health.SILENT, reason)
            return
        if self.reason != reason:
            logger.warning(
                "disagg: prefill worker %s refused this decode engine: %s differs, ours %s, theirs %s; "
                "prompts are prefilled locally",
                *(self.name, reason, ours, theirs),
            )
        self.around.counters[f"rejected_{reason}"] += 1
        self.lose(Health.REFUSED, reason)

    def _reported(self, report: LoadReport) -> None:
        if self.welcome is None or report.epoch != self.welcome.epoch:
            self.around.counters["stale_reports"] += 1
            return
        self._load = self._load.updated(report)
        self._reported_s = self.around.clock()
        self._offers.reported()
        if report.digest is not None:
            self._follow(report.digest)
        self._changed()

    def _follow(self, part: DigestPart) -> None:
        change = self._digest.take(part)
        if change is None:
            self.around.counters["digest_gaps"] += 1
            if self.around.clock() - self._digest_asked_s >= DIGEST_ASK_AGAIN_S:
                self._digest_asked_s = self.around.clock()
                self.send(DigestRequest())
        elif change.full:
            self.around.index.replace(self.name, change.added)
        else:
            self.around.index.update(self.name, added=change.added, removed=change.removed)

    # -- offers ------------------------------------------------------------------------------------------------

    @property
    def forgotten_s(self) -> float:
        """For how long nothing was heard from it."""
        return self.around.clock() - max(self.made_s, self._heard_s)

    def may_ask(self) -> bool:
        """Whether a prompt may be offered to it now."""
        wants = self.welcome is not None and not self._load.draining
        return wants and self.left_s is None and self.backoff.may_ask(self.around.clock())

    def offered(self, transfer_id: bytes, tokens: int, priority: int = 0) -> None:
        """A prompt of ours is, or is about to be, offered to it; idempotent."""
        self._offers.add(transfer_id, tokens, priority)
        self._changed()

    def asked(self, transfer_id: bytes) -> None:
        """The offer goes out."""
        self.backoff = self.backoff.asked(self.around.clock())
        self.probe = transfer_id if self.backoff.probe_s is not None else b""
        self._changed()

    def not_offered(self, transfer_id: bytes) -> None:
        """It refused, or was not asked after all, or the prompt was taken back."""
        if self._offers.remove(transfer_id):
            self._changed()

    def call_ended(self, transfer_id: bytes) -> None:
        """Nobody works on that offload any more; what was accepted stays counted until the next report counts it."""
        if self._offers.call_ended(transfer_id):
            self._changed()

    def undecided(self, transfer_id: bytes) -> None:
        """An offload ended and says nothing about the worker."""
        self.not_offered(transfer_id)
        if transfer_id == self.probe:
            self.backoff, self.probe = self.backoff.undecided(), b""
            self._changed()

    def failed(self, reason: str) -> None:
        """An offload failed, and it is the worker's doing."""
        before = self.backoff
        self.backoff = before.failed(self.around.clock(), f"{self.hello.engine}|{self.name}")
        if self.backoff is not before:
            self.probe = b""
            self.around.counters[f"backed_off_{reason}"] += 1
            logger.log(
                logging.WARNING if self.backoff.failures == 1 else logging.DEBUG,
                "disagg: prefill worker %s failed an offload (%s, %d in a row); left alone for %.1f s",
                *(self.name, reason, self.backoff.failures, self.backoff.until_s - self.around.clock()),
            )
            self._changed()

    def succeeded(self) -> None:
        """An offload went all the way."""
        self._landed_s = self.around.clock()
        if self.backoff.probe_s is not None:
            logger.info("disagg: prefill worker %s works again", self.name)
        self.backoff, self.probe = self.backoff.succeeded(), b""

    def landed(self, *, wire_bytes: int, tokens: int) -> None:
        """KV of so many tokens took so many bytes."""
        if tokens > 0 and wire_bytes > 0:
            measured = wire_bytes / tokens
            before = self._bytes_per_token if self._bytes_per_token is not None else measured
            self._bytes_per_token = before + NEWEST_SHARE * (measured - before)

    # -- what decisions see ------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Make the row anew: something that it shows has changed, or time has passed."""
        load = self._load.assuming(self.around.assumed())
        latency, welcome = self.around.latency, self.welcome
        per_token = self._bytes_per_token
        if per_token is None:
            geometry = welcome.geometry if welcome is not None else self.hello.geometry
            per_token = wire_bytes_per_token(geometry, self.codec, ranks=len(self.hello.endpoints))
        self.row = WorkerState(
            worker=self.name,
            healthy=self.may_ask() and bool(self.address.url),
            queued_requests=load.queued_requests,
            max_prompt_tokens=welcome.max_prompt_tokens if welcome is not None else 0,
            queued_prefill_tokens=load.queued_prefill_tokens,
            running_requests=load.running_requests,
            kv_usage=load.kv_usage,
            prefill_tokens_per_s=load.prefill_tokens_per_s,
            reported_s=self._reported_s or 0.0,
            draining=load.draining,
            in_flight_requests=self._offers.requests,
            in_flight_tokens=self._offers.tokens,
            by_priority=self._by_priority(load),
            overhead_s=self._overhead_s(),
            prefill=load.prefill,
            link=latency.link(self.name, wire_bytes_per_token=per_token),
        )

    def _by_priority(self, load: ReceivedLoad) -> tuple[tuple[int, int], ...]:
        """Of a worker that schedules by priority; nobody overtakes at another one."""
        reorders = self.welcome is not None and PRIORITY in self.welcome.features
        return self._offers.by_priority(load.by_priority) if reorders else ()

    def _overhead_s(self) -> float:
        """What was measured; what is above the prior fades while nothing lands.

        The first transfers wire the agents up and take seconds. A worker that is avoided for that would never be
        measured again.
        """
        measured_s: float = self.around.latency.overhead_s(self.name)
        excess_s = max(0.0, measured_s - OVERHEAD_PRIOR_S)
        age_s = self.around.clock() - self._landed_s
        return measured_s - excess_s + excess_s * math.exp2(-age_s / FADES_BY_HALF_S)

    def _changed(self) -> None:
        self.refresh()
        self.around.changed(self)

    def describe(self) -> dict[str, object]:
        """The debug view."""
        health, reason = self.standing()
        age_s = None if self._reported_s is None else self.around.clock() - self._reported_s
        row = self.row
        return {
            "url": self.address.url,
            "healthy": self.may_ask() and health is Health.HEALTHY,
            "state": str(health),
            "problem": reason,
            "epoch": self.welcome.epoch if self.welcome is not None else 0,
            "failures": self.backoff.failures,
            "report_age_s": age_s,
            "codec": self.codec,
            "digest_chunks": self.around.index.chunks(self.name),
            "digest_synced": self._digest.synced,
            **{name: value for name, value in msgspec.to_builtins(row).items() if name not in ("worker", "healthy")},
        }

    def figures(self) -> dict[str, object]:
        """The part of it that metrics are made from."""
        health, _ = self.standing()
        healthy = self.may_ask() and health is Health.HEALTHY
        return {"healthy": healthy, "state": str(health), "queued_requests": self.row.queued_requests}

    def standing(self) -> tuple[Health, str]:
        """Health as of now, and why."""
        return standing(
            self.health,
            self.reason,
            now_s=self.around.clock(),
            left_s=self.left_s,
            reported_s=self._reported_s,
            draining=self._load.draining,
            backoff=self.backoff,
            suspect_after_s=self.around.suspect_after_s,
        )
