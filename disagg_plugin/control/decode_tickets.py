"""The tickets that a decode engine has out: what was offered to whom, and what its worker ranks are told of it. No I/O.

``decode_side`` makes them and follows them, ``repair`` takes them from one worker to another or gives them up.
"""

import time
from collections import Counter
from collections.abc import Callable

from disagg_plugin.control.decode_port import DecodePort, OfferCall, PromptView
from disagg_plugin.control.decode_transfer import Transfer
from disagg_plugin.kv.commands import AbandonReceive, Command, OpenReceive
from disagg_plugin.kv.lifecycle import OVER, Event, advance


class Tickets:
    """Offloaded requests of one scheduler process; all calls from its thread.

    Attributes:
        by_request: Those that the engine, or a rank, may still speak of.
        by_transfer: Those that a worker may still speak of, each under its newest number.
        free_tokens: Room in the engine's KV cache, when it asked last.
    """

    def __init__(self, port: DecodePort, clock: Callable[[], float] = time.monotonic, *, free_tokens: int = 0) -> None:
        self._port = port
        self._clock = clock
        self._commands: list[Command] = []
        self.by_request: dict[str, Transfer] = {}
        self.by_transfer: dict[bytes, Transfer] = {}
        self.free_tokens = free_tokens
        self.totals: Counter[str] = Counter()

    @property
    def open(self) -> list[Transfer]:
        """Those that can still land."""
        return [transfer for transfer in list(self.by_request.values()) if transfer.state not in OVER]

    def promised_tokens(self, *, without: Transfer | None = None) -> int:
        """KV that all of them will hold here, or hold."""
        return sum([t.promised_tokens for t in self.by_request.values() if t is not without])

    def offer(self, transfer: Transfer, prompt: PromptView, workers: tuple[str, ...]) -> None:
        """Offer it to ``workers``, in this order, under its present number."""
        transfer.attempted_s = self._clock()
        self.by_request[transfer.request_id] = self.by_transfer[transfer.transfer_id] = transfer
        self._port.offer(
            OfferCall(
                transfer_id=transfer.transfer_id,
                nonce=transfer.nonce,
                workers=workers,
                token_ids=prompt.token_ids,
                cached_tokens=transfer.cached_tokens,
                http_fields=prompt.http_fields,
                http_headers=prompt.http_headers,
                priority=prompt.priority,
                post=prompt.route is None,
                held=prompt.route is not None and bool(prompt.route.held),
                adapter=prompt.adapter,
                under=(prompt.lora, prompt.cache_salt) if prompt.route is not None and prompt.route.held else (),
            )
        )

    def tell(self, command: Command) -> None:
        """For the ranks, with the engine's next step."""
        self._commands.append(command)

    def take_commands(self) -> list[Command]:
        """All that was to be told since the last step."""
        commands, self._commands = self._commands, []
        return commands

    def open_ranks(self, transfer: Transfer, block_ids: tuple[int, ...]) -> None:
        """Tell the ranks what comes, and from whom."""
        transfer.command = OpenReceive(
            request_id=transfer.request_id,
            transfer_id=transfer.transfer_id,
            nonce=transfer.nonce,
            peer=transfer.peer,
            first_token=transfer.first_token,
            end_token=transfer.end_token,
            block_ids=block_ids,
        )
        self.tell(transfer.command)

    def leave_to_the_engine(self, transfer: Transfer) -> None:
        """The ranks report it as it is; the engine computes what is missing, without asking again."""
        self.tell(AbandonReceive(transfer.request_id, transfer.failure))

    def say_ready(self, transfer: Transfer) -> None:
        """The blocks are there: its worker may send."""
        transfer.state = advance(transfer.state, Event.READY)
        self._port.ready(transfer.transfer_id, transfer.peer, transfer.first_token, transfer.end_token)

    def forget(self, transfer: Transfer) -> None:
        """Nobody asks about it any more."""
        self.by_request.pop(transfer.request_id, None)
        self.by_transfer.pop(transfer.transfer_id, None)
