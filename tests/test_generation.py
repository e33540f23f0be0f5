from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from conftest import TEMPLATE, random_vector, tiny_lm, tiny_model
from weightsteer.batches import batches_of_one_length
from weightsteer.errors import SteerError
from weightsteer.generation import rows_together
from weightsteer.lm import LM
from weightsteer.runs.tiny_model import SIZES, byte_tokenizer
from weightsteer.scoring import score_choices, score_texts

WINDOW = {"sliding_window": 16}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gemma3_text": {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": WINDOW,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "bloom": {},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 512},
    "mamba": {},
    "mamba2": {"num_heads": 8, "n_groups": 1, "state_size": 8},
    "rwkv": {},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 16, "lru_width": 32},
    "qwen3_5_text": LINEAR,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": {
        **MAMBA,
        "num_local_experts": 0,
        "shared_intermediate_size": 32,
        "layer_types": ["mamba", "attention"],
    },
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "minimax": {"num_local_experts": 2, "layer_types": ["linear_attention", "full_attention"]},
    "llama4_text": {
        "num_local_experts": 4,
        "intermediate_size_mlp": 48,
        "attention_chunk_size": 16,
        "num_experts_per_tok": 1,
    },
}
PROMPTS = ["Hi", "A prompt that is longer", "x" * 40, "Ho"]


