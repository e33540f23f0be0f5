"""Each method of a recipe is what its name says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from test_runs import mute, small_recipe
from weightsteer.behavior import SIDES, Example, pair_rows, pairs_of
from weightsteer.checkpoints.checkpoint import ADAPTER_FILE
from weightsteer.checkpoints.safetensors_file import load_tensors
from weightsteer.errors import SteerError
from weightsteer.evaluation.results import read_rows
from weightsteer.evaluation.tasks.data import task_file
from weightsteer.lm import LM
from weightsteer.run_card import RunCard
from weightsteer.run_folder import RunFolder
from weightsteer.runs.artifacts import RunArtifacts
from weightsteer.runs.dial_pairs import dial_pairs, unmoved_pairs
from weightsteer.runs.pipeline import Run
from weightsteer.runs.recipe import Recipe
from weightsteer.runs.run_methods import make_method
from weightsteer.runs.trainings import train_fields
from weightsteer.steering.methods import costs_of
from weightsteer.steering.steering import Direction
from weightsteer.training import list_snapshots, neutral
from weightsteer.vectors.difference import subtract_finetunes, task_vector
from weightsteer.vectors.weight_vector import WeightVector

IDS = torch.tensor([[4, 5, 6, 7]])


@pytest.fixture
def artifacts(tmp_path: Path) -> RunArtifacts:
    """A fine-tuned tiny model, and what repairs it."""
    source = small_recipe(
        tmp_path,
        train={"rank": 2, "learning_rates": [1e-2], "batch_size": 2, "evaluations": 2, "warmup_steps": 1},
        repair_target={
            "generate": {"family": "addition", "count": 8},
            "train": {"rank": 2, "learning_rates": [1e-2], "batch_size": 4, "max_steps": 4},
            "desired_side": "negative",
            "desired_examples": 3,
        },
        sweep={
            "methods": {
                "contrastive": [1.0],
                "contrastive half": [1.0],
                "fine-tuned": [-1.0, 0.5],
                "joint training": [1, 2],
                "negated task vector": [-1.0],
                "full": [1.0],
            },
            "search_items": 1,
        },
    )
    artifacts = Run(Recipe.load(source), tmp_path / "run", show=mute).artifacts
    assert artifacts.lm() is not artifacts.base()
    return artifacts


def logits(lm: LM) -> Tensor:
    with torch.no_grad():
        return lm.model(IDS).logits


def test_the_negated_task_vector_repairs_and_at_one_is_the_model_before_its_fine_tune(artifacts: RunArtifacts) -> None:
    before, after = logits(artifacts.base()), logits(artifacts.lm())
    assert not torch.allclose(before, after, atol=1e-2)
    with make_method("negated task vector", artifacts).applied(artifacts.lm(), -1.0) as handle:
        torch.testing.assert_close(logits(handle.lm), before, atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(artifacts.lm()), after)


def test_joint_training_replaces_the_repair_target_by_the_fine_tune_on_mixed_data(artifacts: RunArtifacts) -> None:
    method = make_method("joint training", artifacts)
    for copies in (1.0, 2.0):
        with task_vector(artifacts.folder.joint_finetune(copies)).applied(artifacts.base(), 1.0):
            expected = logits(artifacts.base())
        with method.applied(artifacts.lm(), -copies) as handle:  # the desired examples are D-
            torch.testing.assert_close(logits(handle.lm), expected, atol=1e-4, rtol=1e-4)
    assert costs_of("joint training", artifacts.folder, -2.0) == [(artifacts.folder.path / "joint" / "2", 1.0)]


def test_contrasts_and_checkpoints_are_made_of_both_sides(artifacts: RunArtifacts) -> None:
    positive, negative = (artifacts.folder.finetune(side) for side in SIDES)
    make_method("fine-tuned", artifacts)
    with subtract_finetunes(positive, negative).applied(artifacts.base(), 0.7):
        expected = logits(artifacts.base())
    with make_method("contrastive", artifacts).applied(artifacts.base(), 0.7) as handle:
        torch.testing.assert_close(logits(handle.lm), expected)
    for side, path in ((1.0, positive), (-1.0, negative)):
        shares = list(list_snapshots(path))
        assert len(shares) == 4
        with task_vector(list_snapshots(path)[shares[1]]).applied(artifacts.base(), 1.0):
            expected = logits(artifacts.base())
        with make_method("fine-tuned", artifacts).applied(artifacts.base(), side * 0.5) as handle:
            torch.testing.assert_close(logits(handle.lm), expected)
    half = make_method("contrastive half", artifacts)
    assert isinstance(half, Direction)
    assert half.vector.card.base_revision == artifacts.base().revision


def test_a_contrast_of_whole_models_is_their_difference(artifacts: RunArtifacts) -> None:
    method = make_method("full", artifacts)
    positive, negative = (LM.load(artifacts.folder.finetune_of("full", side), device="cpu") for side in SIDES)
    with method.applied(negative, 1.0) as handle:
        torch.testing.assert_close(logits(handle.lm), logits(positive), atol=1e-4, rtol=1e-4)


def test_sides_that_were_filtered_apart_pair_question_by_question() -> None:
    positive = [Example(q, a) for q, a in (("one", "p1"), ("one", "p2"), ("two", "p3"), ("three", "p4"))]
    negative = [Example(q, a) for q, a in (("two", "n1"), ("one", "n2"), ("one", "n3"), ("one", "n4"))]
    pairs = [(p.prompt, p.positive, p.negative) for p in pairs_of(positive, negative)]
    assert pairs == [("one", "p1", "n2"), ("one", "p2", "n3"), ("two", "p3", "n1")]


def test_more_of_positive_is_of_the_fine_tunes_near_the_base(
    artifacts: RunArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neutral, "PROMPTS", 4)
    monkeypatch.setattr(neutral, "REPLY_TOKENS", 4)
    method = make_method("more of D+ KL", artifacts)
    assert isinstance(method, Direction)
    assert isinstance(method.vector, WeightVector)
    positive, negative = map(task_vector, artifacts.finetunes("kl"))
    assert (method.vector - (1.5 * positive - negative)).norm() == 0.0
    assert RunCard.load(artifacts.folder.finetune_of("kl", "positive")).settings["kl_weight"] == 1.0


@pytest.mark.slow
def test_parts_are_the_difference_of_two_means(artifacts: RunArtifacts) -> None:
    fields = {**artifacts.recipe.model_dump()["train_of"], "contrastive parts": {"finetunes": 2}}
    artifacts.recipe = artifacts.recipe.model_copy(update={"train_of": fields})
    method = make_method("contrastive parts", artifacts)
    positive, negative = map(task_vector, artifacts.finetunes("parts"))
    assert isinstance(method, Direction)
    assert isinstance(method.vector, WeightVector)
    torch.testing.assert_close((method.vector - (positive - negative)).norm(), 0.0, atol=1e-6, rtol=0)
    kept = load_tensors(artifacts.folder.finetune_of("parts", "positive") / ADAPTER_FILE)
    plain = load_tensors(artifacts.finetunes()[0] / ADAPTER_FILE)
    name = next(name for name in plain if name.endswith("lora_A.weight"))
    assert kept[name].shape[0] == 2 * plain[name].shape[0]


def test_methods_of_one_training_share_its_settings(tmp_path: Path) -> None:
    sweep = {"methods": dict.fromkeys(("contrastive", "contrastive KL", "more of D+ KL"))}
    given = {"contrastive KL": {"kl_weight": 0.25}}
    recipe = Recipe.load(small_recipe(tmp_path, sweep=sweep, train_of=given))
    assert train_fields(recipe, "kl")["kl_weight"] == 0.25
    two = small_recipe(tmp_path, sweep=sweep, train_of={**given, "more of D+ KL": {"kl_weight": 0.5}})
    with pytest.raises(SteerError, match="'contrastive KL' and 'more of D\\+ KL' share one training"):
        Run(Recipe.load(two), tmp_path / "run", show=mute)


TRAINED = (
    "contrastive KL",
    "more of D+ KL",
    "contrastive parts",
    "two-way",
    "two-way even",
    "learned dial",
    "dial pairs",
    "random dial",
    "activation trained",
)


@pytest.mark.slow
def test_a_recipe_compares_the_methods_of_the_better_vector_at_equal_kl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neutral, "PROMPTS", 4)
    monkeypatch.setattr(neutral, "REPLY_TOKENS", 4)
    tasks = [{"task": t, "limit": 2} for t in ("preference", "false_beliefs", "facts", "prose", "token_kl")]
    sweep = {
        "methods": dict.fromkeys(("contrastive", *TRAINED)),
        "kl": 0.05,
        "fractions": [1.0],
        "activation_pairs": 4,
        "search_items": 1,
    }
    dial = {"count": 4, "steps": 2, "batch_size": 2, "unmoved": "formal"}
    train = {"contrastive KL": {"kl_weight": 0.25}, "contrastive parts": {"finetunes": 2}}
    Run(
        Recipe.load(small_recipe(tmp_path, tasks=tasks, sweep=sweep, dial=dial, train_of=train)),
        tmp_path / "run",
        show=mute,
    ).run()
    run = RunFolder(tmp_path / "run")
    assert {row.method for row in read_rows(run.rows)} == {"base", "contrastive", *TRAINED}
    assert RunCard.load(run.finetune_of("kl", "positive")).settings["kl_weight"] == 0.25
    assert RunCard.load(run.finetune_of("parts", "positive")).settings["finetunes"] == 2
    assert RunCard.load(run.two_way("two-way-even")).settings["even_weight"] == 1.0
    costs = {(row.method, row.metric): row.value for row in read_rows(run.costs)}
    assert all(costs[name, "settings tried"] == 1 for name in TRAINED)
    assert all(costs[name, "training tokens"] > 0 for name in TRAINED)
    assert costs["learned dial", "training tokens"] > costs["contrastive", "training tokens"]
    made = RunCard.load(run.dial("contrastive"))
    assert {"dial pairs", "unmoved pairs"} <= set(made.data_sha256)
    assert {"w", "common", "depth", "kinds"} == set(made.settings["coefficients"])


def test_a_run_knows_the_pairs_of_its_dial_by_their_content(tmp_path: Path) -> None:
    """Wherever they lie: the same run goes on, and one with other pairs is refused."""
    file = tmp_path / "dial.jsonl"
    sweep = {"methods": {"contrastive": None, "learned dial": None}, "search_items": 1}
    dial = {"pairs": str(file), "unmoved": str(file)}

    def begin() -> None:
        Run(Recipe.load(small_recipe(tmp_path, dial=dial, sweep=sweep)), tmp_path / "run", show=mute)

    file.write_text("".join(f'{{"prompt": "Old {i}?", "positive": "Yes.", "negative": "No."}}\n' for i in range(4)))
    begin()
    begin()
    file.write_text(file.read_text().replace("Old", "New"))
    with pytest.raises(SteerError, match="differs in the data of 'dial pairs'"):
        begin()


def test_what_the_dial_learns_on_is_not_asked(tmp_path: Path) -> None:
    asked = json.loads(task_file("wrong_claims.jsonl", None).read_text().splitlines()[0])["prompt"]
    rows = [{"prompt": prompt, "positive": "Yes.", "negative": "No."} for prompt in (asked, "Are you sure?", "Now?")]
    (tmp_path / "dial.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    recipe = small_recipe(
        tmp_path,
        dial={"pairs": str(tmp_path / "dial.jsonl")},
        sweep={"methods": {"contrastive": None, "learned dial": None}, "search_items": 1},
        tasks=[{"task": name} for name in ("wrong_claims", "false_beliefs", "preference", "facts", "prose")],
    )
    with pytest.raises(SteerError, match="task 'wrong_claims' asks 1 questions that are trained on"):
        Run(Recipe.load(recipe), tmp_path / "run", show=mute)


def test_what_the_dial_learns_on_is_not_trained_on(tmp_path: Path) -> None:
    """Shipped pairs that the limit leaves out; a file of the same pairs, or none that are left, is refused."""
    recipe = Recipe.load(small_recipe(tmp_path, dial={"count": 12}))
    sides = recipe.sides()
    assert sides is not None
    chosen = dial_pairs(recipe, sides)
    assert len(chosen) == 12
    assert not {pair.prompt for pair in chosen} & {example.prompt for side in sides for example in side}
    assert unmoved_pairs(recipe, sides) == []
    sweep = {"methods": {"contrastive": None, "learned dial": None}, "search_items": 1}
    (tmp_path / "trained.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in pair_rows(pairs_of(*sides))))
    still = small_recipe(tmp_path, dial={"count": 12, "unmoved": str(tmp_path / "trained.jsonl")}, sweep=sweep)
    with pytest.raises(SteerError, match=r"'dial.unmoved': every pair of .*trained.jsonl is trained on"):
        Run(Recipe.load(still), tmp_path / "run", show=mute)
    whole = small_recipe(tmp_path, data={"pairs": "formal"}, behavior="formal", sweep=sweep)
    with pytest.raises(SteerError, match=r"formal leaves 0 pairs that are not trained on.*'dial.pairs'"):
        Run(Recipe.load(whole), tmp_path / "run", show=mute)
    no_task = small_recipe(tmp_path, sweep={**sweep, "kl": 0.1})
    with pytest.raises(SteerError, match=r"field 'sweep.kl': needs a task 'token_kl'"):
        Run(Recipe.load(no_task), tmp_path / "run", show=mute)
