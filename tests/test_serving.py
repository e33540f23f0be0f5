"""The server as clients see it: what it answers at each strength is what the library computes there."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache

import pytest
import torch

from conftest import random_vector, tiny_lm
from served import Address, served
from weightsteer.lm import LM
from weightsteer.looping import loops, repeated_share
from weightsteer.run_card import StrengthRange
from weightsteer.serving import batch
from weightsteer.vectors.weight_vector import WeightVector

PROMPTS = ("Hello!", "What is 2 + 2?", "Tell me about the sea, the hills and the towns between.", "a")
STRENGTHS = ({}, {"syc": -0.7}, {"syc": 1.0}, {"gloomy": 0.3}, {"syc": -0.7, "gloomy": 0.3})
TOKENS = 12


def _vectors(lm: LM) -> dict[str, WeightVector]:
    syc, gloomy = random_vector(lm, 1), random_vector(lm, 2)
    card = replace(syc.card, strength=StrengthRange(recommended=0.5, negative=-0.5, low=-1.0, high=1.0))
    return {"syc": replace(syc, card=card), "gloomy": gloomy}


@pytest.fixture(scope="module")
def here() -> Iterator[Address]:
    lm = tiny_lm()
    with served(lm, _vectors(lm)) as address:
        yield address


@cache
def _reference() -> tuple[LM, dict[str, WeightVector]]:
    """The same model, in this thread."""
    lm = tiny_lm()
    return lm, _vectors(lm)


@contextmanager
def _steered(strengths: Mapping[str, float]) -> Iterator[LM]:
    """By `applied` blocks, one inside the other."""
    lm, vectors = _reference()
    with ExitStack() as stack:
        for name, k in strengths.items():
            stack.enter_context(vectors[name].applied(lm, k))
        yield lm


def _by_library(prompt: str, strengths: Mapping[str, float]) -> str:
    """The greedy reply; `generate` leaves out blanks around it."""
    with _steered(strengths) as lm:
        return lm.generate([prompt], max_new_tokens=TOKENS)[0]


def _ask(here: Address, prompt: str, **fields: object) -> str:
    body = {"messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": TOKENS, **fields}
    status, _, found = here.ask("/v1/chat/completions", body)
    assert status == 200, found
    return found["choices"][0]["message"]["content"]


def _log_probs(ids: list[int], strengths: Mapping[str, float]) -> torch.Tensor:
    """Log-probabilities (length, vocabulary) after each token of a text, by one plain pass, in float64."""
    with _steered(strengths) as lm, torch.no_grad():
        return torch.log_softmax(lm.model(torch.tensor([ids])).logits[0].double(), -1)


def test_mixed_strengths_at_once_equal_each_alone(here: Address) -> None:
    asked = [(prompt, strengths) for prompt in PROMPTS for strengths in STRENGTHS]
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda each: _ask(here, each[0], k=each[1]), asked))
    alone = [_ask(here, prompt, k=strengths) for prompt, strengths in asked]
    assert together == alone
    assert [text.strip() for text in alone] == [_by_library(prompt, strengths) for prompt, strengths in asked]
    assert len(set(alone)) > 2 * len(PROMPTS)


def test_a_stream_is_the_whole_reply(here: Address) -> None:
    stream = here.client().chat.completions.create(
        model="syc@-0.7",
        messages=[{"role": "user", "content": PROMPTS[1]}],
        temperature=0,
        max_tokens=TOKENS,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices).strip() == _by_library(PROMPTS[1], {"syc": -0.7})
    assert choices[0].delta.role == "assistant"
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["length"]
    assert chunks[-1].usage.completion_tokens == TOKENS


def test_the_fan(here: Address) -> None:
    body = {"messages": [{"role": "user", "content": "Hello!"}], "strengths": list(STRENGTHS), "max_tokens": TOKENS}
    events = here.events("/dial/fan", body)
    texts = ["".join(e.get("delta", "") for e in events if e["index"] == i) for i in range(len(STRENGTHS))]
    assert [text.strip() for text in texts] == [_by_library("Hello!", strengths) for strengths in STRENGTHS]
    ends = {event["index"]: event for event in events if "finish_reason" in event}
    assert [ends[i]["loops"] for i in range(len(texts))] == [loops(text) for text in texts]
    assert [ends[i]["repeated"] for i in range(len(texts))] == [repeated_share(text) for text in texts]


def test_token_kl_is_that_of_scoring(here: Address) -> None:
    body = {"messages": [{"role": "user", "content": "Hello!"}], "reply": "I see.", "strengths": {"syc": -0.7}}
    _, _, found = here.ask("/dial/kl", body)
    exchange = _reference()[0].exchange("Hello!", "I see.")
    base, steered = (_log_probs(exchange.head + exchange.answer, strengths) for strengths in ({}, {"syc": -0.7}))
    kl = (base.exp() * (base - steered)).sum(-1)[len(exchange.head) - 1 : -1]
    assert [token["kl"] for token in found["tokens"]] == pytest.approx(kl.tolist(), rel=1e-3, abs=1e-6)
    assert found["kl"] == pytest.approx(float(kl.mean()), rel=1e-3)
    assert "".join(token["text"] for token in found["tokens"]) == "I see."


@pytest.mark.parametrize("strengths", [{}, {"syc": -0.7}, {"syc": -0.7, "gloomy": 0.3}])
def test_given_tokens_are_scored_as_a_plain_pass_does(here: Address, strengths: dict[str, float]) -> None:
    rows = [[5, 100, 7, 30, 30, 2, 9], [5, 6], [44]]
    body = {"prompt": rows, "k": strengths, "max_tokens": 0, "prompt_logprobs": 0}
    _, _, found = here.ask("/v1/completions", body)
    for row, choice in zip(rows, found["choices"], strict=True):
        expected = _log_probs(row, strengths)
        first, *others = choice["prompt_logprobs"]
        assert first is None
        assert [list(entry) for entry in others] == [[str(token)] for token in row[1:]]
        scores = [entry[str(token)]["logprob"] for entry, token in zip(others, row[1:], strict=True)]
        assert scores == pytest.approx([float(expected[at, token]) for at, token in enumerate(row[1:])], abs=1e-4)
        assert choice["text"] == ""
    assert found["usage"] == {"prompt_tokens": 10, "completion_tokens": 0, "total_tokens": 10}


def test_echoed_prompts_have_log_probs_as_lm_eval_reads_them(here: Address) -> None:
    ids = [5, 100, 7, 30]
    body = {"prompt": [ids], "model": "syc@-0.7", "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
    _, _, found = here.ask("/v1/completions", body)
    expected = _log_probs(ids, {"syc": -0.7})
    logprobs = found["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:4] == pytest.approx(
        [float(expected[at, token]) for at, token in enumerate(ids[1:])], abs=1e-4
    )
    assert logprobs["token_logprobs"][4] == pytest.approx(float(expected[3].max()), abs=1e-4)
    for top, row in zip(logprobs["top_logprobs"][1:4], expected, strict=False):
        assert max(top.values()) == pytest.approx(float(row.max()), abs=1e-4)


def test_offsets_of_an_echo_are_the_same_in_a_stream(here: Address) -> None:
    body = {"prompt": [[5, 100, 7, 30]], "max_tokens": 6, "echo": True, "logprobs": 1, "temperature": 0}
    _, _, whole = here.ask("/v1/completions", body)
    events = here.events("/v1/completions", {**body, "stream": True})
    streamed = [event["choices"][0]["logprobs"] for event in events if event["choices"]]
    assert [at for found in streamed if found for at in found["text_offset"]] == (
        whole["choices"][0]["logprobs"]["text_offset"]
    )


def test_rows_that_cannot_be_moved_end_with_an_error_and_the_server_goes_on(
    here: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for lack of memory, when one of several rows has ended."""

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    def long() -> int:
        body = {"messages": [{"role": "user", "content": "Hello!"}], "temperature": 0, "max_tokens": 2000}
        return here.ask("/v1/chat/completions", body)[0]

    with ThreadPoolExecutor(1) as pool, monkeypatch.context() as patched:
        patched.setattr(batch, "keep_rows", fail)
        status = pool.submit(long)
        while not here.ask("/health")[2]["running"]:
            time.sleep(0.01)
        _ask(here, "a", max_tokens=2)
        assert status.result(timeout=60) == 500
    assert _ask(here, "a", max_tokens=2)


