"""An adapter that is named as a model is its base with the adapter merged in, wherever a model is expected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from conftest import byte_tokenizer, random_vector, tiny_model
from test_adapter_sources import adapter, rewrite
from test_cli import run
from weightsteer.checkpoints.adapted import adapted_model, tokenizer_folder, without_adapters
from weightsteer.checkpoints.checkpoint import fingerprint
from weightsteer.errors import SteerError
from weightsteer.export.merge import export_merged
from weightsteer.lm import LM
from weightsteer.run_card import RunCard
from weightsteer.vectors.difference import task_vector
from weightsteer.vectors.weight_vector import WeightVector

IDS = torch.tensor([[4, 5, 6, 7]])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def tuned(base: Path, tmp_path: Path) -> Path:
    return adapter(tmp_path / "tuned", tiny_model(), 3, base)


def logits(lm: LM) -> torch.Tensor:
    with torch.no_grad():
        return lm.model(IDS).logits


def test_it_is_the_merged_model_and_steers_as_that(base: Path, tuned: Path, tmp_path: Path) -> None:
    export_merged(task_vector(tuned), base, tmp_path / "merged", k=1.0)
    merged, adapted = LM.load(tmp_path / "merged", device="cpu"), LM.load(tuned, device="cpu")
    torch.testing.assert_close(logits(adapted), logits(merged), atol=1e-5, rtol=1e-5)
    assert (logits(adapted) - logits(LM.load(base, device="cpu"))).abs().max() > 1e-3
    assert not any("lora" in name for name, _ in adapted.model.named_modules())
    w = random_vector(adapted)
    with w.applied(adapted, 0.7), w.applied(merged, 0.7):
        torch.testing.assert_close(logits(adapted), logits(merged), atol=1e-5, rtol=1e-5)
    assert adapted.revision == fingerprint(tuned)


def test_its_own_tokenizer_comes_first(base: Path, tuned: Path) -> None:
    assert tokenizer_folder(str(tuned)) == str(base)
    byte_tokenizer().save_pretrained(tuned)
    assert tokenizer_folder(str(tuned)) == str(tuned)
    assert without_adapters(str(tuned)) == str(base)
    assert adapted_model(str(base)) is None


@pytest.mark.parametrize("ensured", [False, True])
@pytest.mark.parametrize("places", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_one_of_two_tied_places_may_have_a_lora(places: list[str], ensured: bool, base: Path, tmp_path: Path) -> None:
    """As PEFT computes it, and not as it merges it: into both."""
    tuned = adapter(
        tmp_path / "t", tiny_model(), 3, base, target_modules=["q_proj", *places], ensure_weight_tying=ensured
    )
    with torch.no_grad():
        expected = PeftModel.from_pretrained(tiny_model(), str(tuned)).eval()(IDS).logits
    torch.testing.assert_close(logits(LM.load(tuned, device="cpu")), expected, atol=1e-5, rtol=1e-5)
    steered = LM.load(base, device="cpu")
    with task_vector(tuned).applied(steered, 1.0):
        torch.testing.assert_close(logits(steered), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("former", ["base_model.model.", "base_model.model.model."])
def test_an_adapter_that_peft_would_leave_out_is_refused_as_a_model(former: str, tuned: Path, tmp_path: Path) -> None:
    other = rewrite(tuned, tmp_path / "other", lambda key: key.replace(former, ""))
    assert task_vector(other).norm() > 0.0
    with pytest.raises(SteerError, match="PEFT does not know all of its tensors by name; steer its base with it"):
        LM.load(other, device="cpu")


def test_an_adapter_over_an_adapter(base: Path, tuned: Path, tmp_path: Path) -> None:
    second = adapter(tmp_path / "second", tiny_model(), 4, tuned)
    lm = LM.load(second, device="cpu")
    both = task_vector(tuned) + task_vector(second, base=base)
    plain = LM.load(base, device="cpu")
    with both.applied(plain, 1.0):
        torch.testing.assert_close(logits(lm), logits(plain), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"base_model_name_or_path": ""}, "names no base model"),
        ({"base_model_name_or_path": "/nowhere/base"}, "no such folder"),
    ],
)
def test_what_lacks_its_base_says_so(tuned: Path, config: dict[str, str], message: str) -> None:
    path = tuned / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    with pytest.raises(SteerError, match=message):
        LM.load(tuned, device="cpu")


def test_no_pickle_is_opened(tuned: Path) -> None:
    (tuned / "adapter_model.safetensors").rename(tuned / "adapter_model.bin")
    with pytest.raises(SteerError, match="as a pickle, which is never opened"):
        LM.load(tuned, device="cpu")


def test_a_mistyped_name_asks_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(SteerError, match=r"no such model.*is 'smollm2-135m-instruct' meant\?"):
        LM.load("smollm-135m-instruct")


def test_a_device_that_is_not_there_lists_those_that_are() -> None:
    with pytest.raises(SteerError, match=r"device 'gpu': is not on this machine; expected one of cpu,"):
        LM.load("smollm2-135m-instruct", device="gpu")


def test_a_vector_that_was_trained_on_it_is_merged_with_it(
    base: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    w = random_vector(LM.load(tuned, device="cpu"))
    WeightVector(w.deltas, RunCard("vector", base_model=str(tuned), base_revision=fingerprint(tuned))).save(
        tmp_path / "w"
    )
    for number, words in enumerate(((), ("-m", tuned))):
        out = tmp_path / f"merged{number}"
        code, _, err = run(capsys, "export", "merged", tmp_path / "w", "--k=0.5", "-o", out, *words)
        assert code == 0, err
        lm = LM.load(tuned, device="cpu")
        with w.applied(lm, 0.5):
            torch.testing.assert_close(logits(LM.load(out, device="cpu")), logits(lm), atol=1e-5, rtol=1e-5)
    code, _, err = run(capsys, "serve-command", "vllm", tmp_path / "w")
    assert code == 1
    assert "is an adapter, and no engine serves it as a model; weightsteer export merged" in err


def test_an_adapters_own_revision_is_taken(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        return str(tuned)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr(
        "transformers.utils.peft_utils.find_adapter_config_file",
        lambda name, revision=None: "adapter_config.json" if revision == "v1.0" else None,
    )
    assert adapted_model("someone/adapter") is None
    assert LM.load("someone/adapter", revision="v1.0", device="cpu").revision == fingerprint(tuned)
    assert asked == [("someone/adapter", "v1.0")]
