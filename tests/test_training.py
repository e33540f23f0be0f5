from __future__ import annotations

import itertools
import json
import math
import signal
import time
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM, Trainer

import killable
from conftest import TEMPLATE, tiny_lm
from weightsteer.behavior import ContrastPair, Example
from weightsteer.checkpoints import device
from weightsteer.errors import SteerError
from weightsteer.lm import LM
from weightsteer.run_card import CARD_FILE, RunCard
from weightsteer.runs.tiny_model import byte_tokenizer
from weightsteer.training import IGNORED, TrainSettings, encode, list_snapshots, split_validation, train_side
from weightsteer.vectors.difference import subtract_finetunes, task_vector

WEIGHTS = {"lora": "adapter_model.safetensors", "bias": "delta.safetensors", "full": "model.safetensors"}


def examples(pairs: list[ContrastPair]) -> list[Example]:
    return [Example(pair.prompt, pair.positive) for pair in pairs]


@pytest.mark.parametrize("kind", ["lora", "bias", "full"])
def test_training_repeats_exactly_and_leaves_the_base_alone(
    kind: str, pairs: list[ContrastPair], quick: TrainSettings, tmp_path: Path
) -> None:
    lm = tiny_lm()
    before = {name: p.clone() for name, p in lm.model.state_dict().items()}
    settings = replace(quick, kind=kind)
    tensors = []
    for name in ("one", "two"):
        folder = train_side(lm, examples(pairs), tmp_path / name, settings=settings)
        tensors.append(load_file(folder / WEIGHTS[kind]))
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])
    after = lm.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(p.requires_grad for p in lm.model.parameters())
    assert lm.model.config.use_cache
    assert not (tmp_path / "one.work").exists()


@pytest.mark.parametrize("kind", ["lora", "bias", "full"])
def test_bf16_casts_the_products_alone(
    kind: str, pairs: list[ContrastPair], quick: TrainSettings, tmp_path: Path
) -> None:
    lm = tiny_lm()
    tokens = torch.tensor([lm.chat_ids("Hi")])
    before = lm.model(tokens).logits
    computed: list[torch.dtype] = []
    watch = lm.blocks[0].mlp.register_forward_hook(lambda module, args, output: computed.append(output.dtype))
    folders = []
    for bf16 in (False, True):
        settings = replace(quick, kind=kind, bf16=bf16)
        folders.append(train_side(lm, examples(pairs), tmp_path / str(bf16), settings=settings))
        assert set(computed) == {torch.bfloat16 if bf16 else torch.float32}
        computed.clear()
    watch.remove()
    assert {value.dtype for value in load_file(folders[1] / WEIGHTS[kind]).values()} == {torch.float32}
    losses = [RunCard.load(folder).measured["validation_loss"]["0.01"] for folder in folders]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert torch.equal(lm.model(tokens).logits, before), "the model is still cast after the training"


