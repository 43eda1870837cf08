"""Imports once what takes seconds to import, then forks an engine for each connection to its socket.

Usage: python zygote.py SOCKET. Ends when standard input does. The first line on a connection is the engine's spec.
"""

import gc
import json
import os
import select
import signal
import socket
import sys
import traceback


def main() -> None:
    from faults.engine import forked

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[1])
    listener.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    os.write(1, b"ready\n")
    gc.freeze()
    while True:
        readable, _, _ = select.select([0, listener], [], [])
        if 0 in readable:
            return
        control, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            spec = json.loads(control.makefile("rb", buffering=0).readline())
            log = os.open(spec["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            for descriptor in (1, 2):
                os.dup2(log, descriptor)
            control.sendall(json.dumps(os.getpid()).encode() + b"\n")
            try:
                forked(spec, control)
            finally:
                if (error := sys.exc_info()[1]) is not None:
                    traceback.print_exception(error)  # the end of its log is what the test gets to see
                sys.stderr.flush()
                os._exit(0)
        control.close()


if __name__ == "__main__":
    main()