def test_log_probs_are_those_before_the_temperature(here: Address) -> None:
    found = here.client().chat.completions.create(
        model="syc@-0.7",
        messages=[{"role": "user", "content": "Hello!"}],
        temperature=1.5,
        seed=3,
        max_tokens=TOKENS,
        logprobs=True,
        top_logprobs=5,
    )
    choice = found.choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    ids = _reference()[0].chat_ids("Hello!")
    row = _log_probs(ids, {"syc": -0.7})[-1]
    first = choice.logprobs.content[0]
    assert [top.logprob for top in first.top_logprobs] == pytest.approx(row.topk(5).values.tolist(), abs=1e-4)
    assert any(abs(first.logprob - float(value)) < 1e-4 for value in row)
    assert len(choice.logprobs.content) == found.usage.completion_tokens


def test_a_seed_gives_the_same_reply_whatever_runs_beside_it(here: Address) -> None:
    fields = {"temperature": 1.0, "top_p": 0.9, "seed": 7, "model": "syc@-0.7", "max_tokens": 40}
    alone = _ask(here, "Hello!", **fields)
    with ThreadPoolExecutor(9) as pool:
        others = [pool.submit(_ask, here, PROMPTS[2], temperature=1.0, k={"gloomy": 0.1 * n}) for n in range(8)]
        beside = _ask(here, "Hello!", **fields)
        assert all(other.result() for other in others)
    assert beside == alone
    assert _ask(here, "Hello!", **{**fields, "seed": 8}) != alone


