"""An LMCache server as seen from an engine's thread: questions that never wait, answered by threads of ours.

    look_up      ask for the part of a prompt that the engine lacks
    answer       None until it is known; then what was found, or nothing: late, silent, and absent are the same here
    forget       nobody waits for that answer any more
    put          store one chunk; refused while the server is silent or too much waits for it
    end          no chunks of this prompt follow

A server that does not answer in time is not asked again until it is connected anew, which one thread tries every
``heartbeat_s``. That is said once an outage, and counted.
"""

import logging
import queue
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import torch

from disagg_lmcache.kv_chunks import fits, store_salt
from disagg_lmcache.server_client import Client
from disagg_plugin.cache_settings import LMCacheSettings
from disagg_plugin.errors import StoreFailed
from disagg_plugin.kv.geometry import KVGeometry

logger = logging.getLogger(__name__)

LOAD_THREADS = 4
FETCH_BYTES = 64 << 20  # of one answer
KEPT_S = 120.0  # that the server keeps what was found for us; its --l1-read-ttl-seconds, 300, must be above it
MAX_ORPHANS = 64
CLOSE_S = 1.0  # that a thread may take to end; an engine may be serving on
BACKLOG_BYTES = 512 << 20  # of chunks that wait to be stored; what comes on top is not stored

Connect = Callable[[], Client]


@dataclass(frozen=True, slots=True)
class Found:
    """What of a prompt was in the store.

    Attributes:
        start: First token of ``chunks``.
        end: Behind the last token that the store has, fetched or not.
    """

    start: int = 0
    end: int = 0
    chunks: tuple[torch.Tensor, ...] = ()


NOTHING = Found()


@dataclass(slots=True, eq=False)
class _Question:
    session: str
    prompt: Sequence[int]
    end: int  # behind the last token that is wanted
    salt: str
    start: int  # first token that is wanted, at a chunk's border
    until_s: float  # moves as parts of the answer arrive
    found: Found | None = None
    dropped: bool = False


@dataclass(slots=True)
class _Line:
    """A connection, and which one it is."""

    client: Client
    number: int


@dataclass(slots=True, eq=False)
class _Put:
    line: int
    session: str
    prompt: Sequence[int] = ()
    salt: str = ""
    span: tuple[int, int] = (0, 0)
    chunk: torch.Tensor | None = None  # None: the session ends
    size_bytes: int = 0


