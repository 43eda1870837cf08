"""How a prefill worker stands, in a word for people, and why; pure.

==============  ===================================================================================================
connecting      nobody answers yet, or the connection was lost; retried for ever
healthy         may be offered prompts
suspect         connected, but its last load report is older than ``suspect_after_s``: not offered anything
draining        it is about to leave, or is kept from taking prompts: ends what it has begun, is not offered anything
backed_off      it failed offloads: not offered anything until a time, then one prompt as a probe
silent          connected, but not a word for ``peer_timeout_s``: lost; introduced to again with every heartbeat
refused         the keys, the model, the cache or the version do not fit
ring_exhausted  no region of our landing ring is left for it
leaving         its name's look-up does not list it any more; what is under way may end
==============  ===================================================================================================

The link knows what has happened; ``standing`` adds what depends on the clock and on what the worker said last.
"""

from enum import StrEnum

from disagg_plugin.control.backoff import Backoff


class Health(StrEnum):
    """See the module's table."""

    CONNECTING = "connecting"
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    DRAINING = "draining"
    BACKED_OFF = "backed_off"
    SILENT = "silent"
    REFUSED = "refused"
    RING_EXHAUSTED = "ring_exhausted"
    LEAVING = "leaving"


def standing(
    health: Health,
    reason: str,
    *,
    now_s: float,
    left_s: float | None,
    reported_s: float | None,
    draining: bool,
    backoff: Backoff,
    suspect_after_s: float,
) -> tuple[Health, str]:
    """Health as of now, and why.

    Args:
        health, reason: Of the connection.
        left_s: Since when its name does not list it.
        reported_s: When its last load report came.
        draining: That one said so.
        suspect_after_s: As the policies are told; here it is only a word in the snapshot.
    """
    if left_s is not None:
        return Health.LEAVING, f"not listed for {now_s - left_s:.1f} s"
    if health is not Health.HEALTHY:
        return health, reason
    if draining:
        return Health.DRAINING, "it takes no more prompts"
    if not backoff.may_ask(now_s):
        probing = backoff.probe_s is not None
        return Health.BACKED_OFF, "probing" if probing else f"{backoff.until_s - now_s:.1f} s left"
    if reported_s is None:
        return Health.SUSPECT, "no load report"
    if now_s - reported_s > suspect_after_s:
        return Health.SUSPECT, f"load report {now_s - reported_s:.1f} s old"
    return health, reason
