"""One connection to an LMCache server, through LMCache's own client; every call waits, each with its own deadline.

The engine-driven protocol is used: objects are handed over in host memory, and the server never sees the engine's
pages. A load that arrives late can therefore not be written over pages which belong to another request by then, as it
could where the server copies into them itself.
"""

import pickle
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from disagg_lmcache.kv_chunks import chunk_shape
from disagg_plugin.cache_settings import LMCacheSettings
from disagg_plugin.errors import StoreFailed
from disagg_plugin.kv.geometry import KVGeometry
from disagg_plugin.lmcache_check import unreachable_reason

ANSWER_S = 1.0  # that the server may take to say that a look-up took too long


class Client(Protocol):
    """What ``PrefixStore`` needs of a connection; ``session`` names one prompt's look-up, or its stores.

    Every call may raise ``StoreFailed``.
    """

    chunk_tokens: int

    def look_up(self, session: str, tokens: Sequence[int], salt: str, within_s: float) -> int | None:
        """How many of the tokens the server has, and keeps for us until ``fetch`` or ``release``; None: too late."""
        ...

    def fetch(self, session: str, tokens: Sequence[int], salt: str, start: int, end: int) -> list[torch.Tensor]:
        """The objects of tokens ``[start, end)``, in private memory; they are not kept for us any more."""
        ...

    def release(self, session: str, tokens: Sequence[int], salt: str, start: int, end: int) -> None:
        """Tokens ``[start, end)`` that were found are not fetched; does not wait."""
        ...

    def put(self, session: str, tokens: Sequence[int], salt: str, start: int, chunk: torch.Tensor) -> bool:
        """Store the last tokens of these, from ``start`` on; False: the server has no room."""
        ...

    def end(self, session: str) -> None:
        """Nothing follows in this session; does not wait."""
        ...

    def ping(self) -> None: ...
    def close(self) -> None: ...