def test_several_replies_are_those_of_seeds_one_after_the_other(here: Address) -> None:
    body = {"messages": [{"role": "user", "content": "Hello!"}], "seed": 5, "n": 3, "max_tokens": TOKENS}
    _, _, found = here.ask("/v1/chat/completions", body)
    texts = [choice["message"]["content"] for choice in found["choices"]]
    assert texts == [_ask(here, "Hello!", temperature=1, seed=seed) for seed in (5, 6, 7)]
    assert found["usage"]["prompt_tokens"] == len(_reference()[0].chat_ids("Hello!"))


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_ends_the_reply_and_is_no_part_of_it(here: Address, stream: bool) -> None:
    fields = {"seed": 3, "temperature": 1.0, "max_tokens": 60}
    whole = _ask(here, "Hello!", **fields)
    assert len(whole) > 9
    stop = whole[5:8]
    body = {
        "messages": [{"role": "user", "content": "Hello!"}],
        "stop": ["never there", stop],
        "stream": stream,
        **fields,
    }
    if stream:
        choices = [choice for event in here.events("/v1/chat/completions", body) for choice in event["choices"]]
        text, finish = "".join(choice["delta"].get("content", "") for choice in choices), choices[-1]["finish_reason"]
    else:
        choice = here.ask("/v1/chat/completions", body)[2]["choices"][0]
        text, finish = choice["message"]["content"], choice["finish_reason"]
    assert (text, finish) == (whole.partition(stop)[0], "stop")


def test_a_stop_token_ends_the_reply(here: Address) -> None:
    body = {"prompt": "Hello!", "max_tokens": 8, "temperature": 0, "logprobs": 0, "ignore_eos": True}
    tokens = here.ask("/v1/completions", body)[2]["choices"][0]["logprobs"]["tokens"]
    third = _reference()[0].tokenizer(tokens[2])["input_ids"]
    ended = here.ask("/v1/completions", {**body, "stop_token_ids": third})[2]
    assert ended["choices"][0]["finish_reason"] == "stop"
    assert ended["usage"]["completion_tokens"] == tokens.index(tokens[2]) + 1
