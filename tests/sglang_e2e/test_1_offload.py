"""An offloaded prompt gives the tokens of a single SGLang server, however it is asked; only what is missing moves."""

import random
import re
from typing import Any

import pytest
from sglang_e2e.client import Answer, Engine, Offloads, at_once, prompt_of, same_tokens
from sglang_e2e.conftest import PAGE, TOKEN_BYTES, Fleet, is_quiet

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

SHORT = 20


def assert_same(got: Answer, local: Answer) -> None:
    assert same_tokens(got, local), f"{got.output_ids} is not {local.output_ids}"


@pytest.mark.parametrize("tokens", [5, SHORT])
def test_a_short_prompt_is_prefilled_by_the_decode_server_itself(pair: Fleet, tokens: int) -> None:
    counted = Offloads(pair.decode)
    got = pair.decode.generate(prompt_of(tokens))
    assert counted.totals()["offered"] == 0
    assert_same(got, pair.local(prompt_of(tokens)))


@pytest.mark.parametrize("tokens", [33, 64, 200, 257, 511, 1_000])
def test_a_long_prompt_is_prefilled_elsewhere(pair: Fleet, tokens: int) -> None:
    counted = Offloads(pair.decode)
    got = pair.decode.generate(prompt_of(tokens))
    totals = counted.totals()
    assert (totals["offered"], totals["landed"], totals["fallbacks"]) == (1, 1, 0)
    assert totals["raw_bytes"] == (tokens - 1) * TOKEN_BYTES
    assert got.cached_tokens == (tokens - 1) // PAGE * PAGE, "only the last page is computed here"
    assert_same(got, pair.local(prompt_of(tokens)))


def rows(view: dict[str, Any], prompt_tokens: int) -> list[dict[str, Any]]:
    """Of transfers of prompts of this length; a row is written when its request has gone on."""
    return [row for row in view["decode"]["recent"] if row["prompt_tokens"] == prompt_tokens]


def test_chunks_arrive_while_the_prompt_is_still_being_computed(pair: Fleet) -> None:
    pair.decode.generate(prompt_of(3_000, seed=1))
    received = rows(pair.decode.when(lambda v: bool(rows(v, 3_000))), 3_000)[-1]
    sent = {t["transfer_id"]: t for t in pair.prefill.when(is_quiet)["prefill"]["recent"]}
    assert received["chunks"] >= 12
    assert received["first_chunk_s"] < sent[received["transfer_id"]]["last_computed_s"]


def test_eight_at_once_short_and_long_mixed(pair: Fleet) -> None:
    prompts = [prompt_of(tokens, seed=2) for tokens in (SHORT, 300, 700, 5, 64, 1_000, 40, 450)]
    counted = Offloads(pair.decode)
    got = at_once([lambda p=p: pair.decode.generate(p) for p in prompts])
    totals = counted.totals()
    assert (totals["offered"], totals["landed"], totals["fallbacks"]) == (6, 6, 0)
    for prompt, answer in zip(prompts, got, strict=True):
        assert_same(answer, pair.local(prompt))


def test_what_the_decode_server_holds_does_not_travel_again(pair: Fleet) -> None:
    first = prompt_of(400, seed=3)
    longer = first + prompt_of(300, seed=4)
    pair.decode.generate(first)
    counted = Offloads(pair.decode)
    got = pair.decode.generate(longer)
    totals = counted.totals()
    assert (totals["landed"], totals["fallbacks"]) == (1, 0)
    assert totals["raw_bytes"] == (699 - 400) * TOKEN_BYTES
    assert_same(got, pair.local(longer))


def test_what_the_prefill_server_holds_is_sent_without_being_computed_again(pair: Fleet) -> None:
    prompt = prompt_of(400, seed=5)
    pair.decode.generate(prompt)
    pair.decode.flush()
    counted = Offloads(pair.decode)
    got = pair.decode.generate(prompt)
    assert counted.totals()["raw_bytes"] == 399 * TOKEN_BYTES
    pair.prefill.when(lambda _: cached_last(pair) == 384)  # it logs a forward when it has sent what came of it
    assert_same(got, pair.local(prompt))


def cached_last(pair: Fleet) -> int:
    """Cached tokens of the prefill server's last forward."""
    return int(re.findall(r"#cached-token: (\d+)", (pair.folder / "prefill.log").read_text())[-1])


def routed(engine: Engine, prefill: Engine, prompt: list[int], room: int) -> Answer:
    """What SGLang's routers send to both servers."""
    fields = {"bootstrap_host": "127.0.0.1", "bootstrap_port": prefill.bootstrap_port, "bootstrap_room": room}
    return engine.generate(prompt, **fields)