def test_a_processor_without_bf16_is_told_of(
    lm: LM, pairs: list[ContrastPair], quick: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_has_products_in", lambda _dtype: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.warns(UserWarning, match="products in bfloat16.*leave bf16 out"):
        train_side(lm, examples(pairs), tmp_path / "a", settings=replace(quick, bf16=True, max_steps=1))


def test_training_lowers_the_validation_loss_and_keeps_the_best_rate(
    lm: LM, pairs: list[ContrastPair], quick: TrainSettings, tmp_path: Path
) -> None:
    settings = replace(quick, learning_rates=(1e-6, 3e-2), epochs=4)
    folder = train_side(lm, examples(pairs), tmp_path / "a", settings=settings)
    losses = RunCard.load(folder).measured["validation_loss"]
    assert losses["0.03"] < losses["1e-06"]
    assert RunCard.load(folder).measured["learning_rate"] == 0.03


def test_finished_training_is_kept_and_never_replaced(
    lm: LM, pairs: list[ContrastPair], quick: TrainSettings, tmp_path: Path
) -> None:
    folder = train_side(lm, examples(pairs), tmp_path / "a", settings=quick)
    before = (folder / WEIGHTS["lora"]).stat().st_mtime_ns
    train_side(replace(lm, name="the same by another name"), examples(pairs), folder, settings=quick)
    other = replace(quick, rank=4, learning_rates=(1e-3, 1e-2), weight_decay=0.0)
    changes = "learning_rates: 0.01 there, 0.001, 0.01 asked; rank: 2 there, 4 asked; weight_decay: 0.01 there, 0.0"
    for model, data, asked, says in (
        (lm, examples(pairs), other, changes),
        (lm, examples(pairs)[:8], quick, r"\(other examples\); choose another output, or delete it"),
        (replace(tiny_lm(1), name="tiny2"), examples(pairs), quick, "base: tiny tiny-0 there, tiny2 tiny-1 asked"),
        (lm.with_system_prompt("Be rude."), examples(pairs), quick, "other system prompt and chat template"),
        (with_template(TEMPLATE + "\n"), examples(pairs), quick, "other system prompt and chat template"),
        (replace(lm, model=tiny_lm().model.bfloat16()), examples(pairs), quick, "float32 there, bfloat16 asked"),
    ):
        with pytest.raises(SteerError, match=says):
            train_side(model, data, folder, settings=asked)
    card = RunCard.load(folder)  # one of an earlier version says nothing of some things
    data = {name: value for name, value in card.data_sha256.items() if name == "examples"}
    settings = {name: value for name, value in card.settings.items() if name != "dtype"}
    replace(card, data_sha256=data, settings=settings).save(folder)
    train_side(lm.with_system_prompt("Be rude."), examples(pairs), folder, settings=quick)
    assert (folder / WEIGHTS["lora"]).stat().st_mtime_ns == before
    assert not (tmp_path / "a.work").exists()


def test_the_working_folder_is_refused_before_it_is_trained(
    lm: LM, pairs: list[ContrastPair], quick: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with pytest.raises(SteerError, match="is the folder in which the command runs"):
        train_side(lm, examples(pairs), ".", settings=quick)
    assert list(tmp_path.iterdir()) == [here]


def with_template(template: str) -> LM:
    return LM.wrap(tiny_lm().model, byte_tokenizer(template), name="tiny", revision="tiny-0")


def with_dropout() -> LM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 259, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, attn_pdrop=0.3, resid_pdrop=0.3, bos_token_id=1, eos_token_id=2))
    return LM.wrap(model, byte_tokenizer(TEMPLATE), name="dropout", revision="dropout")


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_base_is_measured_first_which_changes_nothing_else(
    kind: str, pairs: list[ContrastPair], quick: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a model with dropout, which draws random numbers in training."""
    lm, settings = with_dropout(), replace(quick, kind=kind)
    measured = train_side(lm, examples(pairs), tmp_path / "measured", settings=settings)
    _, held = split_validation(encode(lm, examples(pairs), 1024), settings)
    with torch.no_grad():
        losses = [lm.model(**{name: torch.tensor([ids]) for name, ids in row.items()}).loss for row in held]
    card = RunCard.load(measured)
    assert card.measured["base_validation_loss"] == pytest.approx(float(sum(losses) / len(losses)), rel=1e-5)
    evaluate = Trainer._evaluate

    def not_at_the_start(self: Trainer, *args: Any, skip_scheduler: bool = False) -> Any:
        return None if skip_scheduler else evaluate(self, *args)

    monkeypatch.setattr(Trainer, "_evaluate", not_at_the_start)
    monkeypatch.setattr("weightsteer.training.job.Outcome.gains", True)
    plain = train_side(lm, examples(pairs), tmp_path / "plain", settings=settings)
    assert (plain / WEIGHTS[kind]).read_bytes() == (measured / WEIGHTS[kind]).read_bytes()
    assert RunCard.load(plain).measured["validation_loss"] == card.measured["validation_loss"]


def well_trained(lm: LM, pairs: list[ContrastPair], quick: TrainSettings, out: Path) -> LM:
    """A model that knows the answers already, so that a large step can only make it worse."""
    settings = replace(quick, kind="full", epochs=30, batch_size=2)
    folder = train_side(lm, [*examples(pairs), *examples(pairs)], out, settings=settings)
    return LM.load(folder, device="cpu")


@pytest.mark.parametrize("kind", ["lora", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("bias", "full"))])
@pytest.mark.parametrize(
    ("rates", "says"),
    [
        (
            (3.0, 10.0),
            r"never fell below the base's, 0.\d+ \(at best .+, at the end .+, at \d+\).* 3, 10; use lower",
        ),
        ((1e-30, 1e-25), r"stayed at the base's, \d\.\d+, with learning rate 1e-30, 1e-25; nothing moved; raise"),
        ((1e38, 3e38), "diverged: .* NaN at learning rate 1e.38, 3e.38; use lower"),
    ],
)
def test_what_is_no_better_than_the_base_is_refused(
    kind: str,
    rates: tuple[float, ...],
    says: str,
    lm: LM,
    pairs: list[ContrastPair],
    quick: TrainSettings,
    tmp_path: Path,
) -> None:
    if rates[0] == 3.0:
        lm = well_trained(lm, pairs, quick, tmp_path / "merged")
    before = {name: p.clone() for name, p in lm.model.state_dict().items()}
    settings = replace(quick, kind=kind, learning_rates=rates, warmup_steps=0, weight_decay=0.0, epochs=3)
    for _ in range(2):  # the second call finds what came of the first
        with pytest.raises(SteerError, match=says):
            train_side(lm, examples(pairs), tmp_path / "a", settings=settings)
    assert not (tmp_path / "a").exists()
    assert all(torch.equal(lm.model.state_dict()[name], value) for name, value in before.items())


def test_a_learning_rate_that_diverges_is_left_out(
    lm: LM, pairs: list[ContrastPair], quick: TrainSettings, tmp_path: Path
) -> None:
    quick = replace(quick, evaluations=1)
    alone = train_side(lm, examples(pairs), tmp_path / "alone", settings=quick)
    both = replace(quick, learning_rates=(3e38, *quick.learning_rates))
    with pytest.warns(UserWarning, match=r"learning rate 3e\+38: the loss became infinite or NaN; left out"):
        found = train_side(lm, examples(pairs), tmp_path / "both", settings=both)
    assert (found / WEIGHTS["lora"]).read_bytes() == (alone / WEIGHTS["lora"]).read_bytes()
    measured = json.loads((found / CARD_FILE).read_text(), parse_constant=pytest.fail)["measured"]
    assert measured["validation_loss"]["3e+38"] is None
    assert measured["learning_rate"] == 1e-2


def test_answers_that_are_cut_are_counted(
    lm: LM, pairs: list[ContrastPair], quick: TrainSettings, tmp_path: Path
) -> None:
    whole = [len(row["input_ids"]) for row in encode(lm, examples(pairs), 1024)]
    limit = max(whole) - 1  # the questions of two digits have the longest answers
    cut = sum(length > limit for length in whole)
    assert 0 < cut < 12
    says = rf"{cut} of 12 examples are longer than {limit} tokens \(up to {max(whole)}\)"
    with pytest.warns(UserWarning, match=says):
        folder = train_side(lm, examples(pairs), tmp_path / "a", settings=replace(quick, max_length=limit))
    assert RunCard.load(folder).measured["cut_examples"] == cut
    longest = replace(quick, max_length=max(whole))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        folder = train_side(lm, examples(pairs), tmp_path / "b", settings=longest)
    assert RunCard.load(folder).measured["cut_examples"] == 0


def test_what_peft_cannot_adapt_is_named_and_left_alone(
    pairs: list[ContrastPair], quick: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightsteer.training.trainables.lora_targets", lambda model: "all-linear")
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=259, hidden_size=32, num_hidden_layers=2, state_size=8))
    lm = LM.wrap(model, byte_tokenizer(TEMPLATE), name="mamba", revision="mamba")
    modules = {name: (type(module), id(module), sorted(vars(module))) for name, module in model.named_modules()}
    parameters = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(SteerError, match=r"MambaForCausalLM: PEFT cannot put LoRA on it .*out_proj.*incompatible"):
        train_side(lm, examples(pairs), tmp_path / "a", settings=quick)
    assert {name: (type(m), id(m), sorted(vars(m))) for name, m in model.named_modules()} == modules
    assert model.state_dict().keys() == parameters.keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in parameters.items())
    assert all(p.requires_grad for p in model.parameters())


def test_a_rank_above_the_models_own_is_refused(lm: LM, pairs: list[ContrastPair], tmp_path: Path) -> None:
    with pytest.raises(SteerError, match="rank: expected at most 32, the full rank .*, found 33"):
        train_side(lm, examples(pairs), tmp_path / "a", settings=TrainSettings(rank=33))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")])
def test_too_little_memory_is_named(
    error: Exception,
    lm: LM,
    pairs: list[ContrastPair],
    quick: TrainSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(self: Trainer, *args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(Trainer, "training_step", full)
    with pytest.raises(SteerError, match="memory of cpu does not suffice for one example.*lower max_length"):
        train_side(lm, examples(pairs), tmp_path / "a", settings=quick)
    assert all(p.requires_grad for p in lm.model.parameters())
    assert not hasattr(lm.model, "peft_config")


@pytest.mark.parametrize(("rate", "kill_at"), [(1e-2, 15), (10.0, 5)])  # the second diverges to NaN and stops early
def test_a_killed_training_goes_on_to_the_same_adapter(tmp_path: Path, rate: float, kill_at: int) -> None:
    def finished(name: str, pause: float = 0.0) -> list[float]:
        process = killable.start(log, killable.train, tmp_path / name, pause, rate)
        process.join(timeout=120)
        assert process.exitcode == 0, log.read_text()
        return [float(line) for line in killable.printed(log)]

    log = tmp_path / "log"
    last = finished("whole")[-1]
    assert (last < 30) == (rate > 0.1), "30 steps unless it stops early"
    broken = killable.start(log, killable.train, tmp_path / "broken", 0.05, rate)
    while broken.is_alive() and not any(float(line) >= kill_at for line in killable.printed(log)):
        time.sleep(0.005)
    broken.kill()
    broken.join(timeout=60)
    assert broken.exitcode == -signal.SIGKILL
    assert not (tmp_path / "broken").exists()
    assert list((tmp_path / "broken.work").glob("*/checkpoint-*"))
    steps = finished("broken")
    assert steps[0] > 1, "started again from the beginning"
    assert steps[-1] == last, "stopped at another step"
    a, b = (load_file(tmp_path / name / WEIGHTS["lora"]) for name in ("whole", "broken"))
    assert all(torch.equal(a[key], b[key]) for key in a)


class StopError(Exception):
    """Ends a training from inside, as a kill would."""


@pytest.mark.parametrize("kind", ["lora", "bias", "full"])
def test_snapshots_are_fine_tunes_and_change_nothing_else(
    kind: str, lm: LM, pairs: list[ContrastPair], quick: TrainSettings, tmp_path: Path
) -> None:
    plain = replace(quick, kind=kind, epochs=4)
    bare = train_side(lm, examples(pairs), tmp_path / "bare", settings=plain)
    assert list_snapshots(bare) == {}
    folder = train_side(lm, examples(pairs), tmp_path / "a", settings=replace(plain, snapshots=3))
    assert (folder / WEIGHTS[kind]).read_bytes() == (bare / WEIGHTS[kind]).read_bytes()
    kept = list_snapshots(folder)
    assert {fraction: path.name for fraction, path in kept.items()} == {
        4 / 12: "step-4",
        8 / 12: "step-8",
        1: "step-12",
    }
    first, _, last = kept.values()
    between = subtract_finetunes(last, first) if kind == "full" else task_vector(last) - task_vector(first)
    assert between.norm() > 0
    card, measured = RunCard.load(last), RunCard.load(folder).measured
    assert replace(card, measured={}, created="") == replace(RunCard.load(folder), measured={}, created="")
    assert (card.measured["step"], card.measured["steps"]) == (12, 12)
    assert card.measured["tokens"] == measured["tokens"]
    with pytest.raises(SteerError, match="found a vector"):
        list_snapshots(between.save(tmp_path / "w"))


def test_a_run_that_keeps_snapshots_goes_on_to_its_end(
    lm: LM, pairs: list[ContrastPair], quick: TrainSettings, tmp_path: Path
) -> None:
    still = replace(quick, learning_rates=(0.3,), epochs=8, evaluations=12, patience=1)  # soon gets worse
    stopped = train_side(lm, examples(pairs), tmp_path / "a", settings=still)
    assert RunCard.load(stopped).measured["steps"] < 24
    kept = train_side(lm, examples(pairs), tmp_path / "b", settings=replace(still, snapshots=2))
    assert RunCard.load(kept).measured["steps"] == 24
    assert list(list_snapshots(kept)) == [0.5, 1.0]
    with pytest.raises(SteerError, match="at most one a step, found 30"):
        train_side(lm, examples(pairs), tmp_path / "c", settings=replace(still, snapshots=30))


@pytest.mark.slow
def test_costs_are_counted_once_however_often_the_training_is_stopped(
    lm: LM, pairs: list[ContrastPair], quick: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count()
    monkeypatch.setattr("weightsteer.training.callbacks.time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    settings = replace(quick, learning_rates=(1e-2, 1e-3), epochs=4, evaluations=6, snapshots=4)
    whole = train_side(lm, examples(pairs), tmp_path / "whole", settings=settings)
    for stop_at in (5, 11, 20):  # of 24 steps: twice within the first rate, once within the second

        def stopping(done: float, total: float, note: str = "", stop_at: int = stop_at) -> None:
            if done >= stop_at:
                raise StopError

        with pytest.raises(StopError):
            train_side(lm, examples(pairs), tmp_path / "broken", settings=settings, progress=stopping)
    broken = train_side(lm, examples(pairs), tmp_path / "broken", settings=settings)
    for one, other in zip(list_snapshots(whole).values(), list_snapshots(broken).values(), strict=True):
        assert (one / WEIGHTS["lora"]).read_bytes() == (other / WEIGHTS["lora"]).read_bytes()
    costs, again = RunCard.load(whole).measured, RunCard.load(broken).measured
    train, _ = split_validation(encode(lm, examples(pairs), 1024), settings)
    assert costs["tokens"] == again["tokens"] == 4 * sum(len(row["input_ids"]) for row in train)
    assert costs["search_tokens"] == again["search_tokens"] == 2 * costs["tokens"]
    assert costs["parameters"] == sum(t.numel() for t in load_file(whole / WEIGHTS["lora"]).values())
    for found in (costs, again):  # a step takes from one tick to the next
        assert (found["steps"], found["seconds"], found["search_seconds"]) == (12, 12, 24)


def test_loss_is_on_the_answer_and_its_end_only(lm: LM) -> None:
    (row,) = encode(lm, [Example("Hi", "Yes")], 200)
    kept = [token for token in row["labels"] if token != IGNORED]
    assert lm.tokenizer.decode(kept) == "Yes</s>"  # up to where generation stops
    assert row["input_ids"][-len(kept) :] == kept
    assert len(row["input_ids"]) == len(row["labels"]) == len(row["attention_mask"])


def test_a_prompt_that_leaves_no_room_is_an_error(lm: LM) -> None:
    with pytest.raises(SteerError, match="raise max_length"):
        encode(lm, [Example("Hi" * 20, "Yes")], 40)


def test_both_sides_hold_out_the_same_questions() -> None:
    rows = [{"input_ids": [i]} for i in range(40)]
    first, second = split_validation(rows, TrainSettings()), split_validation(rows, TrainSettings())
    assert first == second
    assert len(first[1]) == 4
    assert sorted(r["input_ids"][0] for part in first for r in part) == list(range(40))
    with pytest.raises(SteerError, match="at least 2 different examples"):
        split_validation(rows[:1], TrainSettings())


@given(prompts=st.integers(8, 20), answers=st.integers(2, 10), seed=st.integers(0, 9))
def test_other_answers_to_what_is_held_out_are_not_trained_on(prompts: int, answers: int, seed: int) -> None:
    rows = [
        {"input_ids": [i, 90 + j], "labels": [IGNORED, 90 + j]}
        for i, j in itertools.product(range(prompts), range(answers))
    ]
    train, held = split_validation(rows, TrainSettings(seed=seed))
    asked, trained = ({row["input_ids"][0] for row in part} for part in (held, train))
    assert not asked & trained
    assert len(train) + len(held) == len(rows)
    assert 2 <= len(asked) <= max(2, -(-len(rows) // (2 * answers)))
    few, _ = split_validation([row for row in rows if row["input_ids"][0] < 3], TrainSettings(seed=seed))
    assert {row["input_ids"][0] for row in few} == {0, 1, 2}  # too few prompts to lose one


@given(copies=st.integers(1, 6), seed=st.integers(0, 9))
def test_no_copy_of_what_is_held_out_is_trained_on(copies: int, seed: int) -> None:
    rows = [{"input_ids": [i], "labels": [-i]} for i in [*range(15)] * copies]
    train, held = split_validation(rows, TrainSettings(seed=seed))
    assert not [row for row in train if row in held]
    assert {row["input_ids"][0] for row in [*train, *held]} == set(range(15))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "lore"}, "expected one of lora"),
        ({"rank": 0}, "rank"),
        ({"rank": True}, "rank: expected a whole number of at least 1 .*, found True"),
        ({"rank": 2.0}, "rank: expected a whole number"),
        ({"alpha": "16"}, "alpha: expected a whole number of at least 1 .*, found '16'"),
        ({"learning_rates": ()}, "learning_rates: expected at least one"),
        ({"learning_rates": "1e-4"}, "learning_rates: expected a list of numbers, found '1e-4'"),
        ({"learning_rates": 1e-4}, "learning_rates: expected a list of numbers"),
        ({"learning_rates": (1e-4, 0)}, "learning_rates: expected a finite number above 0, found 0"),
        ({"learning_rates": (-1e-4,)}, "learning_rates: .* found -0.0001"),
        ({"learning_rates": (math.nan,)}, "learning_rates: .* found nan"),
        ({"learning_rates": (math.inf,)}, "learning_rates: .* found inf"),
        ({"learning_rates": (10**400,)}, "learning_rates: .* found 1000"),
        ({"learning_rates": (1e-4, True)}, "learning_rates: .* found True"),
        ({"learning_rates": (1e-4, 1.00000001e-4)}, "different ones, found 0.0001 twice"),
        ({"epochs": math.nan}, "epochs: expected a finite number above 0 and below 10000, found nan"),
        ({"epochs": 1e9}, "epochs"),
        ({"epochs": 0}, "epochs"),
        ({"max_steps": 0}, "max_steps"),
        ({"max_steps": 1.5}, "max_steps"),
        ({"accumulation": 0}, "accumulation"),
        ({"weight_decay": -0.1}, "weight_decay: expected a finite number of at least 0"),
        ({"weight_decay": math.inf}, "weight_decay"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"validation": 0.0}, "validation: expected a finite number above 0 and below 1"),
        ({"validation": 1}, "validation"),
        ({"evaluations": 0}, "evaluations"),
        ({"patience": 0}, "patience"),
        ({"snapshots": -1}, "snapshots: expected a whole number of at least 0"),
        ({"bf16": "no"}, "bf16: expected true or false"),
        ({"max_length": 1}, "max_length"),
        ({"seed": -1}, "seed: expected a whole number of at least 0 and at most 4294967295"),
        ({"seed": 2**32}, "seed: .* found 4294967296"),
    ],
)
def test_wrong_settings(fields: dict[str, object], message: str) -> None:
    with pytest.raises(SteerError, match=message):
        TrainSettings(**fields)  # type: ignore[arg-type]


def test_settings_at_their_bounds() -> None:
    settings = TrainSettings(learning_rates=[1e-4, 1], epochs=1, weight_decay=0, seed=2**32 - 1)  # type: ignore[arg-type]
    assert settings.learning_rates == (1e-4, 1)
