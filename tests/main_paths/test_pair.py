"""What a prefill and a decode engine are for, on one real pair: vLLM's or SGLang's, whichever this environment has.

The last tests take the prefill engine away. Everything else about real engines is in ``e2e`` and ``sglang_e2e``.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from either_engine import Answer, Kind, Server, agreement, at_once, has_worker, planned, prompt_of, start
from engine_processes import SGLANG_STANDS_TIMES, STANDS_TIMES, end_tree, is_alive, slowed
from models import tiny

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

KIND: Kind = "vllm" if find_spec("vllm") is not None else "sglang"
MARGIN = 1e-3  # logprobs: two ways of computing a prompt round differently


@dataclass
class Pair:
    """``decode``'s only prefill worker is ``prefill``."""

    prefill: Server
    decode: Server


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("pair")
    transfer = {"slot_bytes": 1 << 20}  # 255 tokens of the tiny model: a long prompt is many chunks
    worker = planned(KIND)
    with ExitStack() as prefill_life, ExitStack() as decode_life:
        prefill, decode = at_once(
            [
                lambda: start(
                    prefill_life, folder, "prefill", KIND, tiny(), role="prefill", at=worker, transfer=transfer
                ),
                lambda: start(
                    decode_life,
                    *(folder, "decode", KIND, tiny()),
                    role="decode",
                    workers=[worker],
                    core=1,
                    transfer=transfer,
                    observability={"admin_route": True},
                ),
            ]
        )
        decode.wait_for_workers()
        decode.generate(prompt_of(600, seed=99))  # the first transfer wires the NIXL agents up
        yield Pair(prefill, decode)


def assert_same(got: Answer, local: Answer) -> None:
    share, worst_gap = agreement([(got, local)])
    assert share == 1 or worst_gap < MARGIN


def totals(decode: Server) -> tuple[int, int]:
    """Offloads that landed, and that did not, so far."""
    side = decode.snapshot()["decode"]
    return side["totals"].get("landed", 0), sum(side["fallbacks"].values())


@pytest.mark.parametrize("tokens", [25, 33, 257, 1_000, 3_500])
def test_a_long_prompt_is_prefilled_elsewhere_and_answered_as_if_it_were_not(pair: Pair, tokens: int) -> None:
    landed, fell_back = totals(pair.decode)
    got = pair.decode.generate(prompt_of(tokens), ignore_eos=True)
    assert totals(pair.decode) == (landed + 1, fell_back)
    assert_same(got, pair.decode.generate(prompt_of(tokens), ignore_eos=True, local=True))
    assert totals(pair.decode) == (landed + 1, fell_back), "the second one was to be local"


def test_a_short_prompt_stays(pair: Pair) -> None:
    before = pair.decode.snapshot()["decode"]["decisions"].get("short_prompt", 0)
    landed = totals(pair.decode)
    pair.decode.generate(prompt_of(20))
    assert totals(pair.decode) == landed
    assert pair.decode.snapshot()["decode"]["decisions"]["short_prompt"] == before + 1


def test_eight_at_once_short_and_long(pair: Pair) -> None:
    prompts = [prompt_of(20 if number % 2 else 700, seed=number) for number in range(8)]
    landed, fell_back = totals(pair.decode)
    got = at_once([lambda p=p: text_of(pair.decode, p, salt="at once") for p in prompts])
    assert totals(pair.decode) == (landed + 4, fell_back)
    for text, prompt in zip(got, prompts, strict=True):
        assert text == text_of(pair.decode, prompt, salt="again", local=True)


def test_a_stream_says_what_one_answer_says(pair: Pair) -> None:
    prompt = prompt_of(400, seed=3)
    landed, fell_back = totals(pair.decode)
    streamed = text_of(pair.decode, prompt, salt="streamed", stream=True)
    assert totals(pair.decode) == (landed + 1, fell_back)
    assert streamed == text_of(pair.decode, prompt, salt="whole", local=True)


