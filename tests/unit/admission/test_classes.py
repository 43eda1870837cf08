"""Who may say which class a request is of."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from disagg_plugin.admission.classes import HEADER, ClassBook, Standing, UnknownClass
from disagg_plugin.config import load_settings
from disagg_plugin.errors import ConfigError
from disagg_plugin.qos_settings import QosSettings, key_digest

GOLD = {"service_class": "high", "tenant": "acme", "sha256": key_digest("gold-key")}
TIN = {"service_class": "low", "sha256": key_digest("tin-key")}


def book(**settings: Any) -> ClassBook:
    return ClassBook(QosSettings.model_validate(settings))


def bearer(key: str) -> dict[bytes, bytes]:
    return {b"authorization": f"Bearer {key}".encode()}


def names(standing: Standing) -> tuple[str, str | None]:
    return standing.service_class.name, standing.tenant


def test_the_default_classes_are_in_the_engines_order() -> None:
    assert [(c.name, c.priority) for c in book().classes] == [("high", -1), ("normal", 0), ("low", 1)]


def test_the_order_in_the_file_does_not_matter() -> None:
    """YAML and JSON are often written with sorted keys."""
    shuffled = {"high": {"ttft_slo_s": 9}, "low": {"ttft_slo_s": 1}, "normal": {"ttft_slo_s": 5}}
    assert [c.name for c in book(classes=shuffled).classes] == ["high", "normal", "low"]


@pytest.mark.parametrize(
    ("headers", "priority", "expected"),
    [
        pytest.param({}, None, ("normal", None), id="says nothing"),
        pytest.param({}, 0, ("normal", None), id="0 is what the engine takes for nothing"),
        pytest.param({}, 1, ("low", None), id="a class's number"),
        pytest.param({}, 99, ("low", None), id="less urgent than all"),
        pytest.param({}, -99, ("high", None), id="more urgent than all"),
        pytest.param({}, "high", ("high", None), id="by name"),
        pytest.param({HEADER: b"high"}, None, ("normal", None), id="the header is not believed"),
        pytest.param(bearer("gold-key"), None, ("high", "acme"), id="by its key"),
        pytest.param(bearer("gold-key"), 1, ("low", "acme"), id="a key may ask for less"),
        pytest.param(bearer("tin-key"), -1, ("low", TIN["sha256"][:8]), id="but not for more"),
        pytest.param(bearer("unknown"), -1, ("high", None), id="an unknown key is nobody's"),
        pytest.param({b"authorization": b"Basic gold-key"}, None, ("normal", None), id="no bearer"),
    ],
)
def test_standing(headers: dict[bytes, bytes], priority: int | str | None, expected: tuple[str, str | None]) -> None:
    assert names(book(api_keys=[GOLD, TIN]).standing(headers, priority)) == expected


def test_a_trusted_header_goes_before_the_body() -> None:
    trusting = book(trust_priority_header=True, api_keys=[GOLD])
    assert names(trusting.standing({HEADER: b"low"}, -1)) == ("low", None)
    assert names(trusting.standing({HEADER: b"-1"}, None)) == ("high", None)
    assert names(trusting.standing({HEADER: b"low", **bearer("gold-key")}, None)) == ("low", "acme")


@pytest.mark.parametrize(("headers", "priority"), [({HEADER: b"gold"}, None), ({}, "gold")])
def test_an_unknown_class_is_answered_with_the_known_ones(headers: dict[bytes, bytes], priority: str | None) -> None:
    with pytest.raises(UnknownClass, match="unknown class 'gold': there are high, normal, low"):
        book(trust_priority_header=True).standing(headers, priority)


def test_keys_come_from_the_environment_or_a_file_and_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_text("tin-key\n# rotated in May\n")
    monkeypatch.setenv("GOLD_KEY", "gold-key")
    keys = book(
        api_keys=[
            {"service_class": "high", "env": "GOLD_KEY"},
            {"service_class": "low", "file": str(tmp_path / "key")},
        ]
    )
    assert keys.standing(bearer("gold-key"), None).service_class.name == "high"
    assert keys.standing(bearer("tin-key"), None).service_class.name == "low"
    assert "gold-key" not in repr(vars(keys))


@pytest.mark.parametrize("form", [{"env": "NO_SUCH_KEY"}, {"file": "/no/such/key"}])
def test_a_key_that_is_not_there_stops_the_start(form: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"NO_SUCH_KEY holds no key|/no/such/key cannot be read"):
        book(api_keys=[{"service_class": "high", **form}])


SLO = {"ttft_slo_s": 1}
BOTH_WAYS = SLO | {"degrade": ["never_offload", "only_offload"]}
TWICE = {"normal": SLO | {"priority": 2}, "low": SLO | {"priority": 2}}


@pytest.mark.parametrize(
    ("qos", "line"),
    [
        pytest.param({"default_class": "gold"}, "default_class 'gold' is none of the classes: high", id="default"),
        pytest.param({"classes": {"High!": SLO}}, "class 'High!' must be a lower-case word", id="name"),
        pytest.param({"classes": {"normal": SLO | {"degrade": ["faster"]}}}, "'faster' is no step", id="step"),
        pytest.param(
            {"classes": {"normal": BOTH_WAYS}},
            "exclude each other",
            id="both ways",
        ),
        pytest.param(
            {"classes": TWICE},
            "each class needs a priority of its own",
            id="twice the same priority",
        ),
        pytest.param(
            {"api_keys": [{"service_class": "gold", "env": "K"}]},
            "api_keys.0: service_class 'gold' is none",
            id="class of a key",
        ),
        pytest.param({"api_keys": [{"service_class": "low"}]}, "exactly one of sha256, env and file", id="no key"),
        pytest.param(
            {"api_keys": [{"service_class": "low", "sha256": "my secret"}]},
            "64 hexadecimal digits",
            id="the key itself",
        ),
        pytest.param({"classes": {"normal": SLO, "gold": SLO}}, "class gold needs a priority", id="no usual name"),
        pytest.param({"classes": {}}, "at least 1", id="no classes"),
    ],
)
def test_a_mistake_is_one_line(qos: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line) as raised:
        load_settings({"qos": qos})
    assert "\n" not in str(raised.value)
    with pytest.raises(ValidationError):
        QosSettings.model_validate(qos)
