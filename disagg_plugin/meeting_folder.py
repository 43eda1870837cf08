"""Where the processes of one server meet: a folder that only this user can enter, gone when who made it ends."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

VARIABLE = "DISAGG_MEETING_FOLDER"  # child processes inherit it; set by us


def make_meeting_folder() -> Path:
    """By the process that starts the others; the same one at each call."""
    if (known := meeting_folder()) is not None:
        return known
    folder = Path(tempfile.mkdtemp(prefix="disagg-"))
    os.environ[VARIABLE] = str(folder)
    maker = os.getpid()

    def remove() -> None:
        if os.getpid() == maker:  # forked children end as well
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def meeting_folder() -> Path | None:
    """The one that was made for this server, if any was."""
    folder = os.environ.get(VARIABLE)
    return Path(folder) if folder else None
