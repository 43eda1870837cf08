"""Key directories: what is written, what is refused and with which advice, what counts at run time."""

import os
from pathlib import Path

import pytest
import zmq

from disagg_plugin.control import keys
from disagg_plugin.control.keys import AllowList, KeyRing, generate, generate_next_server
from disagg_plugin.errors import ConfigError


def new_public() -> bytes:
    return zmq.curve_keypair()[0]


@pytest.fixture
def node(tmp_path: Path) -> KeyRing:
    return generate(tmp_path / "keys", fleet=False, name="node-a")


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize("fleet", [True, False], ids=["a fleet", "one node"])
def test_secrets_are_for_the_owner_only(tmp_path: Path, fleet: bool):
    directory = tmp_path / "new" / "keys"
    old = os.umask(0)
    try:
        generate(directory, fleet=fleet)
    finally:
        os.umask(old)
    assert mode(directory) == 0o700
    assert {path.name: mode(path) for path in directory.glob("*.key")} == {"server.key": 0o600, "client.key": 0o600}
    assert not [path for path in directory.rglob("*") if path.name.startswith(".")], "no temporary file stays"


def test_a_fleet_shares_one_directory_and_accepts_itself(tmp_path: Path):
    ring = generate(tmp_path, fleet=True)
    assert KeyRing.load(tmp_path) == ring
    assert ring.allowed_clients() == {ring.client.public}
    assert ring.server_keys("any-host") == (ring.server.public,)


def test_a_flat_copy_of_a_fleet_is_enough_as_in_a_kubernetes_secret(tmp_path: Path):
    ring = generate(tmp_path / "keys", fleet=True)
    mounted = tmp_path / "mounted"
    (mounted / "..data").mkdir(parents=True)
    for path in (tmp_path / "keys").iterdir():
        if path.is_file():
            (mounted / "..data" / path.name).write_bytes(path.read_bytes())
            (mounted / "..data" / path.name).chmod(0o400)
            (mounted / path.name).symlink_to(Path("..data") / path.name)
    copy = KeyRing.load(mounted)
    assert copy.allowed_clients() == {ring.client.public}
    assert copy.server_keys("p-0") == (ring.server.public,)


def test_a_host_with_its_own_file_is_known_by_that_key_only(node: KeyRing):
    other, next_key = new_public(), new_public()
    (node.directory / "servers" / "node-b.pub").write_bytes(other)
    assert node.server_keys("node-b") == (other,)
    (node.directory / "servers" / "node-b-next.pub").write_bytes(next_key)
    assert node.server_keys("node-b") == (other, next_key)
    assert set(node.server_keys("10.0.0.9")) == {node.server.public, other, next_key}


def test_a_rotation_offers_the_current_key_before_the_next(node: KeyRing):
    generate_next_server(node.directory)
    next_key = (node.directory / "server-next.pub").read_bytes().strip()
    assert node.server_keys("elsewhere") == (node.server.public, next_key)
    with pytest.raises(ConfigError, match="finish that rotation first"):
        generate_next_server(node.directory)


def test_existing_secrets_are_replaced_only_on_demand(node: KeyRing):
    with pytest.raises(ConfigError, match=r"exists already: `disagg keygen .* --force`"):
        generate(node.directory, fleet=False, name="node-a")
    assert KeyRing.load(node.directory) == node
    assert generate(node.directory, fleet=False, name="node-a", force=True).server != node.server


def test_secrets_never_appear_in_a_repr(node: KeyRing):
    assert node.server.secret.decode() not in repr(node)


@pytest.mark.parametrize("name", ["../x", "", ".hidden", "a/b", "a b"])
def test_a_name_that_is_no_file_name_is_refused(tmp_path: Path, name: str):
    if not name:
        assert generate(tmp_path, fleet=False, name=name)  # empty: the host name
        return
    with pytest.raises(ConfigError, match="cannot name a key file"):
        generate(tmp_path, fleet=False, name=name)


def test_a_directory_that_others_can_write_to_is_refused(tmp_path: Path):
    tmp_path.chmod(0o777)
    with pytest.raises(ConfigError, match="chmod 700"):
        generate(tmp_path, fleet=True)


SPOILED = {
    "the directory is missing": (lambda d: d.rename(d.with_name("gone")), r"no keys in .*disagg keygen"),
    "a secret is missing": (lambda d: (d / "server.key").unlink(), r"server\.key is missing: run `disagg keygen"),
    "a public key is missing": (lambda d: (d / "client.pub").unlink(), r"client\.pub is missing: run `disagg keygen"),
    "a secret is too short": (lambda d: (d / "client.key").write_text("abc"), r"not a key .*disagg keygen"),
    "a secret is binary": (lambda d: (d / "client.key").write_bytes(os.urandom(40) + b"\xff"), "not a key"),
    "a secret is readable by the group": (lambda d: (d / "server.key").chmod(0o640), r"0640.*chmod 600 .*server\.key"),
    "a secret is readable by all": (lambda d: (d / "client.key").chmod(0o604), r"0604.*chmod 600 .*client\.key"),
    "a pair does not match": (lambda d: (d / "server.pub").write_bytes(new_public()), "does not belong to server.key"),
    "an accepted key is damaged": (lambda d: (d / "allowed" / "x.pub").write_text("?"), r"x\.pub is not a key"),
    "a known server's key is damaged": (lambda d: (d / "servers" / "x.pub").write_text(""), r"x\.pub is not a key"),
    "nobody is accepted": (lambda d: (d / "allowed" / "node-a.pub").unlink(), "allowed is empty"),
}


@pytest.mark.parametrize("situation", SPOILED)
def test_loading_says_in_one_line_what_to_do_when(node: KeyRing, situation: str):
    spoil, line = SPOILED[situation]
    spoil(node.directory)
    with pytest.raises(ConfigError, match=line) as raised:
        KeyRing.load(node.directory)
    assert "\n" not in str(raised.value)


def test_a_client_key_counts_from_the_moment_its_file_is_there_and_no_longer_than_that(node: KeyRing):
    allowed, public = AllowList(node), new_public()
    assert not allowed.accepts(public)
    (node.directory / "allowed" / "b.pub").write_bytes(public)
    assert allowed.accepts(public)
    (node.directory / "allowed" / "b.pub").unlink()
    assert not allowed.accepts(public)
    assert allowed.accepts(node.client.public)


def test_a_file_changed_in_place_counts_after_the_interval(node: KeyRing):
    now = 0.0
    allowed = AllowList(node, clock=lambda: now)
    (node.directory / "allowed" / "node-a.pub").write_bytes(new_public())
    assert allowed.accepts(node.client.public), "its directory did not change"
    now = keys.REREAD_S
    assert not allowed.accepts(node.client.public)


def test_a_file_still_being_copied_counts_a_second_later(node: KeyRing):
    now = 0.0
    allowed, public = AllowList(node, clock=lambda: now), new_public()
    path = node.directory / "allowed" / "b.pub"
    path.write_bytes(b"")
    assert not allowed.accepts(public)
    path.write_bytes(public)
    now = keys.REREAD_UNKNOWN_S
    assert allowed.accepts(public)


def test_one_damaged_file_locks_nobody_else_out_and_is_named_once(node: KeyRing, caplog: pytest.LogCaptureFixture):
    allowed = AllowList(node)
    (node.directory / "allowed" / "bad.pub").write_text("damaged")
    assert allowed.accepts(node.client.public)
    assert not allowed.accepts(new_public())
    node.allowed_clients()
    assert len([record for record in caplog.records if "bad.pub is not a key" in record.message]) == 1
