"""The offload call: the prompt's token ids over a prefill engine's stock HTTP API, and nothing secret with them.

Each kind of engine has its dialect. Both carry the transfer id: vLLM's whole, in ``kv_transfer_params``; SGLang's as
a *room*, the 63-bit number by which stock SGLang routers join two requests. A room is the beginning of a transfer id.
"""

import os
import secrets
from array import array
from collections.abc import Sequence
from typing import Protocol

import aiohttp
import msgspec
import xxhash

from disagg_plugin.control.messages import EngineKind
from disagg_plugin.control.worker_directory import WorkerAddress
from disagg_plugin.errors import PeerRefused

PARAMS_KEY = "disagg"
ROOM_BITS = 63


class Dialect(Protocol):
    """How one kind of engine wants a prompt posted."""

    path: str

    def body(
        self, *, model: str, token_ids: Sequence[int], transfer_id: bytes, fields: Sequence[tuple[str, object]]
    ) -> bytes:
        """The request body. One output token: prefill is all that is wanted; sampling is decode's business.

        Raises:
            PeerRefused: The dialect has no word for one of ``fields``.
        """
        ...


class CompletionsDialect:
    """vLLM: ``/v1/completions`` takes token ids verbatim and is always enabled."""

    path = "/v1/completions"

    def body(
        self, *, model: str, token_ids: Sequence[int], transfer_id: bytes, fields: Sequence[tuple[str, object]]
    ) -> bytes:
        """See ``Dialect``."""
        return msgspec.json.encode(
            {
                "model": model,
                "prompt": list(token_ids),
                "max_tokens": 1,
                "temperature": 0,
                "stream": False,
                "kv_transfer_params": {PARAMS_KEY: {"transfer_id": transfer_id.hex()}},
                **dict(fields),
            }
        )


class GenerateDialect:
    """SGLang: ``/generate`` takes token ids verbatim; the bootstrap fields mark a request as disaggregated."""

    path = "/generate"
    _KNOWN = frozenset({"cache_salt", "priority"})

    def body(
        self, *, model: str, token_ids: Sequence[int], transfer_id: bytes, fields: Sequence[tuple[str, object]]
    ) -> bytes:
        """See ``Dialect``."""
        if unknown := {name for name, _ in fields} - self._KNOWN:
            raise PeerRefused(f"cannot_carry_{min(unknown)}")
        return msgspec.json.encode(
            {
                "input_ids": list(token_ids),
                "sampling_params": {"max_new_tokens": 1, "temperature": 0},
                "stream": False,
                "bootstrap_host": PARAMS_KEY,  # never used as an address: tickets travel on the side channel
                "bootstrap_room": room_of(transfer_id),
                **dict(fields),
            }
        )


DIALECTS: dict[EngineKind, Dialect] = {"vllm": CompletionsDialect(), "sglang": GenerateDialect()}


def room_of(transfer_id: bytes) -> int:
    """The number under which SGLang's HTTP API knows a transfer."""
    return int.from_bytes(transfer_id[:8], "big") & ((1 << ROOM_BITS) - 1)


def transfer_id_in(room: int) -> bytes:
    """A new transfer id for a room that somebody else (a router) chose."""
    return (room & ((1 << ROOM_BITS) - 1)).to_bytes(8, "big") + secrets.token_bytes(8)


def prompt_digest(token_ids: Sequence[int], *under: str) -> int:
    """Equal for equal prompts in every process; never 0, which means "not given".

    Args:
        under: What else the KV depends on, or may be reached by: adapter, cache salt.
    """
    digest = xxhash.xxh3_64(array("q", token_ids).tobytes())
    for text in under:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.intdigest() or 1


def transfer_id_of(params: object) -> bytes | None:
    """The transfer id in a request's ``kv_transfer_params``, or None if there is none that could be ours."""
    if not isinstance(params, dict) or not isinstance(ours := params.get(PARAMS_KEY), dict):
        return None
    text = ours.get("transfer_id")
    if not isinstance(text, str) or len(text) != 32:
        return None
    try:
        return bytes.fromhex(text)
    except ValueError:
        return None


async def post_prompt(
    session: aiohttp.ClientSession,
    worker: WorkerAddress,
    dialect: Dialect,
    body: bytes,
    more_headers: Sequence[tuple[str, str]] = (),
) -> None:
    """Post the prompt and wait for the prefill to end; cancelling the task closes the connection (stock abort).

    Raises:
        PeerRefused: The engine answered with an error status; the message is a word for counters.
        aiohttp.ClientError, OSError: It could not be reached, or went away.
    """
    headers = {**dict(more_headers), "Content-Type": "application/json"}
    if worker.api_key_env and (key := os.environ.get(worker.api_key_env)):
        headers["Authorization"] = f"Bearer {key}"
    url = worker.url.rstrip("/") + dialect.path
    async with session.post(url, data=body, headers=headers, server_hostname=worker.tls_name) as response:
        await response.read()
        if response.status != 200:
            raise PeerRefused(f"http_{response.status}")
