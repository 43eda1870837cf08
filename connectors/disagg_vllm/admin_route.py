"""The admin route in vLLM's API servers; these guard their own paths only, so the route asks for the key."""

import os

from disagg_plugin.admission.gate import Gate
from disagg_plugin.config import DisaggSettings
from disagg_plugin.control.leaving import LeavingWord
from disagg_plugin.meeting_folder import make_meeting_folder, meeting_folder
from disagg_plugin.observability.admin_route import AdminPaths, App, Scope
from disagg_plugin.observability.frontend import Frontend

MIDDLEWARE = "disagg_vllm.admin_route.AdminRoute"


def wanted_middleware(settings: DisaggSettings) -> tuple[str, ...]:
    """What belongs under vLLM's ``--middleware``; asked in the process that starts all others."""
    if not settings.observability.admin_route:
        return ()
    if settings.role != "decode":
        make_meeting_folder()  # the scheduler processes of a prefill engine hear of draining there
    return (MIDDLEWARE,)


class AdminRoute(AdminPaths):
    """vLLM makes it by its name."""

    def __init__(self, app: App) -> None:
        super().__init__(app, figures=lambda: _frontend(), gate=lambda: _gate(), word=word, keys=_keys)


def word() -> LeavingWord | None:
    """That this engine is to leave; None where nobody would say so, or nobody would hear it."""
    folder = meeting_folder()
    return LeavingWord(folder) if folder is not None else None


def _frontend() -> Frontend | None:
    from disagg_vllm.stats import frontend

    return frontend()


def _gate() -> Gate | None:
    from disagg_vllm.admission import gate

    return gate()


def _keys(scope: Scope) -> list[str]:
    state = getattr(scope.get("app"), "state", None)
    keys = getattr(getattr(state, "args", None), "api_key", None) or os.environ.get("VLLM_API_KEY")
    return [key for key in ([keys] if isinstance(keys, str) else list(keys or ())) if key]