@pytest.mark.parametrize("tokens", [10, 333, 900])
def test_bootstrap_fields_sent_to_both_servers_work_as_with_any_backend(pair: Fleet, tokens: int) -> None:
    prompt, room = prompt_of(tokens, seed=6), random.Random(tokens).getrandbits(63)
    counted = Offloads(pair.decode)
    _, got = at_once([lambda e=e: routed(e, pair.prefill, prompt, room) for e in (pair.prefill, pair.decode)])
    totals = counted.totals()
    assert counted.decisions() == {"routed": 1}
    assert (totals["landed"], totals["fallbacks"]) == (1, 0)
    assert_same(got, pair.local(prompt))


def test_a_route_to_an_unknown_prefill_server_is_served_locally(pair: Fleet) -> None:
    fields = {"bootstrap_host": "10.1.2.3", "bootstrap_port": 8998, "bootstrap_room": 7}
    counted = Offloads(pair.decode)
    got = pair.decode.generate(prompt_of(100, seed=7), **fields)
    assert counted.decisions() == {"unknown_bootstrap_host": 1}
    assert_same(got, pair.local(prompt_of(100, seed=7)))


def test_a_stream_and_a_chat_and_a_completion_say_what_a_single_server_says(pair: Fleet) -> None:
    prompt = prompt_of(200, seed=8)
    counted = Offloads(pair.decode)
    chat = {"messages": [{"role": "user", "content": "Tell me of the sea. " * 30}], "max_tokens": 8, "temperature": 0}
    completion = {"prompt": prompt_of(150, seed=9), "max_tokens": 8, "temperature": 0}
    for engine in (pair.decode, pair.stock):
        engine.flush()
    ours, single = [
        (
            engine.stream(prompt),
            engine.post("/v1/chat/completions", model=engine.model, **chat)["choices"][0]["message"]["content"],
            engine.post("/v1/completions", model=engine.model, **completion)["choices"][0]["text"],
        )
        for engine in (pair.decode, pair.stock)
    ]
    assert ours == single
    assert counted.totals()["landed"] == 3


def test_a_batch_of_prompts_and_two_samples_of_one(pair: Fleet) -> None:
    prompts = [prompt_of(tokens, seed=10) for tokens in (300, 12, 90)]
    sampling = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
    counted = Offloads(pair.decode)
    batch = [r["output_ids"] for r in pair.decode.post("/generate", input_ids=prompts, sampling_params=sampling)]
    assert counted.totals()["landed"] == 2
    two = pair.decode.post("/generate", input_ids=prompt_of(200, seed=11), sampling_params={**sampling, "n": 2})
    assert counted.totals()["landed"] == 3, "the second sample finds the prompt cached"
    for prompt, output_ids in zip(prompts, batch, strict=True):
        assert output_ids == list(pair.local(prompt, max_new_tokens=8).output_ids)
    single = list(pair.local(prompt_of(200, seed=11), max_new_tokens=8).output_ids)
    assert [sample["output_ids"] for sample in two] == [single, single]


def test_openai_batches_and_several_choices(pair: Fleet) -> None:
    """Two prompts, three choices each, over completions; two over chat."""
    prompts = [prompt_of(tokens, seed=13) for tokens in (120, 200)]
    completions = {"prompt": prompts, "n": 3, "max_tokens": 6, "temperature": 0}
    chat = {"messages": [{"role": "user", "content": "Of ships. " * 40}], "n": 2, "max_tokens": 6, "temperature": 0}
    counted = Offloads(pair.decode)
    pair.stock.flush()
    ours, single = [
        (
            [c["text"] for c in engine.post("/v1/completions", model=engine.model, **completions)["choices"]],
            [
                c["message"]["content"]
                for c in engine.post("/v1/chat/completions", model=engine.model, **chat)["choices"]
            ],
        )
        for engine in (pair.decode, pair.stock)
    ]
    assert ours == single
    assert [len(part) for part in ours] == [6, 2]
    assert counted.totals()["landed"] >= 3
    assert counted.totals()["fallbacks"] == 0


def test_sampling_belongs_to_the_decode_server(pair: Fleet) -> None:
    """A JSON grammar, and logprobs of the prompt: what a single server gives.

    (Of this SGLang's samplers on a CPU none honours a seed: see tests/cross_engine for temperature with a seed.)
    """
    prompt = prompt_of(120, seed=12)
    schema = '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'
    grammar = {"max_new_tokens": 12, "temperature": 0, "json_schema": schema}
    counted = Offloads(pair.decode)
    got = pair.decode.generate(prompt, sampling_params=grammar)
    assert_same(got, pair.local(prompt, sampling_params=grammar))
    assert counted.totals()["landed"] == 1
    pair.decode.generate(prompt, logprob_start_len=0)
    assert counted.decisions()["prompt_logprobs"] == 1
