"""Whether an engine that has prompts before it has stopped to make steps: vLLM's ``/pause``, or a scheduler that hangs.

    steps go on ──prompts wait, no step for a while──▶ at rest ──it computes, or nothing waited for a while──▶ back

An engine says nothing when it is paused: it only begins no further step, whatever comes, but to forget a request that
was aborted. Nor does it say that it was resumed, while nothing waits: after a while it is worth another try.
Pure; the clock is passed in.
"""

from dataclasses import dataclass

from disagg_plugin.control.load import Load
from disagg_plugin.control.own_pauses import excused

NOTHING_RUNS_S = 2.0  # a free engine begins its next step within a millisecond
TRY_AGAIN_S = 10.0  # once nothing waits; a try costs the prompts that come with it NOTHING_RUNS_S
AT_MOST_S = 60.0  # whatever seems to wait: a wrong count must not end an engine's work


@dataclass(frozen=True, slots=True)
class Steps:
    """Of an engine, so far; zeros: it does not count them, and is never taken to be at rest."""

    begun: int = 0
    computing: int = 0  # those that computed a token


class Standstill:
    """Of one engine.

    Args:
        step_s: Longest step that is believed: with a prompt being computed, one may be under way.
    """

    def __init__(self, step_s: float) -> None:
        self._step_s = max(step_s, NOTHING_RUNS_S)
        self._steps = Steps()
        self._since_s: float | None = None  # since when prompts wait and no step was seen
        self._rests_s = self._waited_s = 0.0
        self.at_rest = False

    def look(self, now_s: float, *, steps: Steps, load: Load, away_s: float = 0.0) -> bool:
        """Whether it is at rest.

        Args:
            away_s: How much of the time since the last look nobody could look, see ``OwnPauses``.
        """
        before, self._steps = self._steps, steps
        waits = load.queued_requests > 0
        if self.at_rest:
            if waits:
                self._waited_s = now_s
            computes = steps.computing != before.computing
            if computes or now_s > min(self._waited_s + TRY_AGAIN_S, self._rests_s + AT_MOST_S):
                self.at_rest, self._since_s = False, None
        elif not waits or not steps.begun or steps.begun != before.begun:
            self._since_s = None
        else:
            self._since_s = now_s if self._since_s is None else excused(self._since_s, away_s, now_s)
            limit_s = self._step_s if load.running_requests else NOTHING_RUNS_S
            self.at_rest = now_s - self._since_s > limit_s
            self._rests_s = self._waited_s = now_s
        return self.at_rest
