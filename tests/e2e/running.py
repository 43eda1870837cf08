"""The session's engines, so that a test file that starts its own can end them first: three are alive at most.

A module of its own: pytest imports ``conftest.py`` under another name than the tests do, and would have two of it.
"""

from contextlib import ExitStack

FLEET = ExitStack()


def end_running_fleet() -> None:
    """End the engines of the ``fleet`` fixture, if they run."""
    FLEET.close()
