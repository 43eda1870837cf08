"""An admission policy for ``overload.py``: as the built-in one, but every n-th refusal is served all the same.

Which these are, by class and prompt length, it appends to the file named by the environment variable ``PROBES``. The
built-in is named by ``PROBED_POLICY``.
"""

import os
from pathlib import Path

from disagg_plugin.hookspecs import PolicyParameters, hookimpl
from disagg_policies import admission
from disagg_policies.admission_snapshots import Admission, AdmissionSnapshot, Admitted, Refused

EACH = 15
NAME = "refused_probe"
PROBES = "probes"

_refused = 0
_early: set[tuple[str, int]] = set()  # probes between the two stages, by class and prompt length


@hookimpl
def disagg_admit(snapshot: AdmissionSnapshot, parameters: PolicyParameters) -> Admission:
    """See the module."""
    global _refused
    answer = _probed(snapshot, parameters)
    if isinstance(answer, Admitted):
        return answer
    key = (snapshot.request.service_class, snapshot.request.prompt_tokens)
    if key in _early:
        _early.discard(key)
        return _served(answer)
    _refused += 1
    if _refused % EACH:
        return answer
    _early.add(key)
    with Path(os.environ["PROBES"]).open("a") as probes:
        print(*key, file=probes)
    return _served(answer)


def _served(answer: Refused) -> Admitted:
    return Admitted("probe", (), answer.level, answer.ttft_s, answer.tpot_s, answer.pressure)


def _probed(snapshot: AdmissionSnapshot, parameters: PolicyParameters) -> Admitted | Refused:
    reject, threshold_s = parameters.reject_on_slo_violation, parameters.low_priority_threshold_s
    if os.environ["PROBED_POLICY"] == "current_queue":
        return admission.current_queue(
            snapshot, reject_on_slo_violation=reject, low_priority_threshold_s=threshold_s or 0.5
        )
    return admission.projected(snapshot, reject_on_slo_violation=reject, low_priority_threshold_s=threshold_s)


def install(folder: Path) -> dict[str, str]:
    """Make the policy known to engines that are started with the environment returned here."""
    (folder / f"{NAME}.py").write_text(Path(__file__).read_text())
    info = folder / f"{NAME}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[disagg]\n{NAME} = {NAME}\n")
    python_path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": python_path, "PROBES": str(folder / PROBES)}
