"""A router as NixlConnector's users run one: every request goes to a prefill engine, then to a decode engine.

It knows nothing of this plugin. What the prefill engine answers as ``kv_transfer_params`` goes on to the decode engine
as it is; the first half asks for one token, without streaming.
"""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

import httpx

FIRST_HALF: dict[str, Any] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


class SequentialProxy:
    """Serves ``/v1/completions`` and ``/v1/chat/completions`` on a port of its own while it is entered.

    Args:
        between: Called with what P answered, before D is asked; what it returns goes to D.
    """

    def __init__(
        self, prefill_url: str, decode_url: str, *, between: Callable[[Any], Any] = lambda params: params
    ) -> None:
        self.first_halves: list[Any] = []  # kv_transfer_params as P answered them
        self._prefill_url = prefill_url
        self._decode_url = decode_url
        self._between = between
        self._http = httpx.Client(timeout=300.0)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer._relay(self, body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._http.close()

    def prefill(self, path: str, body: dict[str, Any]) -> Any:
        """The first half: P's ``kv_transfer_params``."""
        first = {**body, "kv_transfer_params": FIRST_HALF, "max_tokens": 1, "stream": False}
        if "max_completion_tokens" in first:
            first["max_completion_tokens"] = 1
        first.pop("stream_options", None)
        response = self._http.post(f"{self._prefill_url}{path}", json=first)
        response.raise_for_status()
        params = response.json().get("kv_transfer_params")
        self.first_halves.append(params)
        return params

    def _relay(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        params = self._between(self.prefill(handler.path, body))
        if params is not None:
            body = {**body, "kv_transfer_params": params}
        with self._http.stream("POST", f"{self._decode_url}{handler.path}", json=body) as answer:
            handler.send_response(answer.status_code)
            handler.send_header("Content-Type", answer.headers["content-type"])
            handler.end_headers()
            for piece in answer.iter_bytes():
                handler.wfile.write(piece)
                handler.wfile.flush()
