"""A vLLM request as the core sees it: what its prompt is, and what of the request must travel with it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from disagg_plugin.control.decode_port import PromptView, Route
from disagg_plugin.control.load_reports import HeldPrompt
from disagg_policies.admission_snapshots import ONLY_OFFLOAD
from disagg_vllm.support import local_only_reason, routing_of

if TYPE_CHECKING:
    from vllm.v1.request import Request


def prompt_view(
    request: "Request", headers: Mapping[str, str], *, local_only: str | None = None, route: Route | None = None
) -> PromptView:
    """The decode role's view.

    Args:
        headers: Go with the offload call.
        local_only: Why it stays, where the request itself does not say so.
        route: Where a router has had it prefilled.
    """
    return PromptView(
        request_id=request.request_id,
        token_ids=request.prompt_token_ids or (),
        local_only=local_only_reason(request) or local_only,
        http_fields=_http_fields(request),
        http_headers=tuple(headers.items()),
        cache_salt=request.cache_salt or "",
        lora=lora_of(request),
        adapter=adapter_of(request),
        priority=request.priority,
        only_offload=routing_of(request) == ONLY_OFFLOAD,
        route=route,
    )


def held_prompt(request: "Request") -> HeldPrompt | None:
    """The prompt as both sides hash it, or None for one that is more than its token ids."""
    if request.prompt_token_ids is None or request.mm_features:
        return None
    return HeldPrompt(request.prompt_token_ids, request.cache_salt or "", lora_of(request))


def lora_of(request: "Request") -> str:
    """The adapter's name, or an empty text."""
    return request.lora_request.lora_name if request.lora_request is not None else ""


def adapter_of(request: "Request") -> str:
    """Where the files of the request's LoRA adapter are; what is no folder of this machine cannot be compared."""
    return str(request.lora_request.lora_path) if request.lora_request is not None else ""


def _http_fields(request: "Request") -> tuple[tuple[str, object], ...]:
    """Everything that shapes the prompt's KV, nothing that only shapes sampling."""
    fields: list[tuple[str, object]] = []
    if request.lora_request is not None:
        fields.append(("model", request.lora_request.lora_name))
    if request.cache_salt:
        fields.append(("cache_salt", request.cache_salt))
    return tuple(fields)
