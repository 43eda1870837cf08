"""Whether an engine that has prompts before it has stopped to make steps: vLLM's ``/pause``, or a scheduler that hangs.

    steps go on ──prompts wait, no step for a while──▶ at rest ──a step, or nothing waits──▶ steps go on

An engine says nothing when it is paused: it only makes no further step, whatever comes. Pure; the clock is passed in.
"""

from disagg_plugin.control.load import Load
from disagg_plugin.control.own_pauses import excused

NOTHING_RUNS_S = 2.0  # a free engine begins its next step within a millisecond


class Standstill:
    """Of one engine.

    Args:
        step_s: Longest step that is believed: with a prompt being computed, one may be under way.
    """

    def __init__(self, step_s: float) -> None:
        self._step_s = max(step_s, NOTHING_RUNS_S)
        self._steps = 0
        self._since_s: float | None = None  # since when prompts wait and no step was seen

    def look(self, now_s: float, *, steps: int, load: Load, away_s: float = 0.0) -> bool:
        """Whether it is at rest.

        Args:
            steps: Begun so far; 0: this engine does not count them, and is never taken to be at rest.
            away_s: How much of the time since the last look nobody could look, see ``OwnPauses``.
        """
        waits = steps == self._steps and steps > 0 and load.queued_requests > 0
        self._steps = steps
        if not waits:
            self._since_s = None
            return False
        self._since_s = now_s if self._since_s is None else excused(self._since_s, away_s, now_s)
        return now_s - self._since_s > (self._step_s if load.running_requests else NOTHING_RUNS_S)
