"""Silence of a peer, and silence of our own: a thread that did not run could not have heard anybody. Pure."""


class OwnPauses:
    """For a thread that looks at its peers every ``interval_s``: how much longer than that it was away.

    On a machine with more work than cores, a Python thread may wait for seconds; whoever then compares clocks would
    declare every peer dead whose messages are waiting to be read.
    """

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._looked_s: float | None = None

    def since_last_look_s(self, now_s: float) -> float:
        """Seconds by which this look is later than it should be; to be called at every look."""
        looked_s, self._looked_s = self._looked_s, now_s
        if looked_s is None:
            return 0.0
        away_s = now_s - looked_s - self._interval_s
        return away_s if away_s > self._interval_s else 0.0  # what a busy loop is late by is no pause


def excused(heard_s: float, away_s: float, now_s: float) -> float:
    """When a peer was heard last, had we not been away since."""
    return min(now_s, heard_s + away_s)
