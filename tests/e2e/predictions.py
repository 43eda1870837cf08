"""Does a cache predict what another one predicts? Teacher forcing over real engines, one token's logprobs at a time."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from e2e.client import Engine, at_once

TOP = 200
AT_ONCE = 5
TOPICS = (
    "The lighthouse keeper wrote in his diary every evening, even in winter when",
    "A compiler translates a program in several passes. First it",
    "In 1666 a great fire destroyed most of the city. Historians agree that",
    "To bake bread you need flour, water, salt and patience. Begin by",
    "The patient was admitted with a fever and a persistent cough; the doctors",
)


@dataclass(frozen=True)
class Compared:
    """One position of a text; ``unnamed`` is the local probability outside the compared tokens."""

    kl: float
    same_choice: bool
    unnamed: float


def ids_of(engine: Engine, text: str) -> list[int]:
    response = engine.http.post(f"{engine.url}/tokenize", json={"model": engine.model, "prompt": text})
    ids: list[int] = response.json()["tokens"]
    return ids


def texts_of(engine: Engine, tokens: int) -> list[list[int]]:
    """One text a topic that the model itself goes on with; all at once, as they cost it hardly more than one."""
    return at_once([lambda t=topic, n=number: _text_of(engine, t, tokens, n) for number, topic in enumerate(TOPICS)])


def _text_of(engine: Engine, topic: str, tokens: int, seed: int) -> list[int]:
    seed_ids = ids_of(engine, topic)
    body = {"model": engine.model, "prompt": seed_ids, "max_tokens": tokens, "temperature": 0.8, "seed": seed}
    body |= {"ignore_eos": True, "return_token_ids": True, "cache_salt": f"make-{seed}"}
    reply = engine.http.post(f"{engine.url}/v1/completions", json=body).json()
    ids: list[int] = (seed_ids + reply["choices"][0]["token_ids"])[:tokens]
    return ids


def top_logprobs(engine: Engine, prompt: list[int], salt: str) -> dict[str, float]:
    """Logprobs of the most likely next tokens, by token id."""
    body = {"model": engine.model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": TOP}
    body |= {"cache_salt": salt, "return_tokens_as_token_ids": True}
    response = engine.http.post(f"{engine.url}/v1/completions", json=body)
    assert response.status_code == 200, response.text
    top: dict[str, float] = response.json()["choices"][0]["logprobs"]["top_logprobs"][0]
    return top


def kl_divergence(local: dict[str, float], other: dict[str, float]) -> float:
    """KL(local || other) in nats, over the tokens that both name and one bucket for all others.

    The bucket bounds the tail from below by the data-processing inequality; with 200 tokens named it holds little.
    """
    both = local.keys() & other.keys()
    kl = sum(math.exp(local[t]) * (local[t] - other[t]) for t in both)
    rest_p = max(1e-12, 1 - sum(math.exp(local[t]) for t in both))
    rest_q = max(1e-12, 1 - sum(math.exp(other[t]) for t in both))
    return kl + rest_p * math.log(rest_p / rest_q)


def compare(
    ids: list[int],
    context_tokens: int,
    local: Callable[[list[int]], dict[str, float]],
    other: Callable[[list[int]], dict[str, float]],
) -> list[Compared]:
    """Both asked for what follows each prefix of ``ids`` that is longer than the context.

    The first one alone: it brings the context into the engines' caches. The others a few at a time.
    """
    first, found = context_tokens + 1, []
    windows = [range(first, first + 1)]
    windows += [range(at, min(at + AT_ONCE, len(ids) + 1)) for at in range(first + 1, len(ids) + 1, AT_ONCE)]
    answers = []
    for window in windows:
        both = [[lambda n=end: local(ids[:n]), lambda n=end: other(ids[:n])] for end in window]
        answers += at_once([call for pair in both for call in pair])
    for ours, theirs in zip(answers[::2], answers[1::2], strict=True):
        named = sum(math.exp(ours[t]) for t in ours.keys() & theirs.keys())
        same = max(ours, key=ours.__getitem__) == max(theirs, key=theirs.__getitem__)
        found.append(Compared(kl_divergence(ours, theirs), same, 1 - named))
    return found


def assert_predicts_the_same(compared: Sequence[Compared]) -> tuple[float, float]:
    """(mean KL, share of equal first choices), within the bound that int8 KV must keep."""
    mean_kl = sum(c.kl for c in compared) / len(compared)
    agreement = sum(c.same_choice for c in compared) / len(compared)
    print(f"\n{len(compared)} positions: mean KL {mean_kl:.2e}, top-1 agreement {agreement:.4f}")
    assert len(compared) >= 500
    assert sum(c.unnamed for c in compared) / len(compared) < 0.2, "most of the probability is compared by token"
    assert mean_kl <= 5e-4
    assert agreement >= 0.99
    return mean_kl, agreement
