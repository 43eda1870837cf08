"""A chain of policies of one kind: foreign ones in order, each bounded and checked, at last a built-in.

A chain that holds built-ins only is evaluated inline. Somebody else's policy is asked on a thread of its own for a
bounded time (``bounded``); when it is late, raises or answers nonsense, the next of its chain answers.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from disagg_plugin.hookspecs import PolicyParameters
from disagg_plugin.plugins import HOOKS, Policy
from disagg_plugin.serving.bounded import STRIKES, Answered, BoundedHook, Late, Outcome, Raised, Strikes

logger = logging.getLogger(__name__)


class ForeignPolicy:
    """Somebody else's policy in a chain: bounded, checked, and disabled after three failures in a row."""

    def __init__(self, policy: Policy, check: Callable[[Any, Any], str]) -> None:
        self.policy = policy
        self.strikes = Strikes()
        self.failures: Counter[str] = Counter()
        self._check = check
        self._hook: BoundedHook[dict[str, object]] = BoundedHook(
            lambda arguments: policy.call(**arguments), name=f"{policy.name} {policy.kind}"
        )

    def ask(self, subject: object, parameters: PolicyParameters, argument: str, wait_s: float) -> tuple[object, str]:
        """Answer and problem; an answer of None without a problem leaves it to the next."""
        outcome = self._hook.ask({argument: subject, "parameters": parameters}, wait_s=wait_s)
        problem = self._problem(outcome, subject)
        if not problem:
            self.strikes.success()
            return (outcome.value if isinstance(outcome, Answered) else None), ""
        what, _, detail = problem.partition(": ")
        self.failures[what] += 1
        if self.strikes.failure():
            self._hook.close()
            logger.error(
                "disagg: policy %s is disabled until restart: %s failed %d times in a row, at last %s; "
                "the next in its chain answers",
                self.policy.name,
                HOOKS[self.policy.kind],
                STRIKES,
                problem,
            )
        return None, f"{self.policy.name} {what}" + (f": {detail[:200]}" if detail else "")

    def _problem(self, outcome: Outcome, subject: object) -> str:
        match outcome:
            case Late():
                return "late"
            case Raised(error):
                return f"raised: {type(error).__name__}: {error}"
            case Answered(None):
                return ""
            case Answered(value):
                nonsense = self._check(value, subject)
                return f"nonsense: {nonsense}" if nonsense else ""

    def close(self) -> None:
        self._hook.close()


class PolicyChain:
    """The policies of one kind, in order."""

    def __init__(self, policies: Sequence[Policy], argument: str, check: Callable[[Any, Any], str]) -> None:
        self.foreign = tuple(ForeignPolicy(policy, check) for policy in policies[:-1])
        self.builtin = policies[-1]
        self._argument = argument
        self._call = self.builtin.call

    def answer(
        self,
        subject: object,
        parameters: PolicyParameters,
        left_s: Callable[[], float],
        bound_s: float,
        problems: list[str],
    ) -> tuple[Any, str]:
        """The first answer and the name of who gave it."""
        for foreign in self.foreign:
            if foreign.strikes.disabled:
                continue
            wait_s = left_s()
            if wait_s < bound_s / 2:
                problems.append(f"{foreign.policy.name} not asked: no time left")
                continue
            answer, problem = foreign.ask(subject, parameters, self._argument, wait_s)
            if problem:
                problems.append(problem)
            elif answer is not None:
                return answer, foreign.policy.name
        return self._call(**{self._argument: subject, "parameters": parameters}), self.builtin.name

    def close(self) -> None:
        for foreign in self.foreign:
            foreign.close()