def test_a_chat_is_offloaded_too(pair: Pair) -> None:
    message = {"role": "user", "content": "word " * 100}
    landed, fell_back = totals(pair.decode)
    body = {"model": pair.decode.model, "messages": [message], "max_tokens": 8, "temperature": 0}
    assert pair.decode.post("/v1/chat/completions", body)["choices"][0]["message"]["content"]
    assert totals(pair.decode) == (landed + 1, fell_back)


def test_what_the_decode_engine_holds_does_not_travel_again(pair: Pair) -> None:
    def wire_bytes() -> int:
        return int(pair.decode.snapshot()["decode"]["totals"].get("wire_bytes", 0))

    begin, turns = wire_bytes(), []
    for prompt in (prompt_of(1_024, seed=5), prompt_of(1_024, seed=5) + prompt_of(256, seed=6)):
        text_of(pair.decode, prompt, salt="grows")
        turns.append(wire_bytes() - begin - sum(turns))
    assert 0 < turns[1] < turns[0] / 2


def test_it_can_be_watched(pair: Pair) -> None:
    command = [str(Path(sys.executable).with_name("disagg")), "status", pair.decode.url, "--once", "--json"]
    shown = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert shown
    if KIND == "vllm":
        metrics = pair.decode.http.get(f"{pair.decode.url}/metrics").text
        assert "disagg_decisions_total" in metrics


def test_when_the_prefill_engine_dies_in_the_middle_the_answer_still_comes(pair: Pair) -> None:
    prompt = prompt_of(3_500, seed=7)
    local = pair.decode.generate(prompt, ignore_eos=True, local=True)
    landed, fell_back = totals(pair.decode)
    before = chunks_received(pair.decode.snapshot())
    stands_times = STANDS_TIMES if KIND == "vllm" else SGLANG_STANDS_TIMES
    with slowed(pair.prefill, stands_times), ThreadPoolExecutor(1) as pool:
        future = pool.submit(pair.decode.generate, prompt, ignore_eos=True)
        pair.decode.when(lambda view: chunks_received(view) > before)
        end_tree(pair.prefill, signal.SIGKILL)
        got = future.result(timeout=300)
    assert totals(pair.decode) == (landed, fell_back + 1)
    assert_same(got, local)


def test_without_a_prefill_engine_prompts_are_served_as_by_one_engine(pair: Pair) -> None:
    if is_alive(pair.prefill):  # the test before has not run, or in another pair
        end_tree(pair.prefill, signal.SIGKILL)
    pair.decode.when(lambda view: not has_worker(view))
    before = totals(pair.decode)
    text_of(pair.decode, prompt_of(700, seed=8), salt="alone")
    assert totals(pair.decode) == before
    assert pair.decode.snapshot()["decode"]["decisions"]["no_healthy_worker"] >= 1


def chunks_received(view: dict[str, Any]) -> float:
    return sum(rank["chunks_received"] for rank in view["decode"]["ranks"].values())


def text_of(decode: Server, prompt: list[int], *, salt: str = "", stream: bool = False, local: bool = False) -> str:
    """A greedy completion's text; prompts of one salt share what is cached, where the engine knows salts."""
    body: dict[str, Any] = {"model": decode.model, "prompt": prompt, "max_tokens": 12, "temperature": 0}
    body |= {"ignore_eos": True, "stream": stream}
    if decode.kind == "vllm":
        body |= {"cache_salt": salt} | ({"prompt_logprobs": 0} if local else {})
    elif local:
        return text_prefilled_by_sglang(decode, prompt)
    if not stream:
        text: str = decode.post("/v1/completions", body)["choices"][0]["text"]
        return text
    said = ""
    with decode.http.stream("POST", f"{decode.url}/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                said += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
    return said


def text_prefilled_by_sglang(decode: Server, prompt: list[int]) -> str:
    """Its own completion API cannot ask for a prompt's logprobs without the prompt's text."""
    decode.flush()
    sampling = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": prompt, "return_logprob": True, "logprob_start_len": 0, "sampling_params": sampling}
    text: str = decode.post("/generate", body)["text"]
    return text
