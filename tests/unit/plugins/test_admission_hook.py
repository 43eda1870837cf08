"""Whether to serve is a policy like the others: chosen by name, replaceable, bounded, and checked."""

import threading

import pytest

from disagg_plugin.admission.admitter import Admitter
from disagg_plugin.errors import ConfigError
from disagg_plugin.hookspecs import PolicyParameters, hookimpl
from disagg_plugin.plugins import PolicySettings, choose, load_plugins
from disagg_policies.admission_snapshots import (
    Admission,
    AdmissionSnapshot,
    Admitted,
    Arrival,
    QueuedWork,
    Refused,
    ServiceClass,
)

CLASSES = (ServiceClass("high", -1, 1.0), ServiceClass("low", 1, 2.0, degrade=("max_tokens:64",)))
IDLE = AdmissionSnapshot(Arrival("low", 100), CLASSES)
CROWDED = AdmissionSnapshot(Arrival("low", 100), CLASSES, queued=(QueuedWork(0, 9, 90_000),))


def admitter(plugin: object | None = None, *, admission: str = "projected", bound_s: float = 5.0) -> Admitter:
    settings = PolicySettings(admission=("own",) if plugin else (admission,))
    manager = load_plugins(settings, extra=[("own", plugin)] if plugin else ())
    return Admitter(choose(manager, settings).admission, PolicyParameters(), bound_s=bound_s)


class NotOnSundays:
    @hookimpl
    def disagg_admit(self, snapshot: AdmissionSnapshot) -> Admission | None:
        return Refused("sunday", 60) if snapshot.request.prompt_tokens == 7 else None


def test_a_policy_of_ones_own_is_asked_first_and_may_leave_it_to_the_next() -> None:
    asked = admitter(NotOnSundays())
    sunday = AdmissionSnapshot(Arrival("low", 7), CLASSES)
    assert (asked.ask(sunday).reason, asked.decided_by) == ("sunday", "own")
    assert (asked.ask(IDLE).reason, asked.decided_by) == ("fits", "projected")


def test_the_policy_is_chosen_by_name() -> None:
    assert admitter().ask(CROWDED).reason == "ttft"
    assert admitter(admission="current_queue").ask(CROWDED).reason == "fits"  # 9 requests, it knows no tokens
    with pytest.raises(ConfigError, match="there are projected, current_queue"):
        admitter(admission="guess")


def test_the_parameters_come_from_the_settings() -> None:
    chosen = choose(load_plugins()).admission
    lenient = Admitter(chosen, PolicyParameters(reject_on_slo_violation=False))
    assert lenient.ask(CROWDED).reason == "late"
    strict = Admitter(chosen, PolicyParameters(reject_on_slo_violation=False, low_priority_threshold_s=0.5))
    assert strict.ask(CROWDED).reason == "low_priority"


@pytest.mark.parametrize(
    "nonsense",
    [
        pytest.param("yes", id="a word"),
        pytest.param(Refused("busy", 0), id="retry at once"),
        pytest.param(Refused("busy", 1.5), id="a fraction of a second"),  # type: ignore[arg-type]
        pytest.param(Refused("Too busy!", 1), id="no word for a counter"),
        pytest.param(Refused("busy", 1, unavailable="yes"), id="unavailable is a word"),  # type: ignore[arg-type]
        pytest.param(Admitted("fits", steps=("fire_everybody",)), id="a step that the class does not have"),
        pytest.param(Admitted("fits", level=-1), id="a negative level"),
        pytest.param(Admitted("fits", ttft_s=float("nan")), id="not a number"),
    ],
)
def test_nonsense_is_not_believed_and_disables_after_three_times(nonsense: object) -> None:
    class Confused:
        @hookimpl
        def disagg_admit(self, snapshot: AdmissionSnapshot, parameters: PolicyParameters) -> object:
            return nonsense

    asked = admitter(Confused(), bound_s=5.0)
    for _ in range(4):
        assert (asked.ask(IDLE).reason, asked.decided_by) == ("fits", "projected")
    assert asked.status()["disabled"] == ["own"]


def test_a_policy_that_hangs_does_not_hold_up_the_event_loop() -> None:
    forever = threading.Event()

    class Hangs:
        @hookimpl
        def disagg_admit(self, snapshot: AdmissionSnapshot) -> None:
            forever.wait()

    asked = admitter(Hangs(), bound_s=0.005)
    assert asked.ask(IDLE).reason == "fits"
    assert asked.problems == {"own late": 1}
    forever.set()


def test_a_built_in_that_raises_lets_the_request_in() -> None:
    """A class that does not exist: whoever made that snapshot was wrong, and nobody is turned away for it."""
    asked = admitter()
    answer = asked.ask(AdmissionSnapshot(Arrival("gold", 1), CLASSES))
    assert (answer, asked.decided_by) == (Admitted("policy_error"), "nobody")
