"""The classical flow: a router has a prompt prefilled by one engine, then sends the request to another one.

``kv_transfer_params`` have NixlConnector's names, so that its routers and side-cars work as they are::

    router ──▶ P    do_remote_decode: true
    router ◀── P    do_remote_prefill: true, remote_request_id, remote_engine_id, remote_host, remote_port, ...
    router ──▶ D    the same, untouched

D opens a ticket with P under ``remote_request_id``, a random number; from there on it is an ordinary transfer. Any
client can write these fields. So the other ones only choose among workers that the settings name or allow, blocks and
ranks in them are ignored, and P compares the prompt, adapter and salt that D has with what it holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

TRANSFER_ID_BYTES = 16


@dataclass(frozen=True, slots=True)
class HandedOver:
    """Where a request's prompt was prefilled, as the request says."""

    transfer_id: bytes
    engine: str
    host: str
    port: int


def wants_hold(params: object) -> bool:
    """Whether a request is to be prefilled here and decoded elsewhere."""
    return isinstance(params, dict) and params.get("do_remote_decode") is True


def is_handed_over(params: object) -> bool:
    """Whether a request says that its prompt was prefilled elsewhere."""
    return isinstance(params, dict) and params.get("do_remote_prefill") is True


def handed_over(params: object) -> HandedOver | None:
    """What a request says about where its prompt was prefilled; None if it does not, or makes no sense to us."""
    if not isinstance(params, dict) or not is_handed_over(params):
        return None
    text, host, port = (params.get(name) for name in ("remote_request_id", "remote_host", "remote_port"))
    engine = params.get("remote_engine_id")
    if not isinstance(text, str) or len(text) != 2 * TRANSFER_ID_BYTES:
        return None
    if not isinstance(host, str) or isinstance(port, bool) or not isinstance(port, int) or not 0 < port < 65536:
        return None
    try:
        transfer_id = bytes.fromhex(text)
    except ValueError:
        return None
    if len(transfer_id) != TRANSFER_ID_BYTES:  # fromhex skips blanks
        return None
    return HandedOver(transfer_id, engine if isinstance(engine, str) else "", host, port)


def hand_over_params(
    transfer_id: bytes,
    *,
    engine: str,
    host: str,
    port: int,
    block_ids: Sequence[int],
    tokens: int,
    tensor_parallel: int,
) -> dict[str, object]:
    """What P answers the router. Some routers look for blocks and ranks, so these are there; D uses neither."""
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_block_ids": [list(block_ids)],
        "remote_engine_id": engine,
        "remote_request_id": transfer_id.hex(),
        "remote_host": host,
        "remote_port": port,
        "tp_size": tensor_parallel,
        "dcp_size": 1,
        "pp_size": 1,
        "remote_num_tokens": tokens,
        "remote_blocks_expiry_time": None,
        "transfer_mode": "push",
    }
