"""A thread that did not run judges nobody by its own absence."""

from disagg_plugin.control.own_pauses import OwnPauses, excused


def test_looks_in_time_excuse_nothing() -> None:
    pauses = OwnPauses(0.5)
    assert [pauses.since_last_look_s(s) for s in (10.0, 10.5, 11.1, 12.0)] == [0.0, 0.0, 0.0, 0.0]


def test_a_pause_is_what_goes_beyond_the_interval() -> None:
    pauses = OwnPauses(0.5)
    pauses.since_last_look_s(10.0)
    assert pauses.since_last_look_s(18.0) == 7.5
    assert pauses.since_last_look_s(18.5) == 0.0


def test_nobody_is_heard_in_the_future() -> None:
    assert excused(10.0, 7.5, 18.0) == 17.5
    assert excused(17.0, 7.5, 18.0) == 18.0
