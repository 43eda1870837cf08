"""Asks the chosen admission policies: in time, whatever they do, and never raises."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence

from disagg_plugin.hookspecs import PolicyParameters
from disagg_plugin.plugins import Policy
from disagg_plugin.serving.answers import wrong_with_admission
from disagg_plugin.serving.policy_chain import PolicyChain
from disagg_policies.admission_snapshots import Admission, AdmissionSnapshot, Admitted

logger = logging.getLogger(__name__)

NOBODY = "nobody"  # the built-in itself raised


class Admitter:
    """One chain of admission policies; all calls from the API server's event loop.

    Attributes:
        decided_by: Name of the policy that gave the last answer.
        problems: How often which foreign policy did what wrong.
    """

    def __init__(
        self,
        policies: Sequence[Policy],
        parameters: PolicyParameters,
        *,
        bound_s: float = 0.005,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            policies: In the order in which they are asked; ``plugins.choose(...).admission``.
            bound_s: Longest wait for other people's policies, a request.
        """
        self._chain = PolicyChain(policies, "snapshot", wrong_with_admission)
        self._parameters = parameters
        self._bound_s = bound_s
        self._clock = clock
        self.decided_by = ""
        self.problems: Counter[str] = Counter()
        self.builtin_errors = 0

    def ask(self, snapshot: AdmissionSnapshot) -> Admission:
        """The first answer of the chain; where a built-in fails, the request is admitted."""
        started_s, problems = self._clock(), list[str]()

        def left_s() -> float:
            return self._bound_s - (self._clock() - started_s)

        answer: Admission
        try:
            answer, self.decided_by = self._chain.answer(snapshot, self._parameters, left_s, self._bound_s, problems)
        except Exception as error:  # a policy that raises never takes a request down, ours included
            self.builtin_errors += 1
            if self.builtin_errors == 1:
                logger.exception("disagg: an admission policy raised; requests are admitted meanwhile", exc_info=error)
            answer, self.decided_by = Admitted("policy_error", level=snapshot.level), NOBODY
        for problem in problems:
            self.problems[problem.partition(":")[0]] += 1
        return answer

    def status(self) -> dict[str, object]:
        """Which policies are asked, in order, and how they do."""
        return {
            "chain": [*(foreign.policy.name for foreign in self._chain.foreign), self._chain.builtin.name],
            "disabled": [foreign.policy.name for foreign in self._chain.foreign if foreign.strikes.disabled],
            "problems": dict(self.problems),
            "builtin_errors": self.builtin_errors,
        }

    def close(self) -> None:
        """Let the threads of foreign policies end; waits for none."""
        self._chain.close()