class PrefixStore:
    """See the module; its public calls belong to one thread, the engine's.

    Attributes:
        totals: What was counted; names as in ``control.prefix_ledger``, and what is stored besides.
    """

    def __init__(
        self,
        connect: Connect,
        settings: LMCacheSettings,
        geometry: KVGeometry,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connect = connect
        self._settings = settings
        self._geometry = geometry
        self._clock = clock
        self._lock = threading.Lock()  # of _line, _problem, _stopped and totals
        self._line: _Line | None = None
        self._lines = 0
        self._problem = "not connected yet"
        self._stopped = ""
        self._sessions = 0
        self._name = secrets.token_hex(8)  # the server keeps hashes by session: no two engines may ever share one
        self._questions: dict[str, _Question] = {}
        self._orphans: deque[_Question] = deque(maxlen=MAX_ORPHANS)  # asked, and not answered
        self._puts: queue.SimpleQueue[_Put | None] = queue.SimpleQueue()
        self._backlog_bytes = 0
        self._wake = threading.Event()
        self._closed = threading.Event()
        self.totals: Counter[str] = Counter()
        self._loaders = ThreadPoolExecutor(LOAD_THREADS, thread_name_prefix="disagg-lmcache-load")
        self._threads = [
            threading.Thread(target=self._keep_connected, name="disagg-lmcache", daemon=True),
            threading.Thread(target=self._store, name="disagg-lmcache-store", daemon=True),
        ]

    def start(self) -> str:
        """Connect once, waiting; afterwards our threads see to it. Why there is no connection, or an empty text."""
        self._try_to_connect()
        for thread in self._threads:
            thread.start()
        return self.problem

    @property
    def problem(self) -> str:
        """Why nothing is asked or stored now; an empty text while all is well."""
        with self._lock:
            return self._stopped or self._problem

    @property
    def chunk_tokens(self) -> int:
        """Tokens of one chunk; 0 while there is a problem."""
        with self._lock:
            return self._line.client.chunk_tokens if self._line is not None and not self._stopped else 0

    def look_up(self, rid: str, prompt: Sequence[int], salt: str, cached_tokens: int) -> bool:
        """Ask for what of a prompt follows its first ``cached_tokens``, but for the last token of all, which every
        engine computes itself. False: not now, or there is no whole chunk in between."""
        if (line := self._current()) is None:
            return False
        size = line.client.chunk_tokens
        start, end = cached_tokens // size * size, (len(prompt) - 1) // size * size
        if end <= cached_tokens:
            return False
        until_s = self._clock() + self._settings.lookup_timeout_ms / 1e3
        question = _Question(self._new_session(), prompt, end, store_salt(salt), start, until_s)
        self._questions[rid] = question
        self._count(lookups=1)
        self._loaders.submit(self._load, line, question)
        return True

    def answer(self, rid: str) -> Found | None:
        """What was found, once; ``NOTHING`` when it takes too long. None: not yet."""
        question = self._questions[rid]
        found = question.found
        if found is None and self._clock() < question.until_s and not self.problem:
            return None
        del self._questions[rid]
        if found is None:
            question.dropped = True
            self._count(lookup_timeout=1)
        return found or NOTHING

    def forget(self, rid: str) -> None:
        """Whatever is found for it is not wanted."""
        if (question := self._questions.pop(rid, None)) is not None:
            question.dropped = True
            self._count(unused_lookups=1)

    def new_puts(self) -> str:
        """A name under which chunks of one prompt are stored."""
        return self._new_session()

    def put(self, session: str, prompt: Sequence[int], salt: str, span: tuple[int, int], chunk: torch.Tensor) -> None:
        """Store ``chunk``, of the tokens from one position of the prompt to another. It is the store's from now on."""
        size_bytes = chunk.numel() * chunk.element_size()
        with self._lock:
            line = None if self._stopped or not self._has_room(size_bytes) else self._line
            if line is None:
                self.totals["store_dropped"] += 1
                return
            self._backlog_bytes += size_bytes
        self._puts.put(_Put(line.number, session, prompt, store_salt(salt), span, chunk, size_bytes))

    def takes(self, size_bytes: int) -> bool:
        """Whether a chunk of this size would be stored now."""
        with self._lock:
            return self._line is not None and not self._stopped and self._has_room(size_bytes)

    def end(self, session: str) -> None:
        """All chunks of this session were put."""
        if (line := self._current()) is not None:
            self._puts.put(_Put(line.number, session))

    def stop(self, reason: str) -> None:
        """Use it no more, for good."""
        with self._lock:
            self._stopped = self._stopped or reason

    def close(self) -> None:
        """End the threads; idempotent."""
        if self._closed.is_set():
            return
        self.stop("closed")
        self._closed.set()
        self._wake.set()
        self._puts.put(None)
        self._loaders.shutdown(wait=False, cancel_futures=True)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(timeout=CLOSE_S)
        self._hang_up("closed", say=False)

    def figures(self) -> dict[str, object]:
        """For the debug view and the metrics."""
        with self._lock:
            return {
                "url": self._settings.url,
                "inactive_reason": self._stopped or self._problem,
                "unanswered_lookups": len(self._questions),
                "backlog_bytes": self._backlog_bytes,
                "totals": dict(self.totals),
            }

    # -- any thread ------------------------------------------------------------------------------------------------

    def _current(self) -> _Line | None:
        with self._lock:
            return None if self._stopped else self._line

    def _has_room(self, size_bytes: int) -> bool:
        return self._backlog_bytes + size_bytes <= BACKLOG_BYTES

    def _new_session(self) -> str:
        self._sessions += 1
        return f"disagg-{self._name}-{self._sessions}"

    def _count(self, **more: int) -> None:
        with self._lock:
            self.totals.update(more)

    def _hang_up(self, problem: str, *, number: int | None = None, say: bool = True) -> None:
        """The connection (of this number, if it is still the one) is not used any more."""
        with self._lock:
            line = self._line
            if line is None or (number is not None and line.number != number):
                return
            self._line, self._problem = None, problem
        if say:
            logger.warning(
                "disagg: LMCache at %s: %s; serving without it until it answers", self._settings.url, problem
            )
        with suppress(StoreFailed):
            line.client.close()

    def _give_up(self, what: str) -> None:
        logger.exception("disagg: %s failed; LMCache is not used until a restart", what)
        self.stop("internal_error")

    # -- loads -----------------------------------------------------------------------------------------------------

    def _load(self, line: _Line, question: _Question) -> None:
        found = NOTHING
        try:
            found = self._answer_to(line.client, question)
        except StoreFailed as error:
            self._count(failed_loads=1)
            self._hang_up(str(error), number=line.number)
        except Exception:  # noqa: BLE001  our own mistake: the request must not wait for it
            self._give_up("a load")
        finally:
            question.found = found

    def _answer_to(self, client: Client, question: _Question) -> Found:
        within_s = question.until_s - self._clock()
        if within_s <= 0 or question.dropped:
            return NOTHING
        session, tokens, salt = question.session, question.prompt[: question.end], question.salt
        self._orphans.append(question)
        kept_until_s = self._clock() + KEPT_S
        found = client.look_up(session, tokens, salt, within_s)
        with suppress(ValueError):  # it answered after another line was opened
            self._orphans.remove(question)
        self._count(lookup_timeout=int(found is None and not question.dropped))
        end, at = found or 0, question.start
        chunks: list[torch.Tensor] = []
        try:
            client.release(session, tokens, salt, 0, min(at, end))
            while at < end and not question.dropped:
                question.until_s = self._clock() + self._settings.request_timeout_s
                upto = min(at + self._batch_tokens(client.chunk_tokens), end)
                part = client.fetch(session, tokens, salt, at, upto)
                expected = (upto - at) // client.chunk_tokens
                if len(part) != expected or not all(fits(c, self._geometry, client.chunk_tokens) for c in part):
                    raise StoreFailed("it delivered objects of another shape")
                if self._clock() > kept_until_s:
                    raise StoreFailed("it took so long that what was read may have been written over")
                chunks += part
                at = upto
            client.release(session, tokens, salt, at, end)
        finally:
            client.end(session)
        return Found(question.start, end, tuple(chunks))

    def _batch_tokens(self, chunk_tokens: int) -> int:
        chunk_bytes = chunk_tokens * self._geometry.raw_token_bytes()
        return max(1, FETCH_BYTES // chunk_bytes) * chunk_tokens

    # -- stores ----------------------------------------------------------------------------------------------------

    def _store(self) -> None:
        while (put := self._puts.get()) is not None:
            line = self._current()
            if line is not None and line.number == put.line:
                self._store_one(line, put)
            elif put.chunk is not None:
                self._count(store_dropped=1)
            with self._lock:
                self._backlog_bytes -= put.size_bytes

    def _store_one(self, line: _Line, put: _Put) -> None:
        try:
            if put.chunk is None:
                line.client.end(put.session)
                return
            start, end = put.span
            stored = line.client.put(put.session, put.prompt[:end], put.salt, start, put.chunk)
            self._count(**{"stored_chunks" if stored else "store_refused": 1})
        except StoreFailed as error:
            self._count(store_failed=1)
            self._hang_up(str(error), number=line.number)
        except Exception:  # noqa: BLE001  our own mistake: the thread must go on, its queue is read until the end
            self._give_up("a store")

    # -- the connection --------------------------------------------------------------------------------------------

    def _keep_connected(self) -> None:
        while not self._wake.wait(self._settings.heartbeat_s):
            line = self._current()
            if line is None:
                self._try_to_connect()
                continue
            try:
                line.client.ping()
            except StoreFailed as error:
                self._hang_up(str(error), number=line.number)

    def _try_to_connect(self) -> None:
        if self._stopped or self._closed.is_set():
            return
        try:
            client = self._connect()
        except StoreFailed as error:
            with self._lock:
                self._problem = str(error)
            return
        for question in [self._orphans.popleft() for _ in range(len(self._orphans))]:
            # a server that was only slow has found these by now, and keeps them for us
            client.release(question.session, question.prompt[: question.end], question.salt, 0, question.end)
            client.end(question.session)
        with self._lock:
            self._lines += 1
            again = self._lines > 1 or self._problem != "not connected yet"
            self._line, self._problem = _Line(client, self._lines), ""
        logger.info(
            "disagg: LMCache at %s %s, chunks of %d tokens",
            self._settings.url,
            "answers again" if again else "serves prefixes",
            client.chunk_tokens,
        )
