"""The offload call: the prompt's token ids over a prefill engine's stock HTTP API, and nothing secret with them."""

import os
from collections.abc import Sequence

import aiohttp
import msgspec

from disagg_plugin.control.worker_directory import WorkerAddress
from disagg_plugin.errors import PeerRefused

PARAMS_KEY = "disagg"


class CompletionsDialect:
    """vLLM: ``/v1/completions`` takes token ids verbatim and is always enabled."""

    path = "/v1/completions"

    def body(
        self, *, model: str, token_ids: Sequence[int], transfer_id: bytes, fields: Sequence[tuple[str, object]]
    ) -> bytes:
        """The request body. One output token: prefill is all that is wanted; sampling is decode's business."""
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
    session: aiohttp.ClientSession, worker: WorkerAddress, dialect: CompletionsDialect, body: bytes
) -> None:
    """Post the prompt and wait for the prefill to end; cancelling the task closes the connection (stock abort).

    Raises:
        PeerRefused: The engine answered with an error status; the message is a word for counters.
        aiohttp.ClientError, OSError: It could not be reached, or went away.
    """
    headers = {"Content-Type": "application/json"}
    if worker.api_key_env and (key := os.environ.get(worker.api_key_env)):
        headers["Authorization"] = f"Bearer {key}"
    url = worker.url.rstrip("/") + dialect.path
    async with session.post(url, data=body, headers=headers, server_hostname=worker.tls_name) as response:
        await response.read()
        if response.status != 200:
            raise PeerRefused(f"http_{response.status}")
