"""A TCP relay in front of one port of an engine: passes, cuts, stalls or slows down what goes through it."""

import socket
import threading
from contextlib import suppress

PIECE_BYTES = 64 << 10


class Relay:
    """Listens on ``port`` and connects to ``target``, which may change while it runs; ``close`` ends everything.

    cut()         resets every connection, and refuses new ones
    stall()       nothing moves any more, and nobody is told
    throttle(n)   n bytes a second, all connections and both directions together
    heal()        as at first
    """

    def __init__(self) -> None:
        self.target = 0
        self.bytes_passed = 0
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._moving = threading.Event()
        self._moving.set()
        self._slowly = threading.Event()  # never set: its wait is the time that bytes take
        self._cut = False
        self._bytes_per_s = 0.0
        self._listener.listen(64)
        threading.Thread(target=self._accept, name="relay", daemon=True).start()

    def cut(self) -> None:
        self._cut = True
        self._reset_all()
        self._moving.set()

    def stall(self) -> None:
        self._moving.clear()

    def throttle(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s

    def heal(self) -> None:
        self._cut, self._bytes_per_s = False, 0.0
        self._moving.set()

    def close(self) -> None:
        self.cut()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes who accepts
        self._listener.close()

    def _reset_all(self) -> None:
        with self._lock:
            connections, self._open = self._open, set()
        for connection in connections:
            with suppress(OSError):
                # no lingering: the peer sees a reset, not an orderly end
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._serve, args=(near,), name="relay", daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        far = None
        self._moving.wait()
        if not self._cut and self.target:
            with suppress(OSError):
                far = socket.create_connection(("127.0.0.1", self.target), timeout=5)
                far.settimeout(None)
        if far is None:
            near.close()
            return
        for one in (near, far):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._open |= {near, far}
        back = threading.Thread(target=self._pass, args=(far, near), name="relay", daemon=True)
        back.start()
        self._pass(near, far)
        back.join()
        with self._lock:
            self._open -= {near, far}
        near.close()
        far.close()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while piece := source.recv(PIECE_BYTES):
                self._moving.wait()
                if self._cut:
                    break
                if self._bytes_per_s:
                    self._slowly.wait(len(piece) / self._bytes_per_s)
                sink.sendall(piece)
                self.bytes_passed += len(piece)
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
