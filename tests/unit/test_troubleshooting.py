"""Whatever the plugin says went wrong, docs/troubleshooting.md says what it means and what to do."""

import re
from pathlib import Path

import pytest
import yaml
from reason_words import reason_words

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/troubleshooting.md").read_text()
WORDS = reason_words()
ALERTS = [
    rule["alert"]
    for group in yaml.safe_load((ROOT / "examples/observability/alerts.yml").read_text())["groups"]
    for rule in group["rules"]
    if "alert" in rule
]
NOT_FOR_PEOPLE = frozenset({"get_num_new_matched_tokens"})  # names of the engine's calls
KNOWN = ("queue_full", "peer_lost", "weights_digest", "bad_chunk", "prompt_logprobs", "hold_expired", "local_faster")


@pytest.mark.parametrize("word", sorted(WORDS.keys() - NOT_FOR_PEOPLE))
def test_every_reason_is_explained(word: str) -> None:
    assert f"`{word}`" in PAGE, f"{word} ({WORDS[word]}) is not in docs/troubleshooting.md"


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_is_explained(alert: str) -> None:
    assert f"`{alert}`" in PAGE


@pytest.mark.parametrize("word", KNOWN)
def test_the_search_for_reasons_finds_what_we_know(word: str) -> None:
    assert word in WORDS


def test_every_metric_that_the_page_names_exists() -> None:
    from disagg_plugin.observability.metrics import METRICS

    named = set(re.findall(r"`(disagg_[a-z_]+)[`{]", PAGE))
    assert named <= set(METRICS), named - set(METRICS)


@pytest.mark.parametrize("page", ["troubleshooting", "deployment"])
def test_every_setting_that_a_page_names_exists(page: str) -> None:
    from disagg_plugin.config import DisaggSettings

    text = (ROOT / f"docs/{page}.md").read_text()
    sections = {name: field.annotation for name, field in DisaggSettings.model_fields.items()}
    pattern = r"`(transfer|side_channel|nixl|split_policy|cache|router|policy)\.([a-z_0-9]+)"
    for section, name in re.findall(pattern, text):
        model = sections[section]
        assert name in getattr(model, "model_fields", {}), f"{section}.{name}"
