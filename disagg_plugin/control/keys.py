"""CURVE keys of the side channel: a directory of small text files, one Z85 key (40 characters) each.

    DIR/
      server.key  server.pub              what this node proves itself with when others connect to it
      client.key  client.pub              what this node proves itself with when it connects to others
      server-next.key  server-next.pub    optional: the server pair that will follow, see below
      allowed/NAME.pub                    client keys that this node accepts; without the folder: its own client.pub
      servers/HOST.pub                    optional: keys of the servers this node connects to

``*.key`` are secret: mode 0600, and nothing loads them when group or others may read them.

**Fleet** (``disagg keygen DIR --fleet``): every engine uses the same directory. The six files are all there is, and
``kubectl create secret generic NAME --from-file=DIR`` (flat: ``allowed/`` stays out, ``client.pub`` is enough) with
``defaultMode: 0400`` carries them. **Per node** (``disagg keygen DIR``): each node has its own; the operator copies
``client.pub`` of a node to ``allowed/`` of the nodes it connects to, and ``server.pub`` of a node to
``servers/HOST.pub`` of the nodes that connect to it, HOST being the address they use. A HOST that has a file there
is connected to with that key (and ``HOST-next.pub``) only; for any other, every known key is tried in turn.

**Rotation of a server key**: ``generate_next_server`` and bring ``server-next.pub`` to all clients (a shared directory
or Secret has it at once): they try the current key, then the next. Swap the two pairs, restart the servers one by one,
then delete the old pair. **Client keys**: files in ``allowed/`` count from the next connection on; deleting one refuses
new connections and leaves those that stand.
"""

import logging
import os
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from disagg_plugin.errors import ConfigError

_KEY = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")  # Z85's alphabet; 40 characters are 32 bytes
_NAME = re.compile(r"[0-9a-zA-Z_][0-9a-zA-Z._-]*")
REREAD_S = 30.0  # a file changed in place does not change its directory
REREAD_UNKNOWN_S = 1.0

logger = logging.getLogger(__name__)
_reported: set[Path] = set()  # bad files that the log names already


@dataclass(frozen=True, slots=True)
class KeyPair:
    """One CURVE pair, both parts as 40 bytes of Z85 text."""

    public: bytes
    secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class KeyRing:
    """One node's secrets, and where the public keys of the others are found."""

    directory: Path
    server: KeyPair
    client: KeyPair

    @classmethod
    def load(cls, directory: Path) -> "KeyRing":
        """Read and check everything in ``directory``.

        Raises:
            ConfigError: A file is missing, malformed, or readable by others; the line says what to do.
        """
        if not directory.is_dir():
            raise ConfigError(f"side channel: no keys in {directory}: run `disagg keygen {directory}`")
        ring = cls(directory, _read_pair(directory, "server"), _read_pair(directory, "client"))
        for path in (*ring._allowed_files(), *ring._server_files()):
            read_public(path)
        if not ring.allowed_clients():
            raise ConfigError(f"side channel: {directory}/allowed is empty: copy each client's client.pub there")
        return ring

    def allowed_clients(self) -> frozenset[bytes]:
        """Client keys accepted now, read from disk; a malformed file is skipped and said so in the log."""
        return frozenset(_read_valid(self._allowed_files()))

    def server_keys(self, host: str) -> tuple[bytes, ...]:
        """Keys that the server at ``host`` may have, best first, read from disk; malformed files are skipped."""
        servers = self.directory / "servers"
        pinned = [servers / f"{host}.pub", servers / f"{host}-next.pub"] if _NAME.fullmatch(host) else []
        files = [path for path in pinned if path.is_file()] or self._server_files()
        return tuple(dict.fromkeys(_read_valid(files)))

    def _allowed_files(self) -> list[Path]:
        allowed = self.directory / "allowed"
        return sorted(allowed.glob("*.pub")) if allowed.is_dir() else [self.directory / "client.pub"]

    def _server_files(self) -> list[Path]:
        own = [self.directory / "server.pub", self.directory / "server-next.pub"]
        return [path for path in own if path.is_file()] + sorted((self.directory / "servers").glob("*.pub"))


class AllowList:
    """The accepted client keys, asked once per handshake; costs nothing in between.

    Reads the directory again when it changed, after ``REREAD_S`` seconds, and for an unknown key (a file that was
    still being copied at the last look), then at most once in ``REREAD_UNKNOWN_S``.
    """

    def __init__(self, ring: KeyRing, clock: Callable[[], float] = time.monotonic) -> None:
        self._ring = ring
        self._clock = clock
        self._keys = ring.allowed_clients()
        self._read_at = clock()
        self._seen = self._signature()

    def accepts(self, public: bytes) -> bool:
        """Whether a client with this key (Z85) may connect now."""
        signature = self._signature()
        limit_s = REREAD_S if public in self._keys else REREAD_UNKNOWN_S
        if signature != self._seen or self._clock() - self._read_at >= limit_s:
            self._keys = self._ring.allowed_clients()
            self._read_at = self._clock()
            self._seen = signature
        return public in self._keys

    def _signature(self) -> tuple[tuple[int, int] | None, ...]:
        # both: a Kubernetes volume swaps a link (another inode), a copied file touches its directory
        return tuple(_inode_and_mtime(self._ring.directory / name) for name in (".", "allowed"))


