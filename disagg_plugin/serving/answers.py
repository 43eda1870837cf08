"""Whether an answer of somebody else's policy makes sense; an empty text means yes, else it says what is wrong.

The exact types are asked for: a subclass could bring code of its own to the scheduler's thread.
"""

import math
import re

from disagg_policies.admission_snapshots import AdmissionSnapshot, Admitted, Refused
from disagg_policies.snapshots import Codec, CodecChoices, Local, Offload, Placement, Snapshot

CODECS = ("raw", "int8")
_REASON = re.compile(r"[a-z][a-z0-9_]{0,63}")  # a metric's label


def wrong_with_placement(answer: object, snapshot: Snapshot) -> str:
    """A ``Placement`` that names healthy workers of the snapshot, each once."""
    if type(answer) is not Placement:
        return f"a {type(answer).__name__} instead of a Placement"
    if not isinstance(answer.scores, tuple) or not all(map(_finite, answer.scores)):
        return "scores are not a tuple of finite numbers"
    return _workers(answer.workers, snapshot) or _reason(answer.reason)


def wrong_with_decision(answer: object, snapshot: Snapshot) -> str:
    """``Local``, or ``Offload`` to at least one healthy worker of the snapshot."""
    if type(answer) is Offload:
        if problem := _workers(answer.workers, snapshot):
            return problem
        if not answer.workers:
            return "Offload without a worker"
    elif type(answer) is not Local:
        return f"a {type(answer).__name__} instead of Local or Offload"
    for name in ("local_ttft_s", "remote_ttft_s", "harm_s"):
        value = getattr(answer, name)
        if value is not None and not _finite(value):
            return f"{name} = {value!r}"
    return _reason(answer.reason)


def wrong_with_codec(answer: object, _choices: CodecChoices) -> str:
    """A ``Codec`` of a known name."""
    if type(answer) is not Codec:
        return f"a {type(answer).__name__} instead of a Codec"
    if answer.name not in CODECS:
        return f"codec {answer.name!r}, must be one of {', '.join(CODECS)}"
    return _reason(answer.reason)


def wrong_with_admission(answer: object, snapshot: AdmissionSnapshot) -> str:
    """``Admitted`` with steps of the request's class, or ``Refused`` with whole seconds."""
    if type(answer) is Refused:
        if type(answer.retry_after_s) is not int or not 1 <= answer.retry_after_s <= 60:
            return f"retry_after_s = {answer.retry_after_s!r}, must be a whole number from 1 to 60"
        if type(answer.unavailable) is not bool:
            return f"unavailable = {answer.unavailable!r}"
    elif type(answer) is not Admitted:
        return f"a {type(answer).__name__} instead of Admitted or Refused"
    else:
        known = snapshot.class_named(snapshot.request.service_class).degrade
        if not isinstance(answer.steps, tuple) or any(step not in known for step in answer.steps):
            return f"steps {answer.steps!r} are not a tuple of {', '.join(known) or 'nothing'}"
    if type(answer.level) is not int or answer.level < 0:
        return f"level = {answer.level!r}"
    for name in ("ttft_s", "tpot_s"):
        value = getattr(answer, name)
        if value is not None and not _finite(value):
            return f"{name} = {value!r}"
    return _reason(answer.reason)


def _workers(names: object, snapshot: Snapshot) -> str:
    if not isinstance(names, tuple):
        return f"workers are a {type(names).__name__} instead of a tuple"
    healthy = {worker.worker: worker.healthy for worker in snapshot.workers}
    for name in names:
        if not isinstance(name, str) or name not in healthy:
            return f"unknown worker {name!r}"
        if not healthy[name]:
            return f"worker {name!r} is not healthy"
    return "a worker twice" if len(set(names)) < len(names) else ""


def _reason(reason: object) -> str:
    if isinstance(reason, str) and _REASON.fullmatch(reason):
        return ""
    return f"reason {reason!r} is no lower-case word with underscores"


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
