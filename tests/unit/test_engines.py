"""``serving`` yields a healthy server and ends it and its children; a failure shows the end of the log."""

import os
import sys
from pathlib import Path

import psutil
import pytest
from engines import EngineFailed, free_port, serving, vllm_command, vllm_env

SERVER = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
print("child", child.pid, flush=True)

class Handler(http.server.BaseHTTPRequestHandler):
    looks = 0
    def do_GET(self):
        Handler.looks += 1
        self.send_response(200 if Handler.looks > 1 else 503)
        self.end_headers()

http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_server_is_there_for_the_body_and_its_children_end_with_it(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "server.log"
    argv = [sys.executable, "-c", SERVER, str(port)]
    with serving(argv, f"http://127.0.0.1:{port}/health", log, start_s=30) as process:
        child = int(log.read_text().split()[1])
        assert is_running(process.pid)
        assert is_running(child)
        assert os.getpgid(child) == process.pid != os.getpgid(0)
    assert process.returncode is not None
    psutil.wait_procs([psutil.Process(child)] if psutil.pid_exists(child) else [], timeout=10)
    assert not is_running(child)


def test_a_server_that_ends_at_once_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", "import os; print(os.environ['WHY']); raise SystemExit(3)"]
    health = f"http://127.0.0.1:{free_port()}/health"
    with (
        pytest.raises(EngineFailed, match=r"exit code 3 before it was healthy: .*\nno such model$"),
        serving(argv, health, tmp_path / "server.log", start_s=30, env={"WHY": "no such model"}),
    ):
        pass


def test_a_server_that_never_gets_healthy_is_ended(tmp_path: Path) -> None:
    argv = ["sh", "-c", "echo $$; exec sleep 600"]
    log = tmp_path / "server.log"
    with (
        pytest.raises(EngineFailed, match="not healthy within 1 s"),
        serving(argv, f"http://127.0.0.1:{free_port()}/health", log, start_s=1.0),
    ):
        pass
    assert not is_running(int(log.read_text()))


def test_a_failure_of_the_body_carries_the_log(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "server.log"
    argv = [sys.executable, "-c", SERVER, str(port)]
    with (
        pytest.raises(KeyError) as caught,
        serving(argv, f"http://127.0.0.1:{port}/health", log, start_s=30),
    ):
        raise KeyError("of the body")
    assert "child" in caught.value.__notes__[0]


def test_ports_differ() -> None:
    assert len({free_port() for _ in range(50)}) == 50


def test_what_a_test_adds_to_the_command_comes_last() -> None:
    argv = vllm_command("m", 8000, core=0, extra=["--max-model-len", "64"])
    assert argv[1:5] == ["serve", "m", "--port", "8000"]
    assert argv[-2:] == ["--max-model-len", "64"]


def test_a_core_that_we_may_not_use_wraps_around() -> None:
    cores = len(os.sched_getaffinity(0))
    assert vllm_env(core=cores) == vllm_env(core=0)
