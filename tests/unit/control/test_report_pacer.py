"""Load reports come soon after a change, at most every 20 ms, at least every 500 ms, and an idle engine sleeps."""

from hypothesis import given
from hypothesis import strategies as st
from unit.control.virtual import VirtualLoop

from disagg_plugin.control.report_pacer import AT_MOST_EVERY_S, ReportPacer

PROMISED_S = 0.5


class Bench:
    def __init__(self) -> None:
        self.loop = VirtualLoop()
        self.sent_s: list[float] = []
        self.listening = True
        self.pacer = ReportPacer(self.report, post=self.loop.post, later=self.loop.later, clock=self.loop.clock)

    def report(self) -> bool:
        self.sent_s.append(self.loop.now_s)
        return self.listening

    def gaps_s(self) -> list[float]:
        return [b - a for a, b in zip(self.sent_s, self.sent_s[1:], strict=False)]


@given(st.lists(st.floats(0, 0.7), min_size=1, max_size=60))
def test_reports_keep_their_distance_and_none_is_late(pauses_s: list[float]) -> None:
    bench = Bench()
    for pause_s in pauses_s:
        bench.pacer.changed()
        changed_s = bench.loop.now_s
        bench.loop.pass_s(pause_s)
        if pause_s >= AT_MOST_EVERY_S:
            assert bench.sent_s[-1] >= changed_s, "a change is reported within 20 ms"
    bench.loop.pass_s(2.0)
    assert all(AT_MOST_EVERY_S - 1e-9 <= gap_s < PROMISED_S for gap_s in bench.gaps_s())
    assert bench.loop.now_s - bench.sent_s[-1] < PROMISED_S


def test_a_thousand_steps_wake_the_io_thread_once_a_report() -> None:
    bench = Bench()
    for _ in range(1_000):
        bench.pacer.changed()
        bench.loop.pass_s(0.001)
    assert len(bench.sent_s) <= 51
    assert bench.loop.posts <= len(bench.sent_s)


def test_an_idle_engine_is_woken_by_the_slow_timer_alone() -> None:
    bench = Bench()
    bench.pacer.changed()
    bench.loop.pass_s(10.0)
    assert bench.loop.posts == 1
    assert bench.loop.wakeups <= 10.0 / 0.4


def test_nobody_listening_nothing_wakes() -> None:
    bench = Bench()
    bench.listening = False
    bench.pacer.changed()
    bench.loop.pass_s(10.0)
    assert (len(bench.sent_s), bench.loop.wakeups) == (1, 0)
    bench.pacer.changed()
    bench.loop.pass_s(0.1)
    assert len(bench.sent_s) == 2
