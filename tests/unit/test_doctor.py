"""``disagg doctor`` says before the start what would go wrong after it."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner
from unit.control.test_service import FACTS, HttpPrefill, free_port

from disagg_plugin import doctor
from disagg_plugin.cli.main import app
from disagg_plugin.config import DisaggSettings, load_settings
from disagg_plugin.control.keys import generate
from disagg_plugin.control.messages import ModelIdentity
from disagg_plugin.control.service import ControlService, EngineFacts
from disagg_plugin.doctor import Finding, Verdict, examine

StartPeer = Callable[..., dict[str, object]]


@pytest.fixture
def peer() -> Iterator[StartPeer]:
    """Start prefill engines' control planes; each as the settings name it."""
    running: list[tuple[ControlService, HttpPrefill]] = []

    def start(facts: EngineFacts = FACTS, role: str = "prefill", inactive: str = "") -> dict[str, object]:
        port, http = free_port(), HttpPrefill()
        settings = load_settings({"role": role, "side_channel": {"port": port}})
        service = ControlService(settings, facts, snapshot=lambda: {"inactive_reason": inactive})
        service.start()
        http.may_answer.set()
        running.append((service, http))
        return {"url": http.url, "side_channel": f"127.0.0.1:{port}"}

    yield start
    for service, http in running:
        service.close()
        http.close()


def settings(*workers: object, **more: object) -> DisaggSettings:
    return load_settings(
        {"role": "decode", "side_channel": {"port": free_port()}, "prefill_workers": list(workers), **more}
    )


def about(check: str, found: list[Finding], verdict: Verdict | None = None) -> list[str]:
    return [f.what for f in found if f.check == check and (verdict is None or f.verdict is verdict)]


def test_this_machine_is_fit_for_the_tests() -> None:
    found = examine(settings())
    assert [f for f in found if f.verdict is Verdict.FAIL] == []
    assert any("UCX" in what and "DRAM" in what for what in about("nixl", found))
    assert about("devices", found, Verdict.OK)[-1] == "UCX_NET_DEVICES has lo"


def test_a_worker_that_answers_and_fits_is_fine(peer: StartPeer) -> None:
    found = examine(settings(peer()))
    assert about("peers", found, Verdict.OK)[-1].endswith("serves tiny on 1 rank(s)")


def test_two_workers_of_two_models_are_told_apart(peer: StartPeer) -> None:
    other = replace(FACTS, model=ModelIdentity("config-a", "weights-b"))
    found = examine(settings(peer(), peer(other)))
    (failure,) = [what for what in about("peers", found, Verdict.FAIL) if "differs" in what]
    assert "weights_digest differs: ours weights-a, theirs weights-b" in failure


def test_workers_are_compared_with_a_running_engine(peer: StartPeer) -> None:
    mine = str(peer(replace(FACTS, model=ModelIdentity("config-b", "weights-a")))["side_channel"])
    found = examine(settings(peer()), engine=mine)
    assert any("config_fingerprint differs" in what for what in about("peers", found, Verdict.FAIL))


@pytest.mark.parametrize(
    ("how", "said"), [({"role": "decode"}, "has role decode"), ({"inactive": "sleep mode is enabled"}, "sleep mode")]
)
def test_a_worker_that_cannot_serve_is_a_failure(peer: StartPeer, how: dict[str, str], said: str) -> None:
    assert any(said in what for what in about("peers", examine(settings(peer(**how))), Verdict.FAIL))


def test_a_worker_that_is_not_there_is_a_failure() -> None:
    nobody = {"url": f"http://127.0.0.1:{free_port()}", "side_channel": f"127.0.0.1:{free_port()}"}
    assert len(about("peers", examine(settings(nobody), timeout_s=1.0), Verdict.FAIL)) >= 1


def test_a_name_that_does_not_resolve_is_a_failure() -> None:
    found = examine(settings("prefill.invalid:8000", side_channel={"host": "0.0.0.0", "insecure": True}))
    assert about("peers", found, Verdict.FAIL) == ["cannot resolve prefill.invalid"]


def test_a_port_that_is_taken_is_a_warning(peer: StartPeer) -> None:
    taken = int(str(peer()["side_channel"]).rpartition(":")[2])
    found = examine(load_settings({"role": "prefill", "side_channel": {"port": taken}}))
    assert about("ports", found, Verdict.WARN)


def test_keys_must_be_there_and_private(tmp_path: Path) -> None:
    keys = {"side_channel": {"port": free_port(), "keys_dir": str(tmp_path / "keys")}}
    assert about("keys", examine(load_settings({"role": "prefill", **keys})), Verdict.FAIL)
    generate(tmp_path / "keys", fleet=True)
    assert about("keys", examine(load_settings({"role": "prefill", **keys})), Verdict.OK)
    (tmp_path / "keys" / "server.key").chmod(0o644)
    assert about("keys", examine(load_settings({"role": "prefill", **keys})), Verdict.FAIL)


@pytest.mark.parametrize("device", ["nosuch0", "nosuch0:1"])
def test_a_device_that_is_not_there_is_a_failure(device: str) -> None:
    assert about("devices", examine(settings(nixl={"net_devices": device})), Verdict.FAIL)


def test_a_backend_that_is_not_there_is_a_failure() -> None:
    assert about("nixl", examine(settings(nixl={"backend": "CARRIER_PIGEON"})), Verdict.FAIL)


def test_rings_larger_than_memory_are_a_failure() -> None:
    huge = {"slot_bytes": 1 << 40, "region_slots": 2, "ring_max_bytes": 1 << 45}
    assert about("memory", examine(settings(transfer=huge)), Verdict.FAIL)


def test_a_check_that_breaks_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MEMINFO", Path("/nowhere"))
    found = examine(settings())
    assert about("memory", found, Verdict.WARN)
    assert about("ports", found, Verdict.OK)


@pytest.mark.parametrize(("backend", "code"), [("UCX", 0), ("CARRIER_PIGEON", 1)])
def test_the_command_prints_json_and_its_code_says_whether_it_will_work(
    tmp_path: Path, backend: str, code: int
) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(f"role: prefill\nside_channel: {{port: {free_port()}}}\nnixl: {{backend: {backend}}}\n")
    done = CliRunner().invoke(app, ["doctor", str(file), "--json"])
    assert done.exit_code == code, done.output
    view = json.loads(done.output.splitlines()[-1])
    assert (view["verdict"] == "fail") is (code == 1)
    assert {"check", "verdict", "what", "advice"} == set(view["findings"][0])
    assert "nixl" in CliRunner().invoke(app, ["doctor", str(file)]).output


def test_a_mistake_in_the_settings_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "d.yaml").write_text("rolle: decode\n")
    done = CliRunner().invoke(app, ["doctor", str(tmp_path / "d.yaml")])
    assert (done.exit_code, len(done.output.splitlines())) == (2, 1)
