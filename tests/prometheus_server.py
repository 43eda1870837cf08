"""A real Prometheus, Debian's package, for tests: unpacked once per machine, nothing installed, no root needed.

python tests/prometheus_server.py      prints the folder of ``prometheus`` and ``promtool``
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import yaml
from engines import free_port
from models import cache_dir

BINARIES = ("prometheus", "promtool")
READY_S = 60.0


def binaries() -> Path:
    """The folder that holds Prometheus' two programs: from the PATH, from the cache, or from Debian's package."""
    found = [shutil.which(name) for name in BINARIES]
    if all(found):
        return Path(str(found[0])).parent
    folder = cache_dir() / "prometheus"
    if not all((folder / name).exists() for name in BINARIES):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _unpack(Path(scratch))
            for name in BINARIES:
                os.replace(Path(scratch) / "root/usr/bin" / name, folder / name)
    return folder


def _unpack(scratch: Path) -> None:
    """Fetch the package with apt, into package lists of our own: the machine's may be empty, and belong to root."""
    lists, archives = scratch / "lists", scratch / "archives"
    (lists / "partial").mkdir(parents=True)
    (archives / "partial").mkdir(parents=True)
    own = ("-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={archives}", "-o", "APT::Sandbox::User=")
    for command in (["apt-get", *own, "-qq", "update"], ["apt-get", *own, "-qq", "download", "prometheus"]):
        subprocess.run(command, cwd=scratch, check=True, stdout=sys.stderr)
    (package,) = scratch.glob("prometheus_*.deb")
    subprocess.run(["dpkg", "-x", str(package), str(scratch / "root")], check=True)


def promtool(*arguments: str | Path) -> str:
    """Its output.

    Raises:
        AssertionError: It found something wrong; the message is what it said.
    """
    done = subprocess.run([binaries() / "promtool", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Prometheus:
    """A running server."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **parameters: str) -> Any:
        """The ``data`` of one API answer; an error is an answer too."""
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=10) as answer:
                body = json.load(answer)
        except urllib.error.HTTPError as error:
            body = json.load(error)
        assert body["status"] == "success", f"{parameters}: {body.get('error')}"
        return body["data"]

    def query(self, expression: str) -> list[Mapping[str, Any]]:
        """The series that an expression gives now.

        Raises:
            AssertionError: Prometheus does not understand it.
        """
        data = self.get("query", query=expression)
        result: list[Mapping[str, Any]] = data["result"]
        return result

    def when(self, condition: Callable[[], bool], *, within_s: float = READY_S) -> None:
        """Wait until it holds."""
        for _ in range(int(within_s / 0.1)):
            if condition():
                return
            Event().wait(0.1)
        raise AssertionError(f"not within {within_s} s")

    def scraped(self, times: int) -> bool:
        """Whether every target was scraped so often, the last time with success."""
        up = self.query("up")
        counts = self.query("count_over_time(up[1h])")
        return bool(up) and all(s["value"][1] == "1" for s in up) and all(int(s["value"][1]) >= times for s in counts)


@contextmanager
def prometheus(folder: Path, targets: Sequence[str], *, rules: Sequence[Path] = ()) -> Iterator[Prometheus]:
    """Prometheus scraping ``targets`` (URLs) every second, which is also how long a scrape may take."""
    settings = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(path) for path in rules],
        "scrape_configs": [
            {"job_name": "disagg", "static_configs": [{"targets": [t.removeprefix("http://") for t in targets]}]}
        ],
    }
    config = folder / "prometheus.yml"
    config.write_text(yaml.safe_dump(settings))
    address = f"127.0.0.1:{free_port()}"
    argv = [str(binaries() / "prometheus"), f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}"]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen([*argv, f"--web.listen-address={address}"], stdout=log, stderr=log)
        server = Prometheus(f"http://{address}")
        try:
            server.when(lambda: _ready(server.url, process, folder / "prometheus.log"))
            yield server
        finally:
            process.terminate()
            process.wait(30)


def _ready(url: str, process: "subprocess.Popen[bytes]", log: Path) -> bool:
    assert process.poll() is None, log.read_text()[-3000:]
    try:
        with urllib.request.urlopen(f"{url}/-/ready", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def dashboard_queries(file: Path) -> dict[str, str]:
    """Every query of a Grafana dashboard, by panel, with its variables filled in as for "All"."""
    queries = {}
    for panel in json.loads(file.read_text())["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"].replace("$__rate_interval", "1m")
            for variable in ("$model", "$instance"):
                expression = expression.replace(variable, ".*")
            assert "$" not in expression, expression
            queries[f"{panel['title']} {target['refId']}"] = expression
    return queries


if __name__ == "__main__":
    print(binaries())
