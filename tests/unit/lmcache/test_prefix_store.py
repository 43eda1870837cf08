"""The store's threads against a server played in memory: what is late, silent or wrong costs time, never KV."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import Event

import pytest
import torch
from prefix_tier_rig import GEOMETRY, Engine, Prompt

from disagg_lmcache import prefix_store
from disagg_lmcache.kv_chunks import new_chunk
from disagg_lmcache.prefix_store import NOTHING, Found, PrefixStore
from disagg_plugin.cache_settings import LMCacheSettings
from disagg_plugin.errors import StoreFailed

CHUNK = 64
TOKENS = 5 * CHUNK + 20
PROMPT = list(range(TOKENS))
SETTINGS = LMCacheSettings(url="tcp://127.0.0.1:5555", lookup_timeout_ms=1000, request_timeout_s=5.0, heartbeat_s=0.01)
PATIENCE_S = 20.0


@dataclass
class Server:
    """What an LMCache server holds, and what it does next."""

    held: dict[tuple[str, tuple[int, ...]], torch.Tensor] = field(default_factory=dict)
    locked: int = 0
    ended: list[str] = field(default_factory=list)
    there: bool = True
    slow: bool = False  # it does what it is asked to, and its answer is late
    answers: Event = field(default_factory=Event)
    asked: Event = field(default_factory=Event)
    connections: int = 0
    shape: Callable[[torch.Tensor], torch.Tensor] = lambda chunk: chunk

    def __post_init__(self) -> None:
        self.answers.set()

    def connect(self) -> "Line":
        if not self.there:
            raise StoreFailed("Connection refused")
        self.connections += 1
        return Line(self)


class Line:
    """``server_client.Client`` of it."""

    chunk_tokens = CHUNK

    def __init__(self, server: Server) -> None:
        self._server = server

    def look_up(self, session: str, tokens: Sequence[int], salt: str, within_s: float) -> int | None:
        self._answer()
        found = 0
        while found + CHUNK <= len(tokens) and (salt, tuple(tokens[: found + CHUNK])) in self._server.held:
            found += CHUNK
        self._server.locked += found
        if self._server.slow:
            raise StoreFailed("no answer to a look-up")
        return found

    def fetch(self, session: str, tokens: Sequence[int], salt: str, start: int, end: int) -> list[torch.Tensor]:
        self._answer()
        self._server.locked -= end - start
        ends = range(start + CHUNK, end + 1, CHUNK)
        return [self._server.shape(self._server.held[salt, tuple(tokens[:at])]) for at in ends]

    def release(self, session: str, tokens: Sequence[int], salt: str, start: int, end: int) -> None:
        self._server.locked -= max(end - start, 0)

    def put(self, session: str, tokens: Sequence[int], salt: str, start: int, chunk: torch.Tensor) -> bool:
        self._answer()
        self._server.held[salt, tuple(tokens)] = chunk
        return True

    def end(self, session: str) -> None:
        self._server.ended.append(session)

    def ping(self) -> None:
        self._answer()

    def close(self) -> None: ...

    def _answer(self) -> None:
        self._server.asked.set()
        if not self._server.there or not self._server.answers.wait(PATIENCE_S):
            raise StoreFailed("no answer")


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(server: Server, clock: Clock) -> Iterator[PrefixStore]:
    store = PrefixStore(server.connect, SETTINGS, GEOMETRY, clock=clock)
    store.start()
    yield store
    server.answers.set()
    store.close()


def put_all(store: PrefixStore, server: Server, prompt: Sequence[int] = PROMPT, salt: str = "") -> None:
    for start in range(0, len(prompt) // CHUNK * CHUNK, CHUNK):
        store.put("s", prompt, salt, (start, start + CHUNK), torch.full_like(new_chunk(GEOMETRY, CHUNK), start))
    wait(lambda: len(server.held) >= len(prompt) // CHUNK)


def wait(condition: Callable[[], bool]) -> None:
    for _ in range(int(PATIENCE_S / 0.001)):
        if condition():
            return
        Event().wait(0.001)
    raise AssertionError(f"not within {PATIENCE_S} s")


def ask(store: PrefixStore, prompt: Sequence[int] = PROMPT, *, salt: str = "", cached_tokens: int = 0) -> Found:
    assert store.look_up("r", prompt, salt, cached_tokens)
    answers: list[Found] = []

    def answered() -> bool:
        if (found := store.answer("r")) is not None:
            answers.append(found)
        return bool(answers)

    wait(answered)
    return answers[0]


def test_what_was_put_is_found_up_to_the_last_token_but_one(store: PrefixStore, server: Server) -> None:
    put_all(store, server)
    found = ask(store)
    assert (found.start, found.end) == (0, 5 * CHUNK)
    assert [int(chunk.flatten()[0]) for chunk in found.chunks] == [0, 64, 128, 192, 256]
    assert ask(store, PROMPT[: 5 * CHUNK]).end == 4 * CHUNK, "the engine computes the last token in any case"
    assert server.locked == 0


def test_only_chunks_that_the_engine_lacks_are_fetched(store: PrefixStore, server: Server) -> None:
    put_all(store, server)
    found = ask(store, cached_tokens=CHUNK + 16)
    assert (found.start, found.end, len(found.chunks)) == (CHUNK, 5 * CHUNK, 4)
    assert server.locked == 0


@pytest.mark.parametrize("cached_tokens", [5 * CHUNK, 5 * CHUNK + 16])
def test_what_the_engine_holds_is_not_asked_for(store: PrefixStore, cached_tokens: int) -> None:
    assert not store.look_up("r", PROMPT, "", cached_tokens)


def test_many_chunks_come_in_several_answers(
    store: PrefixStore, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_store, "FETCH_BYTES", 2 * CHUNK * GEOMETRY.raw_token_bytes())
    put_all(store, server)
    assert len(ask(store).chunks) == 5
    assert server.locked == 0


def test_an_answer_that_comes_too_late_is_none(store: PrefixStore, server: Server, clock: Clock) -> None:
    put_all(store, server)
    server.answers.clear()
    assert store.look_up("r", PROMPT, "", 0)
    assert store.answer("r") is None
    clock.now_s += 1.1
    assert store.answer("r") == NOTHING
    assert store.totals["lookup_timeout"] == 1
    server.answers.set()
    wait(lambda: len(server.ended) == 1)
    assert server.locked == 0, "what it had found is not kept for us"


def test_a_forgotten_question_keeps_nothing_on_the_server(store: PrefixStore, server: Server) -> None:
    put_all(store, server)
    server.answers.clear()
    assert store.look_up("r", PROMPT, "", 0)
    store.forget("r")
    server.answers.set()
    wait(lambda: len(server.ended) == 1 or store.figures()["unanswered_lookups"] == 0)
    wait(lambda: server.locked == 0)


def test_a_server_that_went_away_is_not_asked_until_it_is_back(store: PrefixStore, server: Server) -> None:
    put_all(store, server)
    server.there = False
    wait(lambda: store.problem != "")
    assert not store.look_up("r", PROMPT, "", 0)
    assert not store.takes(1)
    store.put("s", PROMPT, "", (0, CHUNK), new_chunk(GEOMETRY, CHUNK))
    assert store.totals["store_dropped"] == 1
    server.there = True
    wait(lambda: store.problem == "")
    assert ask(store).end == 5 * CHUNK


def test_what_a_slow_server_finds_too_late_is_not_kept_there(store: PrefixStore, server: Server) -> None:
    put_all(store, server)
    server.slow = True
    assert ask(store) == NOTHING
    server.slow = False
    wait(lambda: store.problem == "" and server.connections == 2)
    assert server.locked == 0


def test_what_waits_for_a_server_that_was_replaced_is_not_stored(store: PrefixStore, server: Server) -> None:
    server.answers.clear()
    for start in (0, CHUNK):
        store.put("s", PROMPT, "", (start, start + CHUNK), new_chunk(GEOMETRY, CHUNK))
    wait(server.asked.is_set)
    server.there = False
    server.answers.set()
    wait(lambda: store.problem != "")
    server.there = True
    wait(lambda: store.problem == "")
    wait(lambda: store.figures()["backlog_bytes"] == 0)
    assert len(server.held) <= 1


def test_objects_of_another_shape_are_not_used(store: PrefixStore, server: Server) -> None:
    put_all(store, server)
    server.shape = lambda chunk: chunk.float()
    assert ask(store) == NOTHING
    assert store.totals["failed_loads"] == 1
    wait(lambda: server.connections == 2)


def test_what_may_have_been_written_over_meanwhile_is_not_used(
    store: PrefixStore, server: Server, clock: Clock
) -> None:
    put_all(store, server)

    def late(chunk: torch.Tensor) -> torch.Tensor:
        clock.now_s += prefix_store.KEPT_S
        return chunk

    server.shape = late
    assert ask(store) == NOTHING
    wait(lambda: store.totals["failed_loads"] == 1)


def test_more_than_the_memory_for_it_is_not_kept(
    store: PrefixStore, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    size_bytes = CHUNK * GEOMETRY.raw_token_bytes()
    monkeypatch.setattr(prefix_store, "BACKLOG_BYTES", 2 * size_bytes)
    server.answers.clear()
    for start in range(0, 4 * CHUNK, CHUNK):
        store.put("s", PROMPT, "", (start, start + CHUNK), new_chunk(GEOMETRY, CHUNK))
    assert store.totals["store_dropped"] == 2
    assert not store.takes(size_bytes)
    server.answers.set()
    wait(lambda: store.takes(size_bytes))


def test_once_stopped_it_stays_so(store: PrefixStore, server: Server) -> None:
    put_all(store, server)
    store.stop("weights_updated")
    assert not store.look_up("r", PROMPT, "", 0)
    assert (store.problem, store.chunk_tokens, store.takes(1)) == ("weights_updated", 0, False)


# -- with the tier on top of it


def test_a_prompt_that_was_stored_is_not_computed_again(store: PrefixStore, server: Server) -> None:
    engine = Engine(store)
    assert engine.serve(Prompt("a", PROMPT), seed=1) == TOKENS
    engine.wait(lambda: len(server.held) == 5)
    before = engine.kv_of(PROMPT[: 5 * CHUNK])
    engine.cache.flush()
    engine.view.cache.zero_()
    assert engine.serve(Prompt("b", PROMPT), seed=2) == 20
    assert torch.equal(engine.kv_of(PROMPT[: 5 * CHUNK]), before)
    assert engine.totals["store_hit_tokens"] == 5 * CHUNK
    wait(lambda: len(server.ended) >= 3)


def test_a_request_whose_kv_its_tokens_do_not_name_is_neither_looked_up_nor_stored(
    store: PrefixStore, server: Server
) -> None:
    engine = Engine(store)
    engine.serve(Prompt("a", PROMPT, reusable=False), seed=1)
    assert engine.totals.get("lookups", 0) == 0
    assert server.held == {}


def test_without_room_for_it_a_prompt_is_computed(store: PrefixStore, server: Server) -> None:
    engine = Engine(store)
    put_all(store, server)
    prompt, free = Prompt("a", PROMPT), engine.cache.free
    engine.cache.free = free[:3]
    engine.wait(lambda: not engine.tier.loading(prompt))
    assert engine.cache.free == free[:3]
    assert engine.totals["unused_lookups"] == 1


def test_a_request_that_ends_while_its_pages_are_filled_gives_them_back(store: PrefixStore, server: Server) -> None:
    engine = Engine(store)
    put_all(store, server)
    prompt, free = Prompt("a", PROMPT), sorted(engine.cache.free)
    wait(lambda: engine.tier.loading(prompt) and len(engine.cache.free) < len(free))
    engine.tier.step(0.0)
    engine.tier.gone(prompt)
    assert sorted(engine.cache.free) == free
    engine.wait(lambda: not engine.tier.open)
    assert engine.cache.held == {}


def test_updated_weights_end_it_for_good_and_free_what_is_under_way(store: PrefixStore, server: Server) -> None:
    engine = Engine(store)
    put_all(store, server)
    prompt, free = Prompt("a", PROMPT), sorted(engine.cache.free)
    wait(lambda: engine.tier.loading(prompt) and len(engine.cache.free) < len(free))
    engine.tier.stop("weights_updated")
    assert not engine.tier.loading(prompt)
    assert sorted(engine.cache.free) == free
    assert engine.cache.held == {}
    engine.compute(prompt, seed=3, step_tokens=80)
    assert not engine.tier.reading(prompt)
    assert not engine.tier.open


def test_an_error_of_ours_costs_lmcache_and_no_request(
    store: PrefixStore, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(store)
    put_all(store, server)

    def broken(*_: object) -> None:
        raise RuntimeError("a mistake")

    engine.cache.publish = broken  # type: ignore[method-assign]
    assert engine.serve(Prompt("a", PROMPT), seed=1) == TOKENS
    assert engine.tier.broken
    assert "LMCache is not used until a restart" in caplog.text


def test_a_cache_that_changed_meanwhile_is_not_written_over(store: PrefixStore, server: Server) -> None:
    """What the engine held when it asked was evicted: the objects begin behind the gap."""
    engine = Engine(store)
    put_all(store, server)
    engine.cache.held[tuple(PROMPT[: 2 * CHUNK])] = tuple(engine.cache.free[: 2 * CHUNK // 16])
    server.answers.clear()
    prompt = Prompt("a", PROMPT)
    assert engine.tier.loading(prompt)
    engine.cache.flush()
    server.answers.set()
    engine.wait(lambda: not engine.tier.loading(prompt))
    assert engine.totals["unused_lookups"] == 1
    assert len(engine.cache.free) == 63