def lm_of(kind: str) -> LM:
    """A random model whose logits differ clearly from token to token."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer(TEMPLATE)
    config = AutoConfig.for_model(kind, **{**SIZES, "vocab_size": len(tokenizer), **ARCHITECTURES[kind]})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return LM.wrap(model, tokenizer, name=kind)


@torch.no_grad()
def direct(lm: LM, ids: list[int], start: int) -> float:
    """Summed log-probability of the ids from `start` on, by one forward pass without cache or padding."""
    log_p = lm.model(torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
    return float(sum(log_p[place - 1, ids[place]] for place in range(start, len(ids))))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_batches_score_and_write_what_a_row_alone_does(kind: str) -> None:
    lm = lm_of(kind)
    choices = [["yes", "no it is not"]] * len(PROMPTS)
    for prompt, answers, row in zip(PROMPTS, choices, score_choices(lm, PROMPTS, choices, batch_size=3), strict=True):
        for answer, score in zip(answers, row, strict=True):
            exchange = lm.exchange(prompt, answer)
            ids = exchange.head + exchange.answer
            assert score.total == pytest.approx(direct(lm, ids, len(exchange.head)), abs=1e-3)
    for text, score in zip(PROMPTS, score_texts(lm, PROMPTS), strict=True):
        assert score.total == pytest.approx(direct(lm, list(lm.tokenizer(text)["input_ids"]), 1), abs=1e-3)
    alone = [lm.generate([prompt], max_new_tokens=6)[0] for prompt in PROMPTS]
    assert lm.generate(PROMPTS, max_new_tokens=6) == alone
    together = {"rwkv": "alone", "minimax": "of one length"}
    assert rows_together(lm.model, lm.pad_id, lm.device) == together.get(kind, "padded")


@pytest.mark.parametrize("kind", ["gpt2", "minimax"])
def test_rows_with_a_k_each_share_batches_as_others_do(kind: str) -> None:
    lm, steered = lm_of(kind), lm_of(kind)
    with random_vector(steered).applied(steered, torch.tensor([0.5, -1.0, 0.0])):
        assert rows_together(steered.model, lm.pad_id, lm.device) == rows_together(lm.model, lm.pad_id, lm.device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_in_16_bits_rows_share_batches_as_in_32(kind: str, dtype: torch.dtype) -> None:
    lm = lm_of(kind)
    wanted = rows_together(lm.model, lm.pad_id, lm.device)
    rounded = lm_of(kind)
    rounded.model.to(dtype)
    assert rows_together(rounded.model, rounded.pad_id, rounded.device) == wanted


def test_batches_of_one_length() -> None:
    lengths = [3, 5, 3, 5, 5, 2]
    told: list[int] = []
    batches = list(batches_of_one_length(lengths, 2, lambda done, total, note="": told.append(done)))
    assert sorted(index for batch in batches for index in batch) == list(range(6))
    assert all(len({lengths[i] for i in batch}) == 1 and len(batch) <= 2 for batch in batches)
    assert told[-1] == 6


def test_greedy_is_the_likeliest_token_whatever_the_model_asks_for() -> None:
    lm = tiny_lm(seed=5)
    expected = lm.generate(PROMPTS, max_new_tokens=12)
    own = GenerationConfig(
        repetition_penalty=1.9, no_repeat_ngram_size=2, num_beams=3, min_new_tokens=9, temperature=0.1, eos_token_id=2
    )
    sampled = lm.generate(PROMPTS, max_new_tokens=12, temperature=1.0, seed=1)
    lm.model.generation_config = own
    assert lm.generate(PROMPTS, max_new_tokens=12) == expected
    assert lm.generate(PROMPTS, max_new_tokens=12, temperature=1.0, seed=1) == sampled
    assert lm.model.generation_config is own
    ids = lm.chat_ids("Hi")
    with torch.no_grad():
        for _ in range(12):
            token = int(lm.model(torch.tensor([ids])).logits[0, -1].argmax())
            if token in lm.stops:
                break
            ids.append(token)
    assert expected[0] == lm.tokenizer.decode(ids[len(lm.chat_ids("Hi")) :], skip_special_tokens=True).strip()


def test_a_plain_dialogue_ends_where_the_user_would_speak() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.warns(UserWarning, match="no chat template"):
        lm = LM.wrap(tiny_model(), tokenizer)
    wanted = lm.tokenizer(" Yes.\nuser: And", add_special_tokens=False)["input_ids"]
    start = len(lm.chat_ids("Hi"))

    def say(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        said = min(say_from[0], len(wanted) - 1)
        output.logits[...] = 0.0
        output.logits[:, -1, wanted[said]] = 1.0
        say_from[0] += 1
        return output

    say_from = [0]
    hook = lm.model.register_forward_hook(say, with_kwargs=True)
    (reply,) = lm.replies(["Hi"], max_new_tokens=40)
    hook.remove()
    assert (reply.answer, reply.ended) == ("Yes.", True)
    assert say_from[0] == len(" Yes.\nuser:")  # nothing is written after it
    assert start


def test_each_prompt_gets_its_own_k() -> None:
    lm = tiny_lm(seed=5)
    vector, ks = random_vector(lm), [0.0, 3.0, -3.0, 1.0]
    choices = [["yes it is", "no"]] * 4
    alone, scored, texts = [], [], []
    for prompt, k in zip(PROMPTS, ks, strict=True):
        with vector.applied(lm, k):
            alone += lm.generate([prompt], max_new_tokens=6)
            scored += score_choices(lm, [prompt], choices[:1])
            texts += score_texts(lm, [prompt])
    assert len(set(alone)) == 4
    lm = tiny_lm(seed=5)  # one that has not been tried yet
    for batch_size in (1, 2, 4):
        with vector.applied(lm, torch.tensor(ks)):
            assert lm.generate(PROMPTS, max_new_tokens=6, batch_size=batch_size) == alone
            found = score_choices(lm, PROMPTS, choices, batch_size=batch_size)
            for one, other in zip(found, scored, strict=True):
                assert [s.total for s in one] == pytest.approx([s.total for s in other], abs=1e-3)
            assert [s.total for s in score_texts(lm, PROMPTS, batch_size=batch_size)] == pytest.approx(
                [s.total for s in texts], abs=1e-3
            )
    with (
        vector.applied(lm, torch.tensor(ks)),
        pytest.raises(SteerError, match=r"k has shape \(4,\) and there are 3 prompts"),
    ):
        lm.generate(PROMPTS[:3], max_new_tokens=2)


def test_logits_that_are_not_numbers_are_no_reply() -> None:
    lm = tiny_lm()

    def spoil(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.arange(len(output))[:, None, None] == 1, output * float("nan"), output)

    handle = lm.model.get_output_embeddings().register_forward_hook(spoil)
    replies = lm.replies(["Hi", "Ho"], max_new_tokens=3)
    with pytest.warns(UserWarning, match="1 of 2 replies have logits that are not numbers"):
        sampled = lm.generate(["Hi", "Ho"], max_new_tokens=3, temperature=1.0)
    handle.remove()
    assert [reply.broken for reply in replies] == [False, True]
    assert replies[0] == lm.replies(["Hi"], max_new_tokens=3)[0]
    assert sampled[1] == ""
