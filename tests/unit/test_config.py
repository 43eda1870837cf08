"""Settings are read once; a mistake is one line that names file, field and value, and what is allowed."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from disagg_plugin.config import (
    DisaggSettings,
    PrefillWorkerSettings,
    is_loopback,
    load_settings,
    not_active_yet,
    settings_json_schema,
    warnings,
)
from disagg_plugin.errors import ConfigError
from disagg_plugin.settings_file import merge

WORKER = {"url": "http://10.0.0.5:8000"}
NEAR = {"url": "http://127.0.0.1:8001", "side_channel": "127.0.0.1:5601"}
OPEN = {"host": "0.0.0.0", "keys_dir": "/keys"}


def line_for(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(values)
    return str(caught.value)


def test_no_settings_at_all_are_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    assert load_settings({}) == DisaggSettings() == load_settings(tmp_path / "empty.yaml")


@pytest.mark.parametrize("name", ["disagg.yaml", "disagg.yml", "disagg.json"])
def test_a_file_and_a_mapping_with_the_same_content_mean_the_same(tmp_path: Path, name: str) -> None:
    values = {"role": "decode", "prefill_workers": [WORKER], "transfer": {"codec": "int8"}}
    text = json.dumps(values) if name.endswith(".json") else yaml.safe_dump(values)
    (tmp_path / name).write_text(text)
    assert load_settings(tmp_path / name) == load_settings(values)


def test_the_effective_settings_can_be_read_back() -> None:
    settings = load_settings({"role": "decode", "prefill_workers": [WORKER, NEAR], "side_channel": OPEN})
    assert load_settings(yaml.safe_load(yaml.safe_dump(settings.model_dump(mode="json")))) == settings


@pytest.mark.parametrize(
    ("values", "line"),
    [
        pytest.param(
            {"transfer": {"slot_byte": 1}},
            "settings: transfer.slot_byte: unknown field; did you mean slot_bytes?",
            id="misspelt field",
        ),
        pytest.param(
            {"prefill_workers": [WORKER, {"uri": "http://a:1"}]},
            "settings: prefill_workers.1.url: missing: Base URL of its OpenAI HTTP API, for example "
            "http://10.0.0.5:8000. (and 1 more)",
            id="missing field",
        ),
        pytest.param(
            {"prefill_workers": [{**WORKER, "api_key": "secret"}]},
            "settings: prefill_workers.0.api_key: unknown field; did you mean api_key_env?",
            id="misspelt field in a list, its value not shown",
        ),
        pytest.param(
            {"codec": "int8"}, "settings: codec: unknown field; it stands under policy and transfer", id="wrong section"
        ),
        pytest.param(
            {"nixl": {"zzz": 1}},
            "settings: nixl.zzz: unknown field; known here: backend, net_devices, progress_thread",
            id="nothing like it",
        ),
        pytest.param(
            {"transfer": {"codec": "int4"}},
            "settings: transfer.codec = 'int4': must be 'auto', 'raw', 'int8' or 'int8c'",
            id="unknown codec",
        ),
        pytest.param(
            {"transfer": {"slot_bytes": 100}},
            "settings: transfer.slot_bytes = 100: must be greater than or equal to 4096",
            id="slot too small",
        ),
        pytest.param(
            {"transfer": {"slot_bytes": "16MiB"}},
            "settings: transfer.slot_bytes = '16MiB': must be a valid integer, unable to parse string as an integer",
            id="wrong type",
        ),
        pytest.param(
            {"transfer": {"deadline_s": float("inf")}},
            "settings: transfer.deadline_s = inf: must be a finite number",
            id="endless deadline",
        ),
        pytest.param(
            {"transfer": {"ring_max_bytes": 1 << 20}},
            "settings: transfer: ring_max_bytes 1048576 is less than one peer's region, slot_bytes 16777216 * "
            "region_slots 8 = 134217728: raise the first or lower the others",
            id="ring too small for a region",
        ),
        pytest.param(
            {"side_channel": {"host": "0.0.0.0"}},
            "settings: side_channel: host 0.0.0.0 can be reached by other machines: "
            "set keys_dir (`disagg keygen DIR`), or host to 127.0.0.1, or insecure to true",
            id="exposed without keys",
        ),
        pytest.param(
            {"side_channel": {"heartbeat_s": 3}},
            "settings: side_channel: peer_timeout_s 3.0 is not above heartbeat_s 3.0: "
            "every peer would be lost between two heartbeats",
            id="peers lost between heartbeats",
        ),
        pytest.param(
            {"prefill_workers": [WORKER, NEAR, {"url": "http://10.0.0.5:8000/"}]},
            "settings: prefill_workers.0 and .2 are the same, http://10.0.0.5:8000: remove one",
            id="worker twice",
        ),
        pytest.param(
            {"prefill_workers": [WORKER, {"url": "http://10.0.0.5:8001"}]},
            "settings: prefill_workers.0 and .1 have the same side channel, 10.0.0.5:5600: "
            "set prefill_workers.1.side_channel",
            id="two workers on one host",
        ),
        pytest.param(
            {"prefill_workers": [{"url": "http://localhost:8001"}]},
            "settings: prefill_workers.0 has localhost:5600 as its side channel, which is this engine's own: "
            "set prefill_workers.0.side_channel, or another side_channel.port",
            id="worker is ourselves",
        ),
        pytest.param(
            {"prefill_workers": [WORKER], "side_channel": {"port": 0}},
            "settings: prefill_workers.0 needs its own side_channel, host:port, as side_channel.port is 0 (any)",
            id="no default port",
        ),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_change(values: dict[str, Any], line: str) -> None:
    assert line_for(values) == line


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        pytest.param("10.0.0.5:8000", "must be http://HOST:PORT", id="no scheme"),
        pytest.param("tcp://10.0.0.5:8000", "must be http://HOST:PORT", id="other scheme"),
        pytest.param("http://:8000", "must be http://HOST:PORT", id="no host"),
        pytest.param("http://10.0.0.5:0", "port must be 1 to 65535", id="port zero"),
        pytest.param("http://10.0.0.5:99999", "0-65535", id="port too large"),
        pytest.param("http://key@10.0.0.5:8000", "api_key_env", id="user"),
        pytest.param("http://10.0.0.5:8000/v1/", "leave out /v1", id="not the base"),
    ],
)
def test_a_worker_has_a_base_url(url: str, problem: str) -> None:
    line = line_for({"prefill_workers": [{"url": url}]})
    assert line.startswith(f"settings: prefill_workers.0.url = {url!r}: ")
    assert problem in line.lower() or problem in line


@pytest.mark.parametrize("address", ["10.0.0.5", ":5600", "10.0.0.5:0", "10.0.0.5:65536", "tcp://10.0.0.5:5600", "h:²"])
def test_a_workers_side_channel_is_host_and_port(address: str) -> None:
    line = line_for({"prefill_workers": [{**WORKER, "side_channel": address}]})
    assert line == f"settings: prefill_workers.0.side_channel = {address!r}: must be host:port, port 1 to 65535"


@pytest.mark.parametrize(
    ("short", "full"),
    [
        pytest.param("http://10.0.0.5:8000", {"url": "http://10.0.0.5:8000"}, id="a URL"),
        pytest.param("prefill.svc:8000", {"url": "http://prefill.svc:8000", "discover": "dns"}, id="a name to look up"),
    ],
)
def test_a_worker_may_be_one_text(short: str, full: dict[str, str]) -> None:
    assert PrefillWorkerSettings.model_validate(short) == PrefillWorkerSettings.model_validate(full)


@pytest.mark.parametrize(
    ("worker", "line"),
    [
        pytest.param(
            "10.0.0.5:8000",
            "settings: prefill_workers.0 = '10.0.0.5:8000': discover: dns needs a name to look up, "
            "10.0.0.5 is an address: leave discover out",
            id="an address has no addresses",
        ),
        pytest.param(
            {"url": "http://p.svc:8000", "side_channel": "q.svc:5600", "discover": "dns"},
            "settings: prefill_workers.0: side_channel q.svc:5600 must have the host of url, p.svc: with discover: dns "
            "both are looked up together",
            id="two names",
        ),
    ],
)
def test_only_a_name_can_be_looked_up(worker: object, line: str) -> None:
    assert line_for({"prefill_workers": [worker]}) == line


@pytest.mark.parametrize(
    ("worker", "address"),
    [
        pytest.param(WORKER, ("10.0.0.5", 5600), id="the URL's host, our port"),
        pytest.param({"url": "https://p.example"}, ("p.example", 5600), id="URL without a port"),
        pytest.param({**WORKER, "side_channel": "10.1.0.5:7"}, ("10.1.0.5", 7), id="its own"),
        pytest.param({**WORKER, "side_channel": "[fd00::5]:7"}, ("fd00::5", 7), id="IPv6"),
        pytest.param({"url": "http://[fd00::5]:8000"}, ("fd00::5", 5600), id="IPv6 in the URL"),
    ],
)
def test_where_a_workers_side_channel_is(worker: dict[str, str], address: tuple[str, int]) -> None:
    assert PrefillWorkerSettings.model_validate(worker).side_channel_address(5600) == address


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        pytest.param("a.yaml", b"role: [", "line 1: ", id="broken YAML"),
        pytest.param("a.yaml", b"role: decode\nrole: both\n", "line 2: role twice", id="key twice"),
        pytest.param("a.json", b'{"role": }', "line 1: Expecting value", id="broken JSON"),
        pytest.param("a.yaml", b"- role\n", "holds a list: must hold fields and values", id="a list"),
        pytest.param("a.yaml", b"role: \xff\n", "not UTF-8 text", id="not text"),
        pytest.param(
            "a.yaml", b"role: no-such\n", "role = 'no-such': must be 'prefill', 'decode' or 'both'", id="value"
        ),
        pytest.param("a.yaml", b"role: !!python/name:os.system\n", "could not determine a constructor", id="YAML tag"),
        pytest.param("missing.yaml", None, "cannot be read: No such file or directory", id="missing"),
    ],
)
def test_a_bad_file_is_named_with_its_problem(tmp_path: Path, name: str, content: bytes | None, problem: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_settings(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert problem in line
    assert "\n" not in line


def test_overrides_win_field_by_field_and_replace_lists(tmp_path: Path) -> None:
    path = tmp_path / "disagg.yaml"
    path.write_text(yaml.safe_dump({"role": "both", "prefill_workers": [WORKER, NEAR], "transfer": {"codec": "int8"}}))
    settings = load_settings(path, {"role": "decode", "prefill_workers": [NEAR], "transfer": {"hold_s": 5}})
    assert settings.role == "decode"
    assert [worker.url for worker in settings.prefill_workers] == [NEAR["url"]]
    assert (settings.transfer.codec, settings.transfer.hold_s) == ("int8", 5.0)


def test_merging_changes_neither_side() -> None:
    base: dict[str, object] = {"a": {"b": 1}, "c": [1]}
    overrides: dict[str, object] = {"a": {"d": 2}, "c": [2]}
    assert merge(base, overrides) == {"a": {"b": 1, "d": 2}, "c": [2]}
    assert base == {"a": {"b": 1}, "c": [1]}
    assert overrides == {"a": {"d": 2}, "c": [2]}


def test_a_bad_override_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    path = tmp_path / "disagg.yaml"
    path.write_text("transfer: {codec: int8}")
    with pytest.raises(ConfigError, match=rf"^settings over {path}: role = 'x'"):
        load_settings(path, {"role": "x"})
    path.write_text("transfer: {codec: x}")
    with pytest.raises(ConfigError, match=rf"^{path}: transfer.codec = 'x'"):
        load_settings(path, {"role": "decode", "transfer": {"hold_s": 1}})


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        pytest.param({}, [], id="defaults"),
        pytest.param({"role": "decode", "prefill_workers": [NEAR]}, [], id="decode with a worker on this host"),
        pytest.param(
            {"role": "decode", "prefill_workers": [WORKER], "side_channel": OPEN}, [], id="decode in a fleet with keys"
        ),
        pytest.param(
            {"role": "decode"},
            ["role decode without prefill_workers: every prompt is prefilled locally"],
            id="decode without workers",
        ),
        pytest.param(
            {"role": "prefill", "prefill_workers": [WORKER]},
            ["role prefill with prefill_workers: they are not used; did you mean role both?"],
            id="prefill with workers",
        ),
        pytest.param(
            {"side_channel": {"host": "10.0.0.6", "insecure": True}},
            ["side_channel.insecure: whoever reaches 10.0.0.6:5600 can take part; set keys_dir instead"],
            id="insecure",
        ),
        pytest.param(
            {"role": "decode", "prefill_workers": [WORKER]},
            [
                "no side_channel.keys_dir: http://10.0.0.5:8000 is another host and will refuse us without keys",
                (
                    "side_channel.host is loopback, so KV travels over lo only, but http://10.0.0.5:8000 is another "
                    "host: set nixl.net_devices or side_channel.host"
                ),
            ],
            id="worker on another host, everything of ours on loopback",
        ),
        pytest.param(
            {"transfer": {"stall_timeout_s": 400}},
            ["transfer.stall_timeout_s is above transfer.deadline_s: it will never be reached"],
            id="deadline before the stall",
        ),
    ],
)
def test_what_is_hardly_meant_is_warned_of(values: dict[str, Any], expected: list[str]) -> None:
    assert warnings(load_settings(values)) == expected


def test_one_file_may_serve_both_roles_of_a_host() -> None:
    shared = {"prefill_workers": [{"url": "http://127.0.0.1:8000"}]}
    assert load_settings(shared, {"role": "prefill"}).role == "prefill"


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        pytest.param(["127.0.0.1", "127.3.2.1", "::1", "localhost"], True, id="loopback"),
        pytest.param(["0.0.0.0", "::", "10.0.0.5", "localhost.example", ""], False, id="all others"),
    ],
)
def test_only_loopback_is_out_of_reach(hosts: list[str], expected: bool) -> None:
    assert [is_loopback(host) for host in hosts] == [expected] * len(hosts)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        DisaggSettings().role = "decode"


def models_in(model: type[BaseModel]) -> list[type[BaseModel]]:
    below = [type(field.default) for field in model.model_fields.values() if isinstance(field.default, BaseModel)]
    return [model, *below, PrefillWorkerSettings]


@pytest.mark.parametrize("model", models_in(DisaggSettings), ids=lambda model: model.__name__)
def test_every_field_is_described(model: type[BaseModel]) -> None:
    assert [name for name, field in model.model_fields.items() if not field.description] == []


def test_the_schema_knows_every_section() -> None:
    assert settings_json_schema()["properties"].keys() == DisaggSettings.model_fields.keys()  # type: ignore[attr-defined]


DYNAMO = Path(__file__).parents[2] / "examples" / "disagg.yaml"


def test_the_form_that_users_of_dynamo_know_is_read_as_it_stands() -> None:
    settings = load_settings(DYNAMO)
    assert settings.model == "llama-70b"
    split = settings.split_policy
    assert (split.prompt_length_threshold, split.enable_hotspot_prevention) == (256, True)
    assert (split.prefix_cache_weight, split.queue_length_weight, split.decode_load_weight) == (10.0, 1.5, 0.5)
    assert settings.cache.min_cache_hit_ratio == 0.75
    prefill, decode = settings.autoscale.prefill, settings.autoscale.decode
    assert (prefill.min_replicas, prefill.max_replicas, decode.min_replicas, decode.max_replicas) == (4, 12, 8, 24)
    assert (prefill.scale_up.queue_length, prefill.scale_up.gpu_utilization) == (8, 80)
    assert (decode.scale_down.queue_length, decode.scale_down.kv_cache_usage) == (4, 30)
    assert settings.qos.enable_early_rejection
    assert settings.qos.low_priority_threshold_ms == 500


def test_what_is_accepted_and_has_no_effect_yet_is_said() -> None:
    sections = [line.split(": ")[1] for line in not_active_yet(load_settings(DYNAMO))]
    assert sections == ["cache.reuse_prefix", "autoscale"]
    assert not_active_yet(DisaggSettings()) == []


def test_a_policy_that_is_not_there_is_refused_when_the_settings_are_read() -> None:
    with pytest.raises(ConfigError, match=r"policy.offload = 'at_night': is not installed; there are latency, thresh"):
        load_settings({"policy": {"offload": "at_night"}})
    assert load_settings({"role": "prefill", "policy": {"offload": "at_night"}}), "it decides nothing there"


def test_scaling_limits_that_would_flap_are_refused() -> None:
    up_and_down = {"scale_up": {"queue_length": 4}, "scale_down": {"queue_length": 4}}
    with pytest.raises(ConfigError, match=r"autoscale.prefill: scale_down.queue_length 4 is not below .* flap"):
        load_settings({"autoscale": {"prefill": up_and_down}})
    with pytest.raises(ConfigError, match=r"min_replicas 3 is above max_replicas 2"):
        load_settings({"autoscale": {"decode": {"min_replicas": 3, "max_replicas": 2}}})
