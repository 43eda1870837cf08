"""What several API servers of one engine tell each other: a file in shared memory, one slot for each of them.

An engine reports to one API server at a time, and each knows only its own admissions. So each writes both into its own
slot and reads the others'. Nobody waits for anybody: a slot has one writer, and a sequence number around its content
which is odd while it is written; a reader who finds it odd or changed takes what it read before.

    slot  0   8 bytes  sequence
          8   4 bytes  length of what follows
         12   ...      msgpack: pid, time, reservations by priority, the newest report of each engine, draining
"""

import fcntl
import mmap
import os
import struct
from pathlib import Path

import msgspec

from disagg_plugin.admission.engine_state import EngineState
from disagg_plugin.admission.gate import Gate
from disagg_policies.admission_snapshots import QueuedWork

SLOTS = 64
SLOT_BYTES = 32 << 10
SYNC_S = 0.01  # at most so often: what a server admitted is seen by the others this much later
SILENT_S = 5.0  # what a server admitted that has said nothing for so long is in some report by now
_HEADER = struct.Struct("<QI")


class _Page(msgspec.Struct, array_like=True):
    pid: int
    at_s: float = 0.0
    work: list[QueuedWork] = []
    engines: dict[str, EngineState] = {}
    draining: bool = False
    drained_at_s: float = float("-inf")


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Page).decode


def create_board(path: Path) -> None:
    """Make the file; once, by the process that starts the API servers."""
    with path.open("xb") as file:
        file.truncate(SLOTS * SLOT_BYTES)


class Board:
    """One API server's view; all calls from its event loop."""

    def __init__(self, path: Path, pid: int | None = None) -> None:
        """
        Raises:
            OSError: The file is not there, or all slots are taken.
        """
        self._pid = os.getpid() if pid is None else pid
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), SLOTS * SLOT_BYTES)
            fcntl.flock(file, fcntl.LOCK_EX)  # two servers that start at once
            self._slot = self._free_slot()
            self._sequence = _HEADER.unpack_from(self._map, self._slot * SLOT_BYTES)[0] & ~1
            self._write(_Page(self._pid))
            fcntl.flock(file, fcntl.LOCK_UN)  # the map keeps the file open, and with it the lock
        self._others: dict[int, _Page] = {}
        self._seen: dict[int, int] = {}
        self._due_s = float("-inf")
        self._now_s = 0.0

    def sync(self, gate: Gate, now_s: float) -> bool:
        """Write what this server knows, and tell ``gate`` what the others do; false: it did so just now."""
        if now_s < self._due_s:
            return False
        self._due_s = now_s + SYNC_S
        self._now_s = now_s
        self._write(
            _Page(self._pid, now_s, gate.reservations(), gate.newest_reports(), gate.draining, gate.drained_at_s)
        )
        for slot in range(SLOTS):
            if slot == self._slot or (page := self._read(slot)) is None:
                continue
            self._others[slot] = page
            if page.drained_at_s > gate.drained_at_s:
                gate.drain(page.draining, page.drained_at_s)
            for engine, state in page.engines.items():
                gate.update(state, engine)
        return True

    def work(self) -> list[QueuedWork]:
        """What the others admitted and no report counts yet; for ``Gate.also_count``."""
        pages = [page for page in self._others.values() if self._now_s - page.at_s <= SILENT_S]
        return [work for page in pages for work in page.work]

    def close(self) -> None:
        """Give the slot back."""
        self._write(_Page(0))
        self._map.close()

    def _free_slot(self) -> int:
        for slot in range(SLOTS):
            page = self._read(slot, again=True)
            if page is None or page.pid == 0 or not _alive(page.pid):
                return slot
        raise OSError(f"all {SLOTS} slots are taken")

    def _write(self, page: _Page) -> None:
        body = _encode(page)
        if len(body) > SLOT_BYTES - _HEADER.size:
            page.engines = {}
            body = _encode(page)
        at = self._slot * SLOT_BYTES
        self._sequence += 2
        _HEADER.pack_into(self._map, at, self._sequence - 1, len(body))
        self._map[at + _HEADER.size : at + _HEADER.size + len(body)] = body
        _HEADER.pack_into(self._map, at, self._sequence, len(body))

    def _read(self, slot: int, *, again: bool = False) -> _Page | None:
        """What is new in a slot, or None."""
        at = slot * SLOT_BYTES
        sequence, length = _HEADER.unpack_from(self._map, at)
        if sequence == 0 or sequence & 1 or (not again and self._seen.get(slot) == sequence):
            return None
        body = self._map[at + _HEADER.size : at + _HEADER.size + length]
        if _HEADER.unpack_from(self._map, at) != (sequence, length):
            return None
        try:
            page = _decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError):  # a server of another version, or garbage in the file
            return None
        if not again:
            self._seen[slot] = sequence
        return page


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
