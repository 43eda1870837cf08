"""One decode side on a bench: the I/O thread's half is a list, time is a number."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from disagg_plugin.config import load_settings
from disagg_plugin.control.decode_port import Claim, NotYet, OfferCall, PromptView
from disagg_plugin.control.decode_side import DecodeSide
from disagg_plugin.control.events import DecodeEvent, PrefillAccepted
from disagg_plugin.control.load import LoadTracker
from disagg_plugin.kv.commands import AddPeer
from disagg_plugin.observability.journal import Journal
from disagg_policies.snapshots import CodecChoices, PrefillModel, WorkerState

LONG = PromptView("r1", tuple(range(1_000)))
ROOM = 100_000
PEER = AddPeer("p:1", 1, (), 0, 8, receives=True)


class FakePort:
    """The I/O thread's side, without threads or sockets."""

    def __init__(self) -> None:
        fresh_s = 1e9  # never suspect
        self.states = [WorkerState("p:1", healthy=True, queued_requests=0, max_prompt_tokens=4_000, reported_s=fresh_s)]
        self.offers: list[OfferCall] = []
        self.sent: list[tuple[str, ...]] = []
        self.hashes: list[Sequence[int]] = []
        self.assumed: PrefillModel | None = None
        self.events: list[DecodeEvent] = []

    def workers(self) -> tuple[WorkerState, ...]:
        return tuple(self.states)

    def offer(self, call: OfferCall) -> None:
        self.offers.append(call)

    def ready(self, transfer_id: bytes, peer: str, first_token: int, end_token: int) -> None:
        self.sent.append(("ready", peer, f"{first_token}-{end_token}"))

    def cancel(self, transfer_id: bytes, peer: str, reason: str) -> None:
        self.sent.append(("cancel", peer, reason))

    def overlap_tokens(self, hashes: Sequence[int]) -> tuple[int, ...]:
        self.hashes.append(hashes)
        return ()

    def failed(self, peer: str, reason: str) -> None:
        self.sent.append(("failed", peer, reason))

    def landed(self, peer: str, *, wire_bytes: int, tokens: int) -> None:
        self.sent.append(("landed", peer, f"{wire_bytes} of {tokens}"))

    def saw_overhead(self, peer: str, *, seconds: float) -> None:
        self.sent.append(("saw_overhead", peer, f"{seconds:.3f}"))

    def assume(self, prefill: PrefillModel) -> None:
        self.assumed = prefill

    def ask_for_codecs(self, policy: Callable[[str, CodecChoices], str]) -> None:
        self.codec_policy = policy

    def drain(self) -> Iterable[DecodeEvent]:
        events, self.events = self.events, []
        return events


class Bench:
    """One decode side with a hand-driven clock."""

    def __init__(self, capacity_tokens: int = 10_000, ranks: int = 1, **settings: Any) -> None:
        self.now = 100.0
        alone = {"shared_prefix_wait_s": 0.0}  # the prompts here are mostly one and the same
        settings["transfer"] = {**alone, **settings.get("transfer", {})}
        self.port = FakePort()
        self.load = LoadTracker(lambda: self.now)
        self.journal = Journal()
        self.side = DecodeSide(
            load_settings({"role": "decode", "policy": {"offload": "threshold"}, **settings}),
            self.port,
            engine="d:1",
            kv_capacity_tokens=capacity_tokens,
            ranks=ranks,
            load=self.load,
            clock=lambda: self.now,
            journal=self.journal,
        )

    def match(self, prompt: PromptView = LONG, cached: int = 0, free: int = ROOM) -> object:
        return self.side.match(prompt, cached, free_tokens=free)

    @property
    def transfer_id(self) -> bytes:
        return self.port.offers[-1].transfer_id

    def accepted(self, eta_s: float = 0.0) -> None:
        self.port.events.append(PrefillAccepted(self.transfer_id, "p:1", eta_s))

    def loading(self, prompt: PromptView = LONG) -> None:
        """Bring a request to the point where its blocks wait for KV."""
        assert self.match(prompt) == NotYet()
        self.accepted()
        claim = self.match(prompt)
        assert isinstance(claim, Claim)
        self.side.allocated(prompt.request_id, (1, 2, 3), claim.tokens)
        self.side.step()