class ServerClient:
    """See ``Client``. Its calls may come from several threads."""

    def __init__(self, settings: LMCacheSettings, namespace: str, geometry: KVGeometry, *, page_tokens: int) -> None:
        """Connect and introduce ourselves.

        Raises:
            StoreFailed: In one line.
        """
        if reason := unreachable_reason(settings):
            raise StoreFailed(reason)
        self._namespace = namespace
        self._timeout_s = settings.request_timeout_s
        self._instance = secrets.randbits(62)
        with _answers("its client"):
            import zmq
            from lmcache.v1.multiprocess.transport.factory import RequestClientFactory

            self._context = zmq.Context()
            self._context.linger = 0  # what a dead server was to be told must not keep us
            self._requests: Any = RequestClientFactory.create(settings.url, context=self._context)
        self._transfer: Any = None
        try:
            self.chunk_tokens = int(self._wait(self._requests.get_chunk_size(), "its chunk size"))
            if self.chunk_tokens <= 0 or self.chunk_tokens % page_tokens:
                raise StoreFailed(
                    f"its --chunk-size {self.chunk_tokens} is no multiple of this engine's pages of {page_tokens}"
                )
            self._register(geometry, page_tokens)
        except StoreFailed:
            self.close()
            raise

    def look_up(self, session: str, tokens: Sequence[int], salt: str, within_s: float) -> int | None:
        end = len(tokens) // self.chunk_tokens * self.chunk_tokens
        key = self._key(session, tokens, salt, 0, end, worker=None)
        until_s = time.monotonic() + within_s
        self._wait(self._requests.lookup(key, 1), "a look-up", within_s)
        left_s = max(until_s - time.monotonic(), 0.0)
        chunks = self._wait(self._requests.wait_prefetch_status(session, left_s), "a look-up", left_s + ANSWER_S)
        return None if chunks is None else min(int(chunks) * self.chunk_tokens, end)

    def fetch(self, session: str, tokens: Sequence[int], salt: str, start: int, end: int) -> list[torch.Tensor]:
        key = self._key(session, tokens, salt, start, end)
        with _answers("a load"):
            found = self._transfer.prepare_retrieve(key, self._instance)
            if found is None:
                raise StoreFailed("it did not deliver what it had found")
            chunks = [_private(chunk) for chunk in found] if self._shares_memory else list(found)
            self._transfer.commit_retrieve(key, self._instance)
        return chunks

    def release(self, session: str, tokens: Sequence[int], salt: str, start: int, end: int) -> None:
        if start < end:
            self._requests.free_lookup_locks(self._key(session, tokens, salt, start, end, worker=None), 1)

    def put(self, session: str, tokens: Sequence[int], salt: str, start: int, chunk: torch.Tensor) -> bool:
        # handed over whole also where memory is shared: a write of ours that came late could not be told from KV
        key = self._key(session, tokens, salt, start, len(tokens))
        data = pickle.dumps([chunk])
        return bool(self._wait(self._requests.commit_store(key, self._instance, data), "a store"))

    def end(self, session: str) -> None:
        self._requests.end_session(session)

    def ping(self) -> None:
        self._wait(self._requests.ping(self._instance), "a heartbeat")

    def close(self) -> None:
        with _answers("its farewell"):
            if self._transfer is not None:
                self._transfer.close()
            self._requests.close()
            self._context.destroy(linger=0)

    def _register(self, geometry: KVGeometry, page_tokens: int) -> None:
        from lmcache.v1.distributed.api import MemoryLayoutDesc
        from lmcache.v1.multiprocess.custom_types import RegisterEngineDrivenContextPayload
        from lmcache.v1.multiprocess.transfer_context import (
            EngineDrivenContextMetadata,
            EngineDrivenContextShm,
            create_engine_driven_context,
        )

        payload = RegisterEngineDrivenContextPayload(
            instance_id=self._instance,
            model_name=self._namespace,
            world_size=1,
            block_size=page_tokens,
            num_layers=geometry.layers,
            hidden_dim_size=geometry.kv_heads * geometry.head_dim,
            dtype_str=geometry.dtype,
            use_mla=geometry.sides == 1,
            num_physical_slots=self.chunk_tokens,
        )
        answer = self._wait(self._requests.register_kv_cache_engine_driven_context(payload), "its registration")
        shape = torch.Size(chunk_shape(geometry, self.chunk_tokens))
        layout = MemoryLayoutDesc(shapes=[shape], dtypes=[getattr(torch, geometry.dtype)])
        self._transfer = create_engine_driven_context(
            EngineDrivenContextMetadata(layout, page_tokens, geometry.sides == 1),
            self._requests,
            self._timeout_s,
            shm_name=answer.shm_name,
            pool_size=answer.pool_size,
        )
        self._shares_memory = isinstance(self._transfer, EngineDrivenContextShm)

    def _key(
        self, session: str, tokens: Sequence[int], salt: str, start: int, end: int, *, worker: int | None = 0
    ) -> Any:
        from lmcache.v1.multiprocess.custom_types import IPCCacheServerKey

        return IPCCacheServerKey(
            model_name=self._namespace,
            world_size=1,
            worker_id=worker,
            token_ids=tuple(tokens),
            start=start,
            end=end,
            request_id=session,
            cache_salt=salt,
            num_kv_readers=1,
        )

    def _wait(self, future: Any, what: str, within_s: float | None = None) -> Any:
        with _answers(what):
            return future.result(timeout=self._timeout_s if within_s is None else within_s)


@contextmanager
def _answers(what: str) -> Iterator[None]:
    try:
        yield
    except StoreFailed:
        raise
    except TimeoutError as error:
        raise StoreFailed(f"no answer to {what}") from error
    except Exception as error:  # LMCache's errors have no common class, and none of them may end a thread of ours
        raise StoreFailed(f"{what} failed: {type(error).__name__}: {error}") from error


def _bytes_of(tensor: torch.Tensor) -> Any:
    """Its memory; numpy copies it in one thread, torch would open a second team beside the engine's."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _private(shared: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(_bytes_of(shared).copy()).view(shared.dtype).view(shared.shape)
