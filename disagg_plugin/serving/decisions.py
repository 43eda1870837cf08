"""Runs the chosen policies for one request after another: in time, whatever they do, and explained afterwards.

    record = decider.decide(prompt, decode, workers, overlap_tokens)      # placement, then offload; DecisionRecord

A chain that holds built-ins only is evaluated inline: they are pure arithmetic over frozen values, take tens of
microseconds, and a hop to another thread and back would cost as much and win nothing. Somebody else's policy is asked
on a thread of its own for a bounded time (``bounded``); when it is late, raises or answers nonsense, the next of its
chain answers, at last a built-in.

All policies of one decision share the bound. One is asked only while at least half of it is left, so that a slow
policy does not make the next one look late.

``decide`` is called from one thread; ``row``\\ s, ``status`` and ``choose_codec`` may be from others.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence

from disagg_plugin.hookspecs import PolicyParameters
from disagg_plugin.plugins import Chosen, Kind
from disagg_plugin.serving import answers
from disagg_plugin.serving.decision_record import DecisionRecord, to_json
from disagg_plugin.serving.policy_chain import PolicyChain
from disagg_policies.snapshots import (
    Codec,
    CodecChoices,
    DecodeState,
    Local,
    Offload,
    PolicyState,
    Prompt,
    Snapshot,
    WorkerState,
    remember,
)

logger = logging.getLogger(__name__)

RECENT_DECISIONS = 256
MAX_REASONS = 64  # each is a metric's label; what a policy invents beyond counts as "other"
NOBODY = "nobody"  # in a record: the built-in itself raised


class Decider:
    """The decisions of one decode engine."""

    def __init__(
        self,
        chosen: Chosen,
        parameters: PolicyParameters | None = None,
        *,
        bound_s: float = 0.005,
        log_interval_s: float | None = 10.0,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        state: PolicyState | None = None,
    ) -> None:
        """
        Args:
            bound_s: Longest wait for other people's policies, a decision.
            log_interval_s: At most one decision in so long goes to the log; None: none.
            state: What was decided before, for hysteresis and taking turns.
        """
        self._placement = PolicyChain(chosen.placement, "snapshot", answers.wrong_with_placement)
        self._offload = PolicyChain(chosen.offload, "snapshot", answers.wrong_with_decision)
        self._codec = PolicyChain(chosen.codec, "choices", answers.wrong_with_codec)
        self._parameters = parameters or PolicyParameters()
        self._bound_s = bound_s
        self._log_interval_s = log_interval_s
        self._log_due_s = float("-inf")
        self._clock = clock
        self._wall_clock = wall_clock
        self._state = state or PolicyState()
        self._records: deque[DecisionRecord] = deque(maxlen=RECENT_DECISIONS)
        self._codecs: dict[str, dict[str, object]] = {}
        self.reasons: Counter[str] = Counter()
        self.builtin_errors = 0

    def decide(
        self,
        prompt: Prompt,
        decode: DecodeState,
        workers: tuple[WorkerState, ...],
        overlap_tokens: tuple[int, ...] = (),
    ) -> DecisionRecord:
        """Place one prompt, then decide; waits for foreign policies ``bound_s`` at most, and never raises.

        Args:
            overlap_tokens: Leading tokens of the prompt that each worker holds, in the order of ``workers``, or ().
        """
        started_s = self._clock()
        parameters, previous, bound_s = self._parameters, self._state, self._bound_s
        problems: list[str] = []

        def left_s() -> float:
            return bound_s - (self._clock() - started_s)

        snapshot = Snapshot(prompt, decode, workers, overlap_tokens, started_s, previous)
        try:
            placement, placed_by = self._placement.answer(snapshot, parameters, left_s, bound_s, problems)
            snapshot = Snapshot(prompt, decode, workers, overlap_tokens, started_s, previous, placement)
            decision, decided_by = self._offload.answer(snapshot, parameters, left_s, bound_s, problems)
        except Exception as error:  # noqa: BLE001 - a policy that raises never takes a request down, ours included
            decision, placed_by, decided_by = self._failed(error), NOBODY, NOBODY
        offloaded = type(decision) is Offload
        if offloaded or decision.remote_ttft_s is not None:
            self._state = remember(previous, prompt, decision, placed=offloaded)
        reason = decision.reason
        if reason not in self.reasons and len(self.reasons) >= MAX_REASONS:
            reason = "other"
        self.reasons[reason] += 1
        now_s = self._clock()
        record = DecisionRecord(
            snapshot,
            parameters,
            decision,
            placed_by,
            decided_by,
            self._wall_clock(),
            now_s - started_s,
            tuple(problems) if problems else (),
        )
        self._records.append(record)
        if self._log_interval_s is not None and now_s >= self._log_due_s:
            self._log_due_s = now_s + self._log_interval_s
            self._log(record)
        return record

    def choose_codec(self, worker: str, choices: CodecChoices) -> Codec:
        """How KV from ``worker`` travels; bounded and safe as ``decide`` is."""
        started_s = self._clock()
        problems: list[str] = []

        def left_s() -> float:
            return self._bound_s - (self._clock() - started_s)

        codec: Codec
        try:
            codec, by = self._codec.answer(choices, self._parameters, left_s, self._bound_s, problems)
        except Exception as error:  # noqa: BLE001 - as above
            codec, by = Codec("raw", self._failed(error).reason, 0.0, 0.0), NOBODY
        self._codecs[worker] = {"codec": codec.name, "reason": codec.reason, "chosen_by": by, "problems": problems}
        return codec

    def rows(self, last: int = RECENT_DECISIONS) -> list[dict[str, object]]:
        """The most recent decisions in short, the oldest first; the debug snapshot's ``decision_log``."""
        return [record.row() for record in list(self._records)[-last:]]

    def records(self) -> Sequence[DecisionRecord]:
        """The most recent decisions in full, the oldest first."""
        return list(self._records)

    def status(self) -> dict[str, object]:
        """Which policies are asked, in order, and how they do."""
        kinds: Iterable[tuple[Kind, PolicyChain]] = (
            ("placement", self._placement),
            ("offload", self._offload),
            ("codec", self._codec),
        )
        return {
            "chains": {kind: [*(f.policy.name for f in chain.foreign), chain.builtin.name] for kind, chain in kinds},
            "failures": {
                f"{kind} {foreign.policy.name}": dict(foreign.failures)
                for kind, chain in kinds
                for foreign in chain.foreign
            },
            "disabled": [
                f"{kind} {foreign.policy.name}"
                for kind, chain in kinds
                for foreign in chain.foreign
                if foreign.strikes.disabled
            ],
            "builtin_errors": self.builtin_errors,
            "codecs": dict(self._codecs),
        }

    def close(self) -> None:
        """Let the threads of foreign policies end; waits for none."""
        for chain in (self._placement, self._offload, self._codec):
            chain.close()

    def _failed(self, error: Exception) -> Local:
        self.builtin_errors += 1
        if self.builtin_errors == 1:
            logger.exception("disagg: a built-in policy raised; prompts stay local meanwhile", exc_info=error)
        return Local("policy_error")

    def _log(self, record: DecisionRecord) -> None:
        if logger.isEnabledFor(logging.INFO):
            try:
                logger.info("disagg: decision %s", to_json(record))
            except (ValueError, TypeError) as error:  # a request id that is no UTF-8, say
                logger.info("disagg: a decision cannot be written as JSON: %s", error)
