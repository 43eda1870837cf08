"""The prefill role's half of the side channel: answers handshakes and offers at once, inside the I/O thread."""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from disagg_plugin.config import DisaggSettings
from disagg_plugin.control.accepted_offers import AcceptedOffers
from disagg_plugin.control.adapters import AdapterDigests
from disagg_plugin.control.compatibility import Party, find_lane_mismatch, find_mismatch, party_of
from disagg_plugin.control.events import (
    AdapterChecked,
    Held,
    Leaving,
    PeerJoined,
    PeerLeft,
    PrefillEvent,
    TicketCancelled,
    TicketOffered,
    TicketReady,
    TicketRenewed,
)
from disagg_plugin.control.load import Load
from disagg_plugin.control.load_reports import Awaited, HeldPrompt, LoadReports, Send
from disagg_plugin.control.messages import (
    Accepted,
    AnyMessage,
    Cancel,
    DigestRequest,
    Heartbeat,
    Hello,
    Offer,
    Ready,
    Refused,
    Rejected,
    Renew,
    Sent,
    Started,
    Welcome,
)
from disagg_plugin.control.offload_call import prompt_digest
from disagg_plugin.control.own_pauses import OwnPauses, excused
from disagg_plugin.control.report_pacer import Later
from disagg_plugin.control.standstill import Standstill, Steps
from disagg_plugin.errors import ConfigError
from disagg_plugin.kv.commands import AddPeer

logger = logging.getLogger(__name__)

TRANSFER_ID_BYTES = 16
NOT_COUNTED = Steps()
LONGEST_DEADLINE_S = 86_400.0
CODECS = frozenset({"auto", "raw", "int8", "int8c"})


@dataclass(slots=True)
class _Peer:
    """One decode engine that said Hello."""

    engine: str
    epoch: int
    identity: bytes
    key: str  # that proved it; empty without keys
    heard_s: float


