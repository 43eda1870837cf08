"""Offloads under way: offer to one worker after another, post the prompt to who accepts, tell what became of it.

Everything runs in the I/O thread. Whatever happens to an offload, the scheduler hears of exactly one end of it, and the
worker's back-off of at most one verdict.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping

import aiohttp

from disagg_plugin.config import TransferSettings
from disagg_plugin.control.adapters import AdapterDigests
from disagg_plugin.control.decode_port import OfferCall
from disagg_plugin.control.events import DecodeEvent, PrefillAccepted, PrefillEnded, PrefillFailed
from disagg_plugin.control.messages import HELD, PRIORITY, Accepted, Cancel, Offer, Refused, Renew, Welcome
from disagg_plugin.control.offload_call import DIALECTS, post_prompt, prompt_digest
from disagg_plugin.control.worker_link import WorkerLink
from disagg_plugin.errors import ConfigError, PeerLost, PeerRefused

DP_RANK_HEADER = "X-data-parallel-rank"  # vLLM's: which of its ranks serves a request
THE_PROMPTS_FAULT = frozenset({"http_400", "http_413", "http_422"})  # says nothing about the worker
INSIST_S = 0.1

logger = logging.getLogger(__name__)


class Offloads:
    """The calls of one decode engine."""

    def __init__(
        self,
        settings: TransferSettings,
        links: Mapping[str, WorkerLink],
        *,
        emit: Callable[[DecodeEvent], None],
        counters: Counter[str],
    ) -> None:
        self._settings = settings
        self._links = links
        self._emit = emit
        self._counters = counters
        self._calls: dict[bytes, asyncio.Task[None]] = {}
        self._held: dict[bytes, WorkerLink] = {}  # what a worker holds for requests that wait for room here
        self._adapters = AdapterDigests()
        self._session: aiohttp.ClientSession | None = None

    def __len__(self) -> int:
        return len(self._calls)

    async def open(self) -> None:
        """Needs the running loop."""
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._settings.offer_timeout_s),
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
        )

    async def close(self) -> None:
        """Cancel every call."""
        calls = list(self._calls.values())
        for task in calls:
            _cancel(task)
        await asyncio.gather(*calls, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    def start(self, call: OfferCall) -> None:
        """Begin one; its worker's row counts the prompt from now on."""
        if (first := self._links.get(call.workers[0])) is not None:
            first.offered(call.transfer_id, len(call.token_ids), call.priority)
        task = asyncio.get_running_loop().create_task(self._offload(call))
        self._calls[call.transfer_id] = task
        task.add_done_callback(lambda _: self._ended(call))

    def ready(self, transfer_id: bytes) -> None:
        """There is room: the worker sends, and holds for no longer than that takes."""
        self._held.pop(transfer_id, None)

    def renew(self) -> None:
        """Ask for more time for what is held; called every heartbeat interval."""
        by_link: dict[str, list[bytes]] = {}
        for transfer_id, link in list(self._held.items()):
            if link.welcome is None:
                del self._held[transfer_id]
            else:
                by_link.setdefault(link.name, []).append(transfer_id)
        for name, transfer_ids in by_link.items():
            self._links[name].send(Renew(tuple(transfer_ids)))

    def cancel(self, transfer_id: bytes, peer: str, reason: str) -> None:
        """The scheduler gives an offload up, in whatever state."""
        self._held.pop(transfer_id, None)
        if (task := self._calls.get(transfer_id)) is not None:
            _cancel(task, reason)  # closes the HTTP connection, which aborts the request there
        elif (link := self._links.get(peer)) is not None:
            link.send(Cancel(transfer_id, reason))
            link.undecided(transfer_id)

    def _ended(self, call: OfferCall) -> None:
        """However it ended: also cancelled before it began."""
        self._calls.pop(call.transfer_id, None)
        for name in call.workers:
            if (link := self._links.get(name)) is not None:
                link.call_ended(call.transfer_id)

    async def _offload(self, call: OfferCall) -> None:
        reason = "no_healthy_worker"
        for name in call.workers:
            link = self._links.get(name)
            if link is not None and call.held:
                reason = await self._ready_to_hand_over(link)
                if reason:
                    continue
            elif link is None or not link.may_ask():
                if link is not None and link.welcome is not None:
                    reason = "backed_off"
                continue
            assert link is not None
            try:
                accepted, reason = await self._ask(link, call)
                if accepted is not None:
                    reason = await self._prefill(link, call, accepted)
                    break
            except Exception:  # the boundary of one request: whatever it was, the request must not hang
                logger.exception("disagg: the offload call failed unexpectedly")
                link.undecided(call.transfer_id)
                reason = "internal_error"
                break
        if reason:
            self._counters[f"failed_{reason}"] += 1
            self._emit(PrefillFailed(call.transfer_id, reason))
        elif call.post:
            self._emit(PrefillEnded(call.transfer_id))

    async def _ready_to_hand_over(self, link: WorkerLink) -> str:
        """A router may send us to a worker that we are only now connecting to; an empty text, or why it is of no use.

        A back-off does not count here: the prompt is computed already.
        """
        try:
            await asyncio.wait_for(link.welcomed.wait(), self._settings.offer_timeout_s)
        except TimeoutError:
            return "holder_unreachable"
        return "" if link.welcome is not None and HELD in link.welcome.features else "holder_too_old"

    async def _ask(self, link: WorkerLink, call: OfferCall) -> tuple[Accepted | None, str]:
        """Offer the prompt; (Accepted, "") or (None, why not)."""
        adapter = ""
        if call.adapter:
            try:
                adapter = await asyncio.get_running_loop().run_in_executor(None, self._adapters.of, call.adapter)
            except ConfigError as error:
                logger.warning("disagg: prompts for this adapter are prefilled locally: %s", error)
                link.undecided(call.transfer_id)
                return None, "adapter_unreadable"
        answer: asyncio.Future[Accepted | Refused] = asyncio.get_running_loop().create_future()
        link.answers[call.transfer_id] = answer
        link.offered(call.transfer_id, len(call.token_ids), call.priority)
        link.asked(call.transfer_id)
        try:
            link.send(
                Offer(
                    transfer_id=call.transfer_id,
                    nonce=call.nonce,
                    prompt_tokens=len(call.token_ids),
                    cached_tokens=call.cached_tokens,
                    deadline_s=self._settings.deadline_s,
                    codec=link.codec,
                    priority=call.priority,
                    prompt_digest=0 if call.post else prompt_digest(call.token_ids, *call.under),
                    adapter=adapter,
                    held=call.held,
                )
            )
            message = await asyncio.wait_for(answer, self._settings.offer_timeout_s)
        except TimeoutError:
            link.send(Cancel(call.transfer_id, "offer_timeout"))
            link.not_offered(call.transfer_id)
            link.failed("offer_timeout")
            return None, "offer_timeout"
        except PeerLost as error:
            link.undecided(call.transfer_id)
            return None, str(error)
        except asyncio.CancelledError:
            link.send(Cancel(call.transfer_id, "cancelled"))
            link.undecided(call.transfer_id)
            raise
        finally:
            link.answers.pop(call.transfer_id, None)
        if isinstance(message, Refused):
            link.undecided(call.transfer_id)  # a full queue is no failure
            return None, f"refused_{message.reason}"
        return message, ""

    async def _prefill(self, link: WorkerLink, call: OfferCall, accepted: Accepted) -> str:
        """Post the prompt and wait for its end; an empty text, or why it failed."""
        assert self._session is not None
        assert link.welcome is not None
        self._emit(PrefillAccepted(call.transfer_id, link.name, accepted.eta_s))
        if call.held:
            self._held[call.transfer_id] = link
        if not call.post:  # whoever routed the request posts it
            return ""
        dialect = DIALECTS[link.welcome.kind]
        try:
            body = dialect.body(
                model=link.welcome.model.served_name,
                token_ids=call.token_ids,
                transfer_id=call.transfer_id,
                fields=_with_priority(call, link.welcome),
            )
            headers = call.http_headers
            if (rank := link.welcome.http_dp_rank) is not None:
                headers = (*headers, (DP_RANK_HEADER, str(rank)))
            await post_prompt(self._session, link.address, dialect, body, headers)
        except asyncio.CancelledError as cancelled:
            link.send(Cancel(call.transfer_id, str(cancelled)))
            link.undecided(call.transfer_id)
            raise
        except PeerRefused as error:
            reason = str(error)
        except (aiohttp.ClientError, OSError) as error:
            reason = "http_unreachable" if isinstance(error, aiohttp.ClientConnectorError) else "http_connection_lost"
        else:
            return ""  # a verdict comes with the KV
        if reason in THE_PROMPTS_FAULT or reason.startswith("cannot_carry_"):
            link.undecided(call.transfer_id)
        else:
            link.not_offered(call.transfer_id)
            link.failed(reason)
        return reason


def _cancel(task: asyncio.Task[None], reason: str | None = None) -> None:
    """Until it has ended: one cancellation was seen to get lost below ``post_prompt``, while it was connecting."""
    if not task.done():
        task.cancel(reason)
        asyncio.get_running_loop().call_later(INSIST_S, _cancel, task, reason)


def _with_priority(call: OfferCall, welcome: Welcome) -> tuple[tuple[str, object], ...]:
    """An engine that does not schedule by priority refuses the field, so only one that said it does is sent it."""
    if call.priority == 0 or PRIORITY not in welcome.features:
        return call.http_fields
    return (*call.http_fields, ("priority", call.priority))
