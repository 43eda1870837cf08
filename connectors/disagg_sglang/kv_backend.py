"""The prefill role in SGLang: the transfer backend's classes, behind which our tickets and data plane work.

SGLang makes one manager a scheduler, one sender a request, and polls the senders:

    poll() Bootstrapping     no decode engine has offered this room yet, or a prefix is being loaded from LMCache
           WaitingForInput   its ticket is here: SGLang may compute the prompt
           Transferring      everything is computed; pages are still being read
           Success           nothing needs the pages any more: SGLang frees them and answers
           Failed            the prompt was never asked for, or is another one

What stock backends do with pages of the *receiver* (abort, acknowledge, release later) has no counterpart here: nobody
but a decode engine's own scheduler thread writes to its pages.
"""

import logging
import time
from typing import Any

import numpy as np
import numpy.typing as npt
from sglang.srt.disaggregation.base.conn import (
    BaseKVBootstrapServer,
    BaseKVManager,
    BaseKVSender,
    KVArgs,
    KVPoll,
    KVTransferMetric,
)

from disagg_plugin.control.prompt_export import PromptExport
from disagg_plugin.errors import TransferError
from disagg_sglang.support import local_only_reason

logger = logging.getLogger(__name__)


class DisaggKVManager(BaseKVManager):  # type: ignore[misc]  # SGLang is untyped to mypy here
    """What SGLang asks a backend's manager for; the work is in ``PromptExport``."""

    def __init__(
        self, args: KVArgs, disaggregation_mode: Any, server_args: Any, is_mla_backend: bool | None = False
    ) -> None:
        self.kv_args = args
        self.export: PromptExport | None = None  # set once the scheduler is whole

    def register_to_bootstrap(self) -> None:
        """Decode engines find this server by their settings, never by what a request says."""


class DisaggKVSender(BaseKVSender):  # type: ignore[misc]  # SGLang is untyped to mypy here
    """One request of a prefill server.

    Attributes:
        pages, tokens: What stands in the pool so far, from the first token on.
        holding: SGLang must not free the pages yet.
    """

    def __init__(
        self,
        mgr: DisaggKVManager,
        bootstrap_addr: str,
        bootstrap_room: int,
        req_has_disagg_prefill_dp_rank: bool = False,
    ) -> None:
        self.kv_mgr = mgr
        self.bootstrap_room = bootstrap_room
        self.rid = ""
        self.prompt: list[int] = []
        self.reusable = False
        self.cache_salt = ""
        self.priority = 0
        self.pages: tuple[int, ...] = ()
        self.tokens = 0
        self.holding = False
        self._offered = False
        self._failure = ""
        self._since_s = time.monotonic()
        self._early_send_wait_event: Any = None  # SGLang sets it on CUDA: the cached prefix may still be being written

    @property
    def _export(self) -> PromptExport:
        assert self.kv_mgr.export is not None, "a request before the scheduler was whole"
        return self.kv_mgr.export

    def bind(self, req: Any) -> None:
        """SGLang's constructor call says nothing of the request itself."""
        self.rid, self.prompt, self.cache_salt = req.rid, req.origin_input_ids.tolist(), req.cache_salt or ""
        self.priority = req.priority or 0
        self.reusable = local_only_reason(req) is None
        self._export.arrived(self)

    def poll(self) -> int:
        if self._failure:
            return int(KVPoll.Failed)
        if self._export.broken:
            return self._fail("disagg gave up")
        if not self._offered and (waiting := self._wait_for_offer()) is not None:
            return waiting
        if self.tokens == 0 and self._export.loading(self):
            return int(KVPoll.Bootstrapping)
        if self.tokens < len(self.prompt):
            return int(KVPoll.WaitingForInput)
        return int(KVPoll.Transferring if self.holding or self._export.reading(self) else KVPoll.Success)

    def _wait_for_offer(self) -> int | None:
        match self._export.ticket_of(self):
            case True:
                self._offered = True
                return None
            case False:
                return self._fail("the prompt is not the offered one, or its offer was withdrawn")
        if time.monotonic() > self._since_s + self._export.offer_timeout_s:
            return self._fail(f"no decode engine offered it within {self._export.offer_timeout_s:g} s")
        return int(KVPoll.Bootstrapping)

    def _fail(self, why: str) -> int:
        self._failure = why
        self._export.gone(self)
        return int(KVPoll.Failed)

    def init(self, num_kv_indices: int, aux_index: int | None = None) -> None:
        """Nothing: pages are counted as they come, and no metadata row is sent (the decode engine samples itself)."""

    def send(
        self,
        kv_indices: npt.NDArray[np.int32],
        state_indices: list[Any] | None = None,
        num_kv_tokens: int | None = None,
    ) -> None:
        """SGLang computed ``num_kv_tokens`` more tokens; they stand in pages ``kv_indices``."""
        if self._early_send_wait_event is not None:  # untested on a GPU
            self._early_send_wait_event.wait()  # our gather, on this stream, comes after the writes
            self._early_send_wait_event = None
        self.pages += tuple(int(page) for page in kv_indices)
        self.tokens += int(num_kv_tokens or 0)
        self._export.computed(self)

    def get_transfer_metric(self) -> KVTransferMetric:
        return KVTransferMetric()

    def failure_exception(self) -> None:
        raise TransferError(self._failure or "aborted")

    def clear(self) -> None:
        self._export.gone(self)

    def abort(self) -> None:
        self._failure = self._failure or "aborted"
        self._export.gone(self)


class DisaggBootstrapServer(BaseKVBootstrapServer):  # type: ignore[misc]  # SGLang is untyped to mypy here
    """Serves nothing: its port is the number by which stock routers name this server; we have the side channel."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port


CLASSES = {"manager": DisaggKVManager, "sender": DisaggKVSender, "bootstrap_server": DisaggBootstrapServer}