def generate(directory: Path, *, fleet: bool, name: str | None = None, force: bool = False) -> KeyRing:
    """Write new key pairs to ``directory``, created with mode 0700 if it does not exist.

    Args:
        fleet: One directory for all engines; otherwise one per node.
        name: This node in ``allowed/`` and ``servers/`` (default: the host name); not used by a fleet.
        force: Replace existing secrets; the peers that know the old public keys are locked out.

    Raises:
        ConfigError: There are secrets already, others may write to the directory, or ``name`` is no file name.
    """
    name = "fleet" if fleet else (name or socket.gethostname())
    if not _NAME.fullmatch(name):
        raise ConfigError(f"side channel: {name!r} cannot name a key file: use letters, digits, dots and dashes")
    _make_directory(directory)
    existing = [path for path in (directory / "server.key", directory / "client.key") if path.exists()]
    if existing and not force:
        raise ConfigError(
            f"side channel: {existing[0]} exists already: `disagg keygen {directory} --force` replaces it"
        )
    _write_pair(directory, "server")
    _write_pair(directory, "client")
    published = {"allowed": "client.pub"} if fleet else {"allowed": "client.pub", "servers": "server.pub"}
    for folder, own in published.items():
        (directory / folder).mkdir(mode=0o700, exist_ok=True)
        _write(directory / folder / f"{name}.pub", (directory / own).read_bytes(), 0o644)
    return KeyRing.load(directory)


def generate_next_server(directory: Path, *, force: bool = False) -> None:
    """Write ``server-next.key`` and ``server-next.pub``, the first step of a rotation.

    Raises:
        ConfigError: There is no key ring in ``directory``, or it has a next pair already.
    """
    KeyRing.load(directory)
    if (directory / "server-next.key").exists() and not force:
        raise ConfigError(f"side channel: {directory}/server-next.key exists already: finish that rotation first")
    _write_pair(directory, "server-next")


def read_public(path: Path) -> bytes:
    """The public key in ``path``, as Z85 text.

    Raises:
        ConfigError: Missing, unreadable or malformed.
    """
    return _read(path, "copy it again from the node it belongs to, or delete it")


def _read_valid(paths: list[Path]) -> list[bytes]:
    keys = []
    for path in paths:
        try:
            keys.append(read_public(path))
            _reported.discard(path)
        except ConfigError as error:  # of a running engine: one bad file must not lock out the others
            if path not in _reported:
                _reported.add(path)
                logger.warning("%s", error)
    return keys


def _read_pair(directory: Path, stem: str) -> KeyPair:
    path = directory / f"{stem}.key"
    secret = _read(path, f"run `disagg keygen {directory} --force`")
    mode = path.stat().st_mode & 0o777  # of the file behind a link, as in a Kubernetes volume
    if mode & 0o077:
        raise ConfigError(
            f"side channel: {path} has mode {mode:04o}, others can read it: "
            f"chmod 600 {path} (Kubernetes: defaultMode: 0400)"
        )
    pair = KeyPair(_read(directory / f"{stem}.pub", f"run `disagg keygen {directory} --force`"), secret)
    if zmq.curve_public(secret) != pair.public:
        raise ConfigError(
            f"side channel: {directory}/{stem}.pub does not belong to {stem}.key: copy the right one, "
            f"or run `disagg keygen {directory} --force`"
        )
    return pair


def _read(path: Path, advice: str) -> bytes:
    try:
        text = path.read_bytes()[:128].decode("ascii", "replace").strip()
    except FileNotFoundError:
        raise ConfigError(f"side channel: {path} is missing: run `disagg keygen {path.parent}`") from None
    except OSError as error:
        raise ConfigError(f"side channel: cannot read {path} ({error.strerror}): {advice}") from None
    if not _KEY.fullmatch(text):
        raise ConfigError(f"side channel: {path} is not a key (40 characters of Z85): {advice}")
    return text.encode()


def _make_directory(directory: Path) -> None:
    if not directory.exists():
        directory.mkdir(mode=0o700, parents=True)
        directory.chmod(0o700)  # whatever the umask
    elif not directory.is_dir():
        raise ConfigError(f"side channel: {directory} is a file: name a directory for the keys")
    elif directory.stat().st_mode & 0o022:
        raise ConfigError(f"side channel: others can write to {directory}: chmod 700 {directory}, or name another one")


def _write_pair(directory: Path, stem: str) -> None:
    public, secret = zmq.curve_keypair()
    _write(directory / f"{stem}.key", secret + b"\n", 0o600)
    _write(directory / f"{stem}.pub", public + b"\n", 0o644)


def _write(path: Path, content: bytes, mode: int) -> None:
    """Whole or not at all, and never, not even for a moment, with a wider mode."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode)
    with open(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)
        file.write(content)
    os.replace(temporary, path)


def _inode_and_mtime(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns
