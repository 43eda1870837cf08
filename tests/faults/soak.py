"""Many requests, something going wrong all the time: nothing lost, hung, wrong or leaked. Seeded, not timed."""

import random
import signal
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from faults.harness import EngineProcess, Fleet, Front, eventually

ENDS_WITHIN_S = 60.0  # several deadlines in a row, on a machine that does other things as well
ENDED = ("finished", "aborted")
PAUSES_S = (0.0, 0.005, 0.02, 0.1)


@dataclass
class Tally:
    """What became of the requests.

    Attributes:
        died: Requests of a decode engine that was killed; their clients saw the connection break.
        leaked: Kinds of things left over after a round, over all rounds.
    """

    requests: int = 0
    lost: int = 0
    hung: int = 0
    wrong: int = 0
    leaked: int = 0
    died: int = 0
    by_fault: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    found: list[str] = field(default_factory=list)

    def report(self) -> dict[str, object]:
        return {
            "requests": self.requests,
            "lost": self.lost,
            "hung": self.hung,
            "wrong": self.wrong,
            "leaked": self.leaked,
            "died_with_d": self.died,
            "by_fault": dict(sorted(self.by_fault.items())),
            "outcomes": dict(sorted(self.outcomes.items())),
        }


class Soak:
    """Rounds of requests with one fault each.

    Args:
        fleet: Two prefill engines and a decode engine.
    """

    def __init__(self, fleet: Fleet, seed: int) -> None:
        self.fleet = fleet
        self.tally = Tally()
        self._random = random.Random(seed)
        self._faults: dict[str, Callable[[list[str]], None]] = {
            "none": lambda _: None,
            "p_killed": self._p_killed,
            "p_stopped": self._p_stopped,
            "p_slow": self._p_slow,
            "p_preempts": lambda _: self._p().ask("preempt"),
            "p_refuses": lambda _: self._p().gates(load=20),
            "p_answers_503": lambda _: self._p().gates(http_status=503),
            "d_aborts": self._d_aborts,
            "d_preempts": self._d_preempts,
            "d_killed": self._d_killed,
            "http_cut": lambda _: self._front().http.cut(),
            "side_cut": lambda _: self._front().side.cut(),
            "kv_cut": self._kv_cut,
            "kv_stalled": self._kv_stalled,
            "kv_throttled": lambda _: self._front("d").kv.throttle(500_000.0),
            "chunk_corrupt": lambda _: self._p().ask("faults", names=["", "corrupt", "", "corrupt"]),
            "chunk_corrupt_twice": lambda _: self._p().ask("faults", all_corrupt=True),
            "chunk_truncated": lambda _: self._p().ask("faults", names=["truncate", "short", "", "stale"]),
            "chunk_replayed": lambda _: self._p().ask("faults", names=["replay", "foreign", "other_slot", "replay"]),
            "chunk_late": self._chunk_late,
        }

    def run(self, requests: int, per_round: int = 10) -> Tally:
        """Until so many requests were sent."""
        names: list[str] = []
        while self.tally.requests < requests:
            if not names:  # all of them, in another order each time
                names = self._random.sample(sorted(self._faults), len(self._faults))
            self._round(names.pop(), min(per_round, requests - self.tally.requests))
        return self.tally

    def _round(self, fault: str, count: int) -> None:
        before, after = self._random.randint(1, count), self._random.choice(PAUSES_S)
        sent = [self._send() for _ in range(before)]
        threading.Event().wait(after)
        died = self.tally.died
        self._faults[fault](sent)
        sent += [self._send() for _ in range(count - before)]
        self.tally.requests += count
        self.tally.by_fault[fault] += count
        alive = sent[before:] if self.tally.died > died else sent
        self._await(alive, fault)
        self._mend()
        self._look_for_leaks(fault)
        self.fleet.d.ask("forget")

    def _send(self) -> str:
        return self.fleet.send(self._random.choice((20, 90, 200, 333, 500)))

    def _await(self, requests: list[str], fault: str) -> None:
        def all_ended() -> bool:
            jobs = self.fleet.d.ask("jobs")
            return all(jobs[name]["state"] in ENDED for name in requests if name in jobs)

        try:
            eventually(all_ended, "", ENDS_WITHIN_S)
        except AssertionError:
            self.tally.found.append(f"{fault}: {self.fleet.describe()}")
        jobs = self.fleet.d.ask("jobs")
        self.tally.lost += sum(name not in jobs for name in requests)
        self.tally.hung += sum(jobs[name]["state"] not in ENDED for name in requests if name in jobs)
        wrong = self.fleet.d.state()["wrong"]
        self.tally.wrong += len([name for name in requests if name in wrong])
        for name in requests:
            job = jobs.get(name, {"state": "lost", "landed": 0, "locally": 0})
            self.tally.outcomes[_outcome(job)] += 1

    def _look_for_leaks(self, fault: str) -> None:
        try:
            eventually(lambda: not self.fleet.leaks(), "", ENDS_WITHIN_S)
        except AssertionError:
            leaks = self.fleet.leaks()
            self.tally.leaked += len(leaks)
            self.tally.found.append(f"{fault}: {leaks}\n{self.fleet.describe()}")

    # -- faults ------------------------------------------------------------------------------------------------

    def _p(self) -> EngineProcess:
        return self.fleet.engines[self._name()]

    def _name(self) -> str:
        return self._random.choice(self.fleet.names)

    def _front(self, name: str = "") -> Front:
        return self.fleet.fronts[name or self._name()]

    def _p_killed(self, _sent: list[str]) -> None:
        self.fleet.restart(self._name())

    def _p_stopped(self, _sent: list[str]) -> None:
        engine = self._p()
        engine.signal(signal.SIGSTOP)
        threading.Event().wait(self._random.choice((0.05, 0.4, 1.2)))
        engine.signal(signal.SIGCONT)

    def _p_slow(self, _sent: list[str]) -> None:
        engine = self._p()
        engine.gates(tokens=self._random.choice((1, 64, 128)))
        threading.Event().wait(self._random.choice((0.05, 1.2)))
        engine.gates(tokens=0)

    def _d_aborts(self, sent: list[str]) -> None:
        for name in self._random.sample(sent, self._random.randint(1, len(sent))):
            self.fleet.d.ask("abort", request_id=name)

    def _d_preempts(self, sent: list[str]) -> None:
        for name in sent:
            self.fleet.d.ask("preempt", request_id=name)

    def _d_killed(self, sent: list[str]) -> None:
        self.tally.died += len(sent)
        self.tally.outcomes["died_with_d"] += len(sent)
        self.fleet.restart("d")

    def _kv_cut(self, _sent: list[str]) -> None:
        self._front().kv.cut()
        if self._random.random() < 0.5:
            self._front("d").kv.cut()

    def _kv_stalled(self, _sent: list[str]) -> None:
        links = self._front().kv, self._front("d").kv
        for link in links:
            link.stall()
        threading.Event().wait(self._random.choice((0.1, 1.2)))
        for link in links:
            link.heal()

    def _chunk_late(self, _sent: list[str]) -> None:
        engine = self._p()
        engine.ask("faults", names=["", "late", "", "late"])
        threading.Event().wait(self._random.choice((0.05, 1.2)))
        engine.ask("late_writes")

    def _mend(self) -> None:
        self.fleet.heal()
        for name, engine in self.fleet.engines.items():
            if name != "d":
                engine.ask("faults")
                engine.ask("late_writes")
                engine.gates(load=0, http_status=0, tokens=0)


def _outcome(job: dict[str, object]) -> str:
    if job["state"] != "finished":
        return str(job["state"])
    if not job["landed"]:
        return "local"
    return "offloaded" if job["locally"] == 1 else "kept"
