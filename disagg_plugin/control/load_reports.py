"""What a prefill engine says about itself, unasked, to each decode engine that it knows: its load, and its prefixes.

    scheduler's thread    publish(), holds(), cache_reset()    store, and wake the I/O thread at most once a report
    I/O thread            add(), forget(), soon(), ...         hash what is new, and send

The queue that it tells of is the engine's and what was accepted but has not arrived over HTTP: see ``Accepted`` in
``messages`` for why every accepted prompt must be in the report after it.
"""

import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

from disagg_plugin.control.digest_stream import DigestSender
from disagg_plugin.control.load import Load
from disagg_plugin.control.messages import PRIORITY, AnyMessage, DigestPart, LoadReport, PrefillSpeed, Welcome
from disagg_plugin.control.prefix_digest import PrefixDigest
from disagg_plugin.control.report_pacer import Later, ReportPacer
from disagg_plugin.serving.prefix_hash import CHUNK_TOKENS, prefix_hashes
from disagg_plugin.serving.prefix_index import MAX_CHUNKS

Send = Callable[[bytes, AnyMessage], bool]


@dataclass(frozen=True, slots=True)
class HeldPrompt:
    """A prompt of which the engine has computed the KV; what its prefix hashes are made from."""

    token_ids: Sequence[int]
    salt: str = ""
    lora: str = ""


@dataclass(frozen=True, slots=True)
class Awaited:
    """An accepted prompt whose HTTP request was not seen yet."""

    until_s: float
    prompt_tokens: int
    priority: int = 0


class LoadReports:
    """The reports of one prefill engine.

    Args:
        awaited: What was accepted and has not arrived.
        kv_capacity_tokens: Of the engine's KV cache: what the digest may claim to hold; 0: it keeps no prefixes.

    Attributes:
        load: The engine's own newest one.
        draining: Whether to say that every offer will be refused.
    """

    def __init__(
        self,
        welcome: Welcome,
        counters: Counter[str],
        *,
        awaited: Callable[[], Iterable[Awaited]],
        send: Send,
        post: Callable[..., None],
        later: Later,
        clock: Callable[[], float] = time.monotonic,
        kv_capacity_tokens: int = 0,
    ) -> None:
        self._welcome = welcome
        self._counters = counters
        self._awaited = awaited
        self._send = send
        self._pacer = ReportPacer(self._report_to_all, post=post, later=later, clock=clock)
        self._capacity_chunks = min(kv_capacity_tokens // CHUNK_TOKENS, MAX_CHUNKS)
        self._digest = PrefixDigest(self._capacity_chunks)
        self._held: deque[HeldPrompt | None] = deque()  # None: the engine's prefix cache was reset
        self._recipients: dict[bytes, DigestSender] = {}
        self._kv_usage = 0.0
        self.load = Load()
        self.draining = False

    # -- scheduler's thread ------------------------------------------------------------------------------------

    def publish(self, load: Load, kv_usage: float) -> None:
        """What the engine's queue is now."""
        self.load, self._kv_usage = load, kv_usage
        if self._recipients:
            self._pacer.changed()

    def holds(self, prompt: HeldPrompt) -> None:
        """The engine has computed this prompt, offloaded or not: its prefixes are in the cache."""
        if self._capacity_chunks and len(prompt.token_ids) >= CHUNK_TOKENS:
            self._held.append(prompt)
            self._pacer.changed()

    def cache_reset(self) -> None:
        """The engine has emptied its prefix cache."""
        self._held.append(None)
        self._pacer.changed()

    # -- I/O thread --------------------------------------------------------------------------------------------

    def add(self, identity: bytes) -> None:
        """A decode engine is there: it gets everything, soon."""
        self._recipients[identity] = DigestSender()
        self._pacer.soon()

    def forget(self, identity: bytes) -> None:
        """It is gone."""
        self._recipients.pop(identity, None)

    def start_over(self, identity: bytes) -> None:
        """A decode engine misses a part of the digest."""
        self._recipients[identity].start_over()
        self._pacer.soon()

    def soon(self) -> None:
        """Something has changed that cannot wait for the engine's next step."""
        self._pacer.soon()

    def stop(self) -> None:
        """No more of them."""
        self._pacer.stop()

    @property
    def awaited_tokens(self) -> int:
        """Prompt tokens of what was accepted and has not arrived."""
        return sum([awaited.prompt_tokens for awaited in self._awaited()])

    def snapshot(self) -> dict[str, object]:
        """The debug view's part."""
        return {"digest_chunks": len(self._digest), "load": {**asdict(self.load), "kv_usage": self._kv_usage}}

    def _report_to_all(self) -> bool:
        """One report to each decode engine, more while its part of the digest is large; whether there is any."""
        self._hash_held()
        delta = self._digest.take_delta()
        for identity, digest in self._recipients.items():
            parts = digest.parts(delta, self._digest.full)
            for part in itertools.chain([next(parts, None)], parts):
                if not self._send(identity, self._report(part)):
                    digest.start_over()  # it reads too slowly, or is gone
                    break
                self._counters["reports"] += 1
        return bool(self._recipients)

    def _hash_held(self) -> None:
        while self._held:
            prompt = self._held.popleft()
            if prompt is None:
                self._digest.clear()
                continue
            try:
                hashes = prefix_hashes(prompt.token_ids, salt=prompt.salt, lora=prompt.lora)
            except (OverflowError, TypeError):  # no token ids: a placeholder of the engine's
                self._counters["unhashable_prompts"] += 1
                continue
            self._digest.touch(hashes)

    def _report(self, part: DigestPart | None) -> LoadReport:
        load, awaited = self.load, list(self._awaited())
        model = load.prefill
        return LoadReport(
            epoch=self._welcome.epoch,
            queued_requests=load.queued_requests + len(awaited),
            queued_prefill_tokens=load.queued_prefill_tokens + sum([one.prompt_tokens for one in awaited]),
            running_requests=load.running_requests,
            kv_usage=self._kv_usage,
            prefill_tokens_per_s=load.prefill_tokens_per_s,
            prefill=PrefillSpeed(model.base_s, model.per_token_s, model.per_pair_s, model.samples, model.error),
            digest=part,
            by_priority=_by_priority(load, awaited) if PRIORITY in self._welcome.features else (),
            draining=self.draining,
        )


def _by_priority(load: Load, awaited: Iterable[Awaited]) -> tuple[tuple[int, int], ...]:
    tokens = dict(load.by_priority)
    for one in awaited:
        tokens[one.priority] = tokens.get(one.priority, 0) + one.prompt_tokens
    return tuple(sorted(tokens.items()))