class PrefillService:
    """Serves decode engines; implements :class:`disagg_plugin.control.prefill_side.PrefillPort`.

    ``on_message`` and ``sweep`` run in the I/O thread; ``started``, ``cancel``, ``arrived``, ``publish``, ``holds``,
    ``cache_reset`` and ``drain`` are for the scheduler's thread: they only store, and wake the I/O thread at most once
    a report. ``leave`` and ``stay`` are for any thread, and for signal handlers.

    Args:
        key_of: The key that proved the client of this identity.
        later: Runs a call in the I/O thread after so many seconds.
        kv_capacity_tokens: Of the engine's KV cache: what the digest may claim to hold; 0: it keeps no prefixes.
    """

    def __init__(
        self,
        settings: DisaggSettings,
        welcome: Welcome,
        party: Party,
        *,
        send: Send,
        post: Callable[..., None],
        later: Later,
        key_of: Callable[[bytes], str] = lambda _identity: "",
        clock: Callable[[], float] = time.monotonic,
        kv_capacity_tokens: int = 0,
    ) -> None:
        self._settings = settings
        self._welcome = welcome
        self._party = party
        self._send = send
        self._post = post
        self._clock = clock
        self._pauses = OwnPauses(settings.side_channel.heartbeat_s)
        self._peers: dict[str, _Peer] = {}
        self._by_identity: dict[bytes, _Peer] = {}
        self._key_of = key_of
        self._offers = AcceptedOffers()
        self._holds: dict[bytes, Held] = {}  # what a router will send somebody for
        self._adapters = AdapterDigests()
        self._arrived: list[bytes] = []  # the scheduler's thread only
        self._events: deque[PrefillEvent] = deque()
        self._refuse_all = ""
        self._leaves = self._leaves_for_good = False
        self._steps = NOT_COUNTED  # as published
        self._standstill = Standstill(settings.transfer.stall_timeout_s)
        self.counters: Counter[str] = Counter()
        self._reports = LoadReports(
            welcome,
            self.counters,
            awaited=lambda: self._offers.awaited,
            send=send,
            post=post,
            later=later,
            clock=clock,
            kv_capacity_tokens=kv_capacity_tokens,
        )

    # -- scheduler's thread ------------------------------------------------------------------------------------

    def publish(self, load: Load, kv_usage: float, steps: Steps = NOT_COUNTED) -> None:
        """The load that the next offers are judged by, with the prompts in it that have arrived meanwhile.

        Args:
            steps: Of the engine, by which a paused one is known.
        """
        self._steps = steps
        self._reports.load = load  # first: what it counts is not awaited any more
        while self._arrived:
            self._offers.arrived(self._arrived.pop())
        self._reports.publish(load, kv_usage)

    def holds(self, prompt: HeldPrompt) -> None:
        """The engine has computed this prompt, offloaded or not: its prefixes are in the cache."""
        self._reports.holds(prompt)

    def cache_reset(self) -> None:
        """The engine has emptied its prefix cache."""
        self._reports.cache_reset()

    def started(self, transfer_id: bytes, peer: str) -> None:
        self._post(self._tell, peer, Started(transfer_id))

    def cancel(self, transfer_id: bytes, peer: str, reason: str) -> None:
        self._post(self._tell, peer, Cancel(transfer_id, reason))

    def all_sent(self, transfer_id: bytes, peer: str, *, wire_bytes: int, wire_s: float) -> None:
        self._post(self._send_to, peer, Sent(transfer_id, wire_bytes, wire_s))

    def arrived(self, transfer_id: bytes) -> None:
        """Its HTTP request came. It stays counted as awaited until a load is published that counts it: a prompt
        counted twice for a moment is harmless, one that is not counted lets too many in."""
        self._arrived.append(transfer_id)

    def held(self, transfer_id: bytes, held: Held) -> None:
        """KV is kept for whoever offers to take it; from here on, as the router sends them only after that."""
        self._holds[transfer_id] = held

    def check_adapter(self, transfer_id: bytes, folder: str, digest: str) -> None:
        """Reads files, the first time; the answer comes as an event."""
        self._post(self._check_adapter, transfer_id, folder, digest)

    def hold_ended(self, transfer_id: bytes) -> None:
        """Whoever comes now comes too late."""
        self._holds.pop(transfer_id, None)

    def drain(self) -> Iterable[PrefillEvent]:
        while self._events:
            yield self._events.popleft()

    def refuse_all(self, reason: str) -> None:
        """From now on every offer is refused."""
        self._refuse_all = reason

    # -- any thread --------------------------------------------------------------------------------------------

    def leave(self, *, for_good: bool = False) -> None:
        """Take no more prompts: offers are refused, decode engines are told, and what was not begun is handed back.

        Args:
            for_good: The process is about to end: ``stay`` changes nothing any more.
        """
        self._post(self._set_leaving, True, for_good)

    def stay(self) -> None:
        """Take prompts again; too late once it leaves for good."""
        self._post(self._set_leaving, False)

    @property
    def leaving(self) -> bool:
        """Whether it takes no more prompts."""
        return self._leaves

    # -- I/O thread --------------------------------------------------------------------------------------------

    def on_message(self, identity: bytes, message: AnyMessage) -> None:
        """One message from a decode engine."""
        peer = self._by_identity.get(identity)
        if peer is not None:
            peer.heard_s = self._clock()
        match message:
            case Hello():
                self._hello(identity, message)
            case Offer():
                self._offer(identity, peer, message)
            case Ready(transfer_id, first_token, end_token) if self._is_its(transfer_id, peer):
                self._events.append(TicketReady(transfer_id, first_token, end_token))
            case Renew(transfer_ids) if peer is not None:
                self._events.extend([TicketRenewed(one) for one in transfer_ids if self._is_its(one, peer)])
            case Cancel(transfer_id, reason) if self._is_its(transfer_id, peer):
                self._offers.cancelled(transfer_id)
                self._events.append(TicketCancelled(transfer_id, reason))
            case Heartbeat(epoch):
                # a peer that we dropped meanwhile, or never met in this epoch of ours, must say Hello again
                if peer is None or peer.epoch != epoch:
                    self._send(identity, Rejected("unknown_peer", str(self._welcome.epoch), str(epoch)))
            case DigestRequest() if peer is not None:
                self.counters["digest_requests"] += 1
                self._reports.start_over(identity)
            case _:
                self.counters["unexpected_messages"] += 1

    def _set_leaving(self, leaving: bool, for_good: bool = False) -> None:
        self._leaves_for_good = self._leaves_for_good or for_good
        if leaving is self._leaves or (self._leaves_for_good and not leaving):
            return
        self._leaves = leaving
        if leaving:
            logger.info("disagg: this prefill engine takes no more prompts; what it has begun it will end")
            self._events.append(Leaving())
        else:
            logger.info("disagg: this prefill engine takes prompts again")
        self._say_whether_draining()

    def _say_whether_draining(self) -> None:
        self._reports.draining = self._leaves or self._standstill.at_rest
        self._reports.soon()

    def _look_at_steps(self, now: float, away_s: float) -> None:
        """An engine at rest is offered nothing, and hands back what it has not begun with."""
        before = self._standstill.at_rest
        at_rest = self._standstill.look(now, steps=self._steps, load=self._reports.load, away_s=away_s)
        if at_rest is not before:
            news = "makes no steps: paused?" if at_rest else "takes prompts again"
            logger.warning("disagg: this prefill engine %s", news)
            self._say_whether_draining()
        if at_rest:
            for transfer_id, engine in self._offers.unsettled:
                self.counters["handed_back_at_rest"] += 1
                self._tell(engine, Cancel(transfer_id, "prefill_paused"))

    def _is_its(self, transfer_id: bytes, peer: _Peer | None) -> bool:
        """Whether this engine has a say in the transfer: it offered it, or nobody has and it is held for a router."""
        if peer is None:
            return False
        return self._offers.is_from(peer.engine, transfer_id) or transfer_id in self._holds

    def sweep(self) -> None:
        """Forget silent peers and prompts that never came; called every heartbeat interval."""
        now = self._clock()
        away_s = self._pauses.since_last_look_s(now)
        for peer in list(self._peers.values()):
            peer.heard_s = excused(peer.heard_s, away_s, now)
            if now - peer.heard_s > self._settings.side_channel.peer_timeout_s:
                self._leave(peer, "peer_silent")
        for transfer_id in self._offers.overdue(now):
            self._events.append(TicketCancelled(transfer_id, "prompt_never_came"))
        self._look_at_steps(now, away_s)

    def close(self) -> None:
        """No more reports."""
        self._reports.stop()

    def snapshot(self) -> dict[str, object]:
        """The debug view."""
        return {
            **self.counters,
            "peers": sorted(self._peers),
            "awaited": len(self._offers.awaited),
            "draining": self.leaving,
            "at_rest": self._standstill.at_rest,
            **self._reports.snapshot(),
        }

    def _hello(self, identity: bytes, hello: Hello) -> None:
        theirs = party_of(hello)
        mismatch = find_mismatch(self._party, theirs) or find_lane_mismatch(
            self._party, theirs, region_slots=hello.region_slots
        )
        if mismatch is not None:
            self.counters["rejected_peers"] += 1
            logger.warning("disagg: decode engine %s cannot use this prefill engine: %s", hello.engine, mismatch)
            self._send(identity, Rejected(mismatch.reason, mismatch.ours, mismatch.theirs))
            return
        known = self._peers.get(hello.engine)
        key = self._key_of(identity)
        if known is not None and known.key != key:
            self.counters["engine_in_use"] += 1
            logger.warning("disagg: somebody with another key calls itself %s: not believed", hello.engine)
            self._send(identity, Rejected("engine_in_use", known.key, key))
            return
        if known is not None and known.epoch != hello.epoch:
            self._leave(known, "peer_restarted")
        elif known is not None:
            self._by_identity.pop(known.identity, None)
            self._reports.forget(known.identity)
        peer = _Peer(hello.engine, hello.epoch, identity, key, self._clock())
        self._peers[hello.engine] = peer
        self._by_identity[identity] = peer
        self._events.append(
            PeerJoined(
                AddPeer(
                    peer=hello.engine,
                    epoch=hello.epoch,
                    endpoints=hello.endpoints,
                    region_first_slot=hello.region_first_slot,
                    region_slots=hello.region_slots,
                    receives=False,
                    our_ranks=len(self._welcome.endpoints),
                )
            )
        )
        self._send(identity, self._welcome)
        self._reports.add(identity)

    def _offer(self, identity: bytes, peer: _Peer | None, offer: Offer) -> None:
        reason = self._refusal(peer, offer)
        if reason or peer is None:
            self.counters[f"refused_{reason}"] += 1
            self._send(identity, Refused(offer.transfer_id, reason))
            return
        self._offers.remember(offer.transfer_id, peer.engine)
        # the ticket must stand before the prompt can arrive over HTTP
        self._events.append(
            TicketOffered(
                transfer_id=offer.transfer_id,
                nonce=offer.nonce,
                peer=peer.engine,
                prompt_tokens=offer.prompt_tokens,
                codec=offer.codec,
                deadline_s=offer.deadline_s,
                adapter=offer.adapter,
                prompt_digest=offer.prompt_digest,
                held=offer.held,
            )
        )
        if offer.held:
            self._holds.pop(offer.transfer_id, None)
            self.counters["accepted"] += 1
            self._send(identity, Accepted(offer.transfer_id, 0.0))
            return
        load = self._reports.load
        eta_s = load.eta_s + self._reports.awaited_tokens / load.prefill_tokens_per_s
        until_s = self._clock() + self._settings.transfer.start_timeout_s
        self._offers.accept(offer.transfer_id, peer.engine, Awaited(until_s, offer.prompt_tokens, offer.priority))
        self.counters["accepted"] += 1
        self._send(identity, Accepted(offer.transfer_id, eta_s))
        self._reports.soon()

    def _refusal(self, peer: _Peer | None, offer: Offer) -> str:
        if peer is None:
            return "unknown_peer"
        if not _makes_sense(offer):
            return "malformed"
        if offer.transfer_id in self._offers:
            return "offered_before"
        if offer.held:
            if (held := self._holds.get(offer.transfer_id)) is None:
                return "hold_expired"
            if prompt_digest(held.prompt, *held.under) != offer.prompt_digest:
                return "prompt_differs"
            return "" if self._is_adapter(held.adapter, offer.adapter) else "adapter_differs"
        if self._refuse_all:
            return self._refuse_all
        if self.leaving:
            return "draining"
        if self._standstill.at_rest:
            return "paused"
        if offer.prompt_tokens > self._welcome.max_prompt_tokens:
            return "prompt_too_long"
        queued = self._reports.load.queued_requests + len(self._offers.awaited)
        if queued >= self._settings.split_policy.prefill_queue_max:
            return "queue_full"
        return ""

    def _check_adapter(self, transfer_id: bytes, folder: str, digest: str) -> None:
        self._events.append(AdapterChecked(transfer_id, self._is_adapter(folder, digest)))

    def _is_adapter(self, folder: str, digest: str) -> bool:
        try:
            return (self._adapters.of(folder) if folder else "") == digest
        except ConfigError as error:
            logger.warning("disagg: an adapter cannot be compared: %s", error)
            return False

    def _leave(self, peer: _Peer, reason: str) -> None:
        self._peers.pop(peer.engine, None)
        self._by_identity.pop(peer.identity, None)
        self._reports.forget(peer.identity)
        self._offers.left(peer.engine)
        self.counters[reason] += 1
        self._events.append(PeerLeft(peer.engine, reason))

    def _tell(self, engine: str, message: Started | Cancel) -> None:
        """That an accepted transfer goes on, or is over."""
        self._offers.settled(message.transfer_id)
        self._send_to(engine, message)

    def _send_to(self, engine: str, message: AnyMessage) -> None:
        if (peer := self._peers.get(engine)) is not None:
            self._send(peer.identity, message)


def _makes_sense(offer: Offer) -> bool:
    """Whether its numbers can be used at all: types were checked when it was decoded, ranges were not."""
    return (
        len(offer.transfer_id) == TRANSFER_ID_BYTES
        and 0 <= offer.nonce < 1 << 64
        and offer.prompt_tokens > 0
        and 0 < offer.deadline_s <= LONGEST_DEADLINE_S  # NaN is neither
        and offer.codec in CODECS
    )
