"""The admin route: there only when asked for, guarded by the server's key, and in nobody else's way."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from disagg_plugin.config import DisaggSettings
from disagg_plugin.control.leaving import LeavingWord
from disagg_plugin.meeting_folder import VARIABLE
from disagg_vllm import admin_route
from disagg_vllm.admin_route import MIDDLEWARE, AdminRoute, wanted_middleware


def get(path: str, *, method: str = "GET", keys: list[str] | None = None, token: str = "") -> tuple[int, Any]:
    """Status and JSON of one request; (0, None): it was passed on."""
    sent: list[dict[str, Any]] = []

    async def app(_scope: Any, _receive: Any, _send: Any) -> None: ...

    async def receive() -> dict[str, Any]:
        return {}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(b"authorization", token.encode())] if token else [],
        "app": SimpleNamespace(state=SimpleNamespace(args=SimpleNamespace(api_key=keys))),
    }
    asyncio.run(AdminRoute(app)(scope, receive, send))
    return (sent[0]["status"], json.loads(sent[1]["body"])) if sent else (0, None)


@pytest.fixture(autouse=True)
def figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(admin_route, "_frontend", lambda: SimpleNamespace(status=lambda: {"classes": {}}))


def test_the_figures_are_served_as_json():
    assert get("/disagg/status") == (200, {"classes": {}})


@pytest.mark.parametrize("path", ["/v1/completions", "/metrics", "/disagg", "/disagg/status/x"])
def test_every_other_path_is_passed_on(path: str):
    assert get(path) == (0, None)


@pytest.mark.parametrize(
    ("token", "status"),
    [("", 401), ("Bearer wrong", 401), ("Basic secret", 401), ("Bearer secret", 200), ("bearer other", 200)],
)
def test_a_server_with_keys_asks_for_one(token: str, status: int):
    assert get("/disagg/status", keys=["secret", "other"], token=token)[0] == status


def test_a_key_from_the_environment_counts_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert get("/disagg/status")[0] == 401
    assert get("/disagg/status", token="Bearer secret")[0] == 200


@pytest.mark.parametrize(("path", "method"), [("/disagg/status", "POST"), ("/disagg/drain", "GET")])
def test_other_methods_are_named_as_wrong(path: str, method: str):
    status, body = get(path, method=method)
    assert status == 405
    assert path in body["error"]


def test_draining_begins_and_ends(monkeypatch: pytest.MonkeyPatch):
    words: list[bool] = []
    monkeypatch.setattr(admin_route, "_gate", lambda: SimpleNamespace(drain=words.append))
    assert get("/disagg/drain", method="POST", keys=["secret"])[0] == 401
    assert get("/disagg/drain", method="POST") == (200, {"draining": True})
    assert get("/disagg/drain", method="DELETE") == (200, {"draining": False})
    assert words == [True, False]


def test_without_early_rejection_nothing_can_be_drained(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(admin_route, "_gate", lambda: None)
    status, body = get("/disagg/drain", method="POST")
    assert status == 503
    assert "enable_early_rejection" in body["error"]


def test_a_prefill_engine_hears_of_it_also_without_early_rejection(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(admin_route, "_gate", lambda: None)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    word = LeavingWord(tmp_path)
    assert get("/disagg/drain", method="POST") == (200, {"draining": True})
    assert word.stands
    assert get("/disagg/status") == (200, {"classes": {}, "draining": True})
    assert get("/disagg/drain", method="DELETE") == (200, {"draining": False})
    assert not word.stands


@pytest.mark.parametrize(("role", "meets"), [("prefill", True), ("both", True), ("decode", False)])
def test_only_who_prefills_for_others_has_a_place_to_be_told(role: str, meets: bool, monkeypatch: pytest.MonkeyPatch):
    made: list[bool] = []
    monkeypatch.setattr(admin_route, "make_meeting_folder", lambda: made.append(True))
    wanted_middleware(DisaggSettings.model_validate({"role": role, "observability": {"admin_route": True}}))
    assert bool(made) is meets


def test_before_the_engine_there_are_no_figures(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(admin_route, "_frontend", lambda: None)
    assert get("/disagg/status")[0] == 503


def test_it_is_off_unless_the_user_turns_it_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(admin_route, "make_meeting_folder", lambda: None)
    assert wanted_middleware(DisaggSettings()) == ()
    on = DisaggSettings.model_validate({"observability": {"admin_route": True}})
    assert wanted_middleware(on) == (MIDDLEWARE,)
