"""The classical flow over real loopback sockets: D connects to whom a request names, if it may, and fetches."""

from collections.abc import Iterator

import pytest
from unit.control.test_service import FACTS, eventually, free_port

from disagg_plugin.config import load_settings
from disagg_plugin.control.decode_port import Claim, NotYet, PrefillLocally, PromptView, Route
from disagg_plugin.control.decode_side import DecodeSide
from disagg_plugin.control.events import Held
from disagg_plugin.control.prefill_side import PrefillSide
from disagg_plugin.control.router_flow import HandedOver
from disagg_plugin.control.service import ControlService
from disagg_plugin.kv.commands import Command, DropSend, OpenSend

PROMPT = tuple(range(1_000))
CHANNEL = {"heartbeat_s": 0.1, "peer_timeout_s": 1.0}


class RoutedPair:
    """A prefill engine, and a decode engine whose settings do not name it."""

    def __init__(self) -> None:
        self.port = free_port()
        p_settings = load_settings({"role": "prefill", "side_channel": {"port": self.port, **CHANNEL}})
        allowed = {"allowed_hosts": [f"127.0.0.1:{self.port}"]}
        d_settings = load_settings({"role": "decode", "side_channel": {"port": 0, **CHANNEL}, "router": allowed})
        self.p_service = ControlService(p_settings, FACTS, snapshot=dict)
        self.d_service = ControlService(d_settings, FACTS, snapshot=dict)
        self.p_service.start()
        self.d_service.start()
        assert self.p_service.prefill is not None
        assert self.d_service.decode is not None
        self.workers = self.d_service.decode
        self.prefill = PrefillSide(p_settings, self.p_service.prefill, ranks=1, kv_capacity_tokens=10_000)
        self.decode = DecodeSide(d_settings, self.workers, engine="d", kv_capacity_tokens=10_000)

    def hold(self) -> bytes:
        self.prefill.hold("p-1", Held(PROMPT, ("", "salt")))
        self.prefill.scheduled("p-1", 1_000, [1])
        self.prefill.step()
        assert self.prefill.finished("p-1", completed=True)
        held = self.prefill.held_as("p-1")
        assert held is not None
        return held

    def handed(self, transfer_id: bytes) -> HandedOver:
        return HandedOver(transfer_id, self.p_service.engine, "127.0.0.1", self.port)

    def prompt(self, transfer_id: bytes, tokens: tuple[int, ...] = PROMPT, salt: str = "salt") -> PromptView:
        worker = self.workers.holder(self.handed(transfer_id))
        assert worker is not None
        return PromptView("r1", tokens, cache_salt=salt, route=Route(worker, held=transfer_id))

    def match(self, prompt: PromptView) -> object:
        return self.decode.match(prompt, 0, free_tokens=10_000)

    def close(self) -> None:
        self.d_service.close()
        self.p_service.close()


@pytest.fixture
def pair() -> Iterator[RoutedPair]:
    made = RoutedPair()
    yield made
    made.close()


def test_d_connects_to_an_allowed_host_and_p_sends(pair: RoutedPair) -> None:
    prompt = pair.prompt(pair.hold())
    assert pair.match(prompt) == NotYet()
    eventually(lambda: isinstance(pair.match(prompt), Claim))
    pair.decode.allocated("r1", (1, 2), 999)
    commands: list[Command] = []

    def is_open() -> bool:
        commands.extend(pair.prefill.step())
        return any(isinstance(c, OpenSend) for c in commands)

    eventually(is_open)
    (send,) = [c for c in commands if isinstance(c, OpenSend)]
    assert (send.first_token, send.end_token) == (0, 999)


def test_a_worker_that_only_a_router_knows_gets_no_prompts_of_our_own(pair: RoutedPair) -> None:
    prompt = pair.prompt(pair.hold())
    pair.match(prompt)
    eventually(lambda: isinstance(pair.match(prompt), Claim))
    (row,) = pair.workers.workers()
    assert not row.healthy, "there is no HTTP address to post a prompt to"
    assert pair.match(PromptView("r2", PROMPT)) == PrefillLocally("no_healthy_worker")


def test_a_lease_is_renewed_as_long_as_d_has_no_room(pair: RoutedPair) -> None:
    prompt = pair.prompt(pair.hold())
    pair.match(prompt)
    eventually(lambda: isinstance(pair.match(prompt), Claim))
    pair.prefill.step()
    (ticket,) = pair.prefill._tickets.values()
    until_s = ticket.hold_until_s

    def renewed() -> bool:
        pair.prefill.step()
        return ticket.hold_until_s > until_s + 0.15

    eventually(renewed)


def test_an_abort_on_d_lets_p_go(pair: RoutedPair) -> None:
    prompt = pair.prompt(pair.hold())
    pair.match(prompt)
    eventually(lambda: isinstance(pair.match(prompt), Claim))
    pair.decode.finished("r1")
    eventually(lambda: any(isinstance(command, DropSend) for command in pair.prefill.step()))


@pytest.mark.parametrize(
    ("tokens", "salt"), [((*PROMPT[:-1], 7), "salt"), (PROMPT, "other salt")], ids=["another prompt", "another salt"]
)
def test_p_gives_a_prompts_kv_to_nobody_with_another_one(pair: RoutedPair, tokens: tuple[int, ...], salt: str) -> None:
    prompt = pair.prompt(pair.hold(), tokens, salt)
    pair.match(prompt)
    eventually(lambda: pair.match(prompt) == PrefillLocally("refused_prompt_differs"))


def test_what_p_never_held_is_refused_at_once(pair: RoutedPair) -> None:
    prompt = pair.prompt(b"x" * 16)
    pair.match(prompt)
    eventually(lambda: pair.match(prompt) == PrefillLocally("refused_hold_expired"))


def test_a_host_that_is_allowed_and_not_there_costs_a_moment(pair: RoutedPair) -> None:
    pair.p_service.close()
    prompt = pair.prompt(b"x" * 16)
    pair.match(prompt)
    eventually(lambda: pair.match(prompt) == PrefillLocally("holder_unreachable"))


@pytest.mark.parametrize(("host", "port"), [("10.1.2.3", 5600), ("127.0.0.1", 9), ("localhost", 80)])
def test_no_other_host_is_connected_to(pair: RoutedPair, host: str, port: int) -> None:
    assert pair.workers.holder(HandedOver(b"x" * 16, "", host, port)) is None
    assert pair.workers.workers() == ()
