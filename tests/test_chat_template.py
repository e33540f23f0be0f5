from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from chat_templates import CHATML, FAMILIES, Family
from conftest import tiny_lm, tiny_model
from weightsteer.behavior import Example
from weightsteer.chat_template import template_variables
from weightsteer.errors import SteerError
from weightsteer.lm import LM
from weightsteer.run_folder import RunFolder
from weightsteer.runs.recipe import Recipe, claim_run
from weightsteer.runs.tiny_model import byte_tokenizer
from weightsteer.thinking import split_thinking
from weightsteer.training.output import finetune_card
from weightsteer.training.preference import Preference, encode_preferences
from weightsteer.training.sft import encode
from weightsteer.training.trainer import IGNORED

CORPUS = [f"{name} {family.text}" for name, family in FAMILIES.items()] + ["Yes. No.\n\n A an the \n that\n"] * 20
words = st.text(max_size=20).filter(lambda text: bool(text.strip()))
answers = words.filter(lambda text: bool(split_thinking(text)[1]))  # hypothesis draws the markers of thoughts, too


def merging_tokenizer(tokens: tuple[str, ...], template: str | None, *, adds_bos: bool = False) -> Any:
    """A byte-level BPE with merges, among them such of line breaks and blanks with words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=list(tokens), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if adds_bos:
        bos = (tokens[0], tokenizer.token_to_id(tokens[0]))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{tokens[0]} $A", special_tokens=[bos])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=tokens[0], eos_token=tokens[-1])
    fast.chat_template = template
    return fast


def model_for(tokenizer: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **sizes))


@cache
def lm_of(name: str) -> LM:
    tokenizer = merging_tokenizer(FAMILIES[name].tokens, FAMILIES[name].text)
    return LM.wrap(model_for(tokenizer), tokenizer, name=name)


def rendered(family: Family, lm: LM, turns: list[dict[str, str]], *, prompt: bool = False) -> str:
    """What transformers makes of the turns."""
    shown: list[Any] = list(turns)
    if family.parts:
        shown = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    return str(lm.tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=prompt))


def assert_whole_up_to_a_stop(lm: LM, ids: list[int], whole: str) -> None:
    """The ids are those of the whole rendering; what is left out comes after the token at which generation stops."""
    expected = lm.tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert ids == expected[: len(ids)]
    assert len(ids) == len(expected) or ids[-1] in lm.stops


@pytest.mark.parametrize("name", FAMILIES)
@given(prompt=words, answer=answers)
@pytest.mark.filterwarnings("ignore:.*training and scoring follow")
def test_what_is_trained_is_the_rendering_of_the_whole(name: str, prompt: str, answer: str) -> None:
    family, lm = FAMILIES[name], lm_of(name)
    asked = [{"role": "user", "content": prompt}]
    whole = rendered(family, lm, [*asked, {"role": "assistant", "content": answer}])
    (row,) = encode(lm, [Example(prompt, answer)], 10_000)
    assert_whole_up_to_a_stop(lm, row["input_ids"], whole)
    start = row["labels"].count(IGNORED)
    assert row["labels"] == [IGNORED] * start + row["input_ids"][start:]
    exchange = lm.exchange(prompt, answer)
    assert exchange.prompt + exchange.lead + exchange.answer + exchange.end == row["input_ids"]
    assert answer.strip() in lm.tokenizer.decode(exchange.answer)
    served = lm.tokenizer.decode(lm.chat_ids(prompt))
    if family.agrees:
        trained = lm.tokenizer.decode(row["input_ids"][start:])
        assert whole.startswith(served)
        said = lm.tokenizer.decode(row["input_ids"]).removeprefix(served)
        assert trained.endswith(said)  # longer where the prompt's end merges with the answer
        if row["input_ids"][: len(lm.chat_ids(prompt))] == lm.chat_ids(prompt):
            assert exchange.prompt == lm.chat_ids(prompt)
    if name != "no generation prompt":
        assert served == rendered(family, lm, asked, prompt=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_talk_with_a_system_prompt(name: str) -> None:
    family, lm = FAMILIES[name], lm_of(name)
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Who are you?"},
    ]
    expected = turns if family.system else [{"role": "user", "content": "Be kind.\n\nHi."}, *turns[2:]]
    answer = {"role": "assistant", "content": "A model."}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exchange = lm.exchange(turns, "A model.")
        same = lm.with_system_prompt("Be kind.").chat_ids(turns[1:])
        assert lm.with_system_prompt("Be rude.").chat_ids(turns) == same == lm.chat_ids(turns)
    ids = exchange.head + exchange.answer + exchange.end
    whole = rendered(family, lm, [*expected, answer])
    assert_whole_up_to_a_stop(lm, ids, whole)
    assert lm.tokenizer.decode(exchange.answer).strip() == "A model."


def test_the_end_of_a_turn_and_what_generation_stops_at() -> None:
    ends = {name: lm_of(name).tokenizer.convert_ids_to_tokens(lm_of(name).turn_end) for name in FAMILIES}
    assert ends["gemma"] == "<end_of_turn>"
    assert ends["phi 3"] == "<|end|>"
    assert ends["internlm"] == "<eoa>"
    assert ends["channels"] == "<|return|>"
    assert {ends[name] for name in ("chatml", "thinking", "parts only", "yi")} == {"<|im_end|>"}
    assert {ends[name] for name in ("llama 2", "mistral v1", "vicuna", "zephyr", "alpaca")} == {"</s>"}
    texts = {name: lm_of(name).chat_template.stop_text for name in FAMILIES}
    assert texts.pop("alpaca") == "\n\n### Instruction:"
    assert set(texts.values()) == {None}


def test_where_the_template_disagrees_with_itself_a_warning_says_so_once() -> None:
    family = FAMILIES["reasoning that the prompt opens"]
    tokenizer = merging_tokenizer(family.tokens, family.text)
    lm = LM.wrap(model_for(tokenizer), tokenizer, name="reasoner")
    with pytest.warns(UserWarning, match="reasoner: its chat template renders a finished answer after") as said:
        encode(lm, [Example("Hi", "Yes"), Example("Ho", "No")], 100)
    assert len(said) == 1


def test_a_system_prompt_without_a_role_is_put_before_the_users_words_and_said() -> None:
    family = FAMILIES["gemma"]
    tokenizer = merging_tokenizer(family.tokens, family.text)
    lm = LM.wrap(model_for(tokenizer), tokenizer, name="g").with_system_prompt("Be kind.")
    with pytest.warns(UserWarning, match="g: its chat template has no system role"):
        ids = lm.chat_ids("Hi")
    assert "user\nBe kind.\n\nHi<end_of_turn>" in lm.tokenizer.decode(ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once, and an empty one is not there
        assert lm.with_system_prompt("").chat_ids("Hi") == lm.with_system_prompt(None).chat_ids("Hi")


def test_variables_reach_the_template_and_unknown_ones_are_refused() -> None:
    tokenizer = lm_of("thinking").tokenizer
    model = model_for(tokenizer)
    off = LM.wrap(model, tokenizer, chat_template_kwargs={"enable_thinking": False})
    on = LM.wrap(model, tokenizer)
    assert off.tokenizer.decode(off.chat_ids("Hi")).endswith("assistant\n<think>\n\n</think>\n\n")
    assert on.tokenizer.decode(on.chat_ids("Hi")).endswith("assistant\n")
    thought = on.exchange("Hi", "Yes")
    assert on.tokenizer.decode(thought.lead) == "<think>\n\n</think>\n\n"
    assert thought.head == off.exchange("Hi", "Yes").prompt
    assert off.template_identity.keys() == {"chat_template_kwargs"}
    assert on.template_identity == {}
    for name in ("enable_thinkin", "messages", "add_generation_prompt"):
        with pytest.raises(SteerError, match=f"has no variable '{name}'; those that it has: enable_thinking"):
            LM.wrap(model, tokenizer, chat_template_kwargs={name: False})
    with pytest.raises(SteerError, match="those that it has: none"):
        LM.wrap(model_for(byte_tokenizer()), byte_tokenizer(CHATML), chat_template_kwargs={"enable_thinking": True})
    assert template_variables("{% for m in messages %}{{ m }}{% endfor %}{{ x or y }}") == {"messages", "x", "y"}


def test_a_model_without_a_template_begins_and_ends_as_its_tokenizer_does() -> None:
    tokenizer = merging_tokenizer(("<bos>", "<eos>"), None, adds_bos=True)
    with pytest.warns(UserWarning, match="has no chat template"):
        lm = LM.wrap(model_for(tokenizer), tokenizer)
    text = "user: Hi\nassistant:"
    assert lm.chat_ids("Hi") == tokenizer(text)["input_ids"]  # with one BOS
    (row,) = encode(lm, [Example("Hi", "Yes")], 100)
    assert row["input_ids"] == tokenizer(text + " Yes<eos>")["input_ids"]
    assert lm.tokenizer.decode([i for i in row["labels"] if i != IGNORED]) == " Yes<eos>"
    assert lm.chat_template.stop_text == "\nuser:"


def test_named_templates() -> None:
    lm = tiny_lm()
    plain = lm.chat_ids("Hi")
    lm.tokenizer.chat_template = {"default": lm.tokenizer.chat_template, "tool_use": "{{ messages }}"}
    assert lm.chat_ids("Hi") == plain
    lm.tokenizer.chat_template = {"rag": "{{ messages }}", "tool_use": "{{ messages }}"}
    with pytest.raises(SteerError, match=r"several chat templates \(rag, tool_use\) and none named default"):
        lm.chat_ids("Hi")


def test_a_template_that_leaves_the_user_out() -> None:
    lm = tiny_lm()
    lm.tokenizer.chat_template = "{% for m in messages %}<s>{{ m['role'] }}{% endfor %}"
    with pytest.raises(SteerError, match="leaves out what the user says"):
        lm.chat_ids("Hi")


def test_examples_without_an_answer() -> None:
    lm = tiny_lm()
    for answer in ("", "<think>\nThe user asks, so"):
        with pytest.raises(SteerError, match="'Hi' has no answer: it is empty, or ends inside its thinking"):
            encode(lm, [Example("Hi", answer)], 100)


def test_a_token_that_the_model_has_no_row_for() -> None:
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
    with pytest.raises(SteerError, match=r"'<\|im_start\|>' \(259\), but the model's embedding only 259 rows"):
        LM.wrap(tiny_model(), tokenizer, name="short").chat_ids("Hi")


def test_tokenizers_without_an_end_or_padding() -> None:
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.pad_token = tokenizer.eos_token = None
    lm = LM.wrap(tiny_model(), tokenizer)
    assert lm.turn_end is None
    assert lm.chat_template.stop_text == "<|im_end|>\n<|im_start|>user"
    assert len(lm.generate(["Hi", "Hello there"], max_new_tokens=4)) == 2


def test_preferences_share_their_prompt_whatever_the_answers_begin_with() -> None:
    lm = lm_of("chatml")
    pair = [Preference("Hi", "Yes", "\n\nNo"), Preference("Hi", "\nYes", "No")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = encode_preferences(lm, pair, 100)
        for row, preference in zip(rows, pair, strict=True):
            for side, answer in (("chosen_ids", preference.chosen), ("rejected_ids", preference.rejected)):
                exchange = lm.exchange("Hi", answer)
                assert row["prompt_ids"] + row[side] == exchange.prompt + exchange.answer + exchange.end


def test_a_run_belongs_to_its_templates_variables(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"name": "r", "tasks": [{"task": "facts"}]}
    claim_run(Recipe.model_validate(fields), RunFolder(tmp_path / "run"), {})
    off = Recipe.model_validate({**fields, "chat_template_kwargs": {"enable_thinking": False}})
    with pytest.raises(SteerError, match="differs in the recipe's 'chat_template_kwargs'"):
        claim_run(off, RunFolder(tmp_path / "run"), {})
    claim_run(off, RunFolder(tmp_path / "other"), {})
    assert Recipe.load_kept(RunFolder(tmp_path / "other").recipe) == off


def test_a_fine_tune_belongs_to_its_templates_variables() -> None:
    tokenizer = lm_of("thinking").tokenizer
    off = LM.wrap(model_for(tokenizer), tokenizer, chat_template_kwargs={"enable_thinking": False})
    ours, theirs = (finetune_card(lm, {"examples": "0"}, {"seed": 0}).data_sha256 for lm in (lm_of("thinking"), off))
    assert theirs == {**ours, **off.template_identity} != ours
