from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from markupsafe import escape

import killable
from conftest import tiny_lm
from weightsteer.behavior import Behavior
from weightsteer.cli.show_run import run_facts
from weightsteer.errors import SteerError
from weightsteer.evaluation.tasks import TaskSpec, load_task
from weightsteer.locks import hold
from weightsteer.progress import Progress, silent
from weightsteer.run_card import RunCard, StrengthRange
from weightsteer.runs.own_data import OWN, held_out_pairs
from weightsteer.runs.pipeline import Run
from weightsteer.runs.recipe import Recipe, refuse_other_recipes
from weightsteer.runs.samples import read_samples
from weightsteer.runs.validate import check_alone
from weightsteer.runs.whole_way import commands_for

RECIPES = Path(__file__).parents[1] / "recipes"
SHIPPED = sorted([*RECIPES.glob("*.yaml"), *RECIPES.glob("laptop/*.yaml")])  # the paper's: test_rehearse.py
ARTIFACTS = (
    "positive/adapter_model.safetensors",
    "negative/adapter_model.safetensors",
    "vector/adapter_model.safetensors",
)


@contextmanager
def mute(label: str) -> Iterator[Progress]:
    yield silent


def small_recipe(folder: Path, **changes: object) -> Path:
    """A recipe that goes through a whole run on the tiny model in seconds."""
    base = folder / "base"
    if not base.exists():
        lm = tiny_lm()
        lm.model.save_pretrained(base)
        lm.tokenizer.save_pretrained(base)
    fields = {
        "name": "small",
        "model": str(base),
        "device": "cpu",
        "data": {"pairs": "sycophancy", "limit": 8},
        "train": {
            "rank": 2,
            "learning_rates": [1e-2],
            "batch_size": 4,
            "evaluations": 2,
            "warmup_steps": 1,
            "epochs": 3,
        },
        "tasks": [{"task": t, "limit": 2} for t in ("preference", "false_beliefs", "facts", "prose")],
        "sweep": {"fractions": [0.5, 1.0], "activation_pairs": 4, "search_items": 1},
        "budget": {"facts/accuracy": 1.0, "prose/nll": 1.0},
        "samples": {"count": 1, "max_new_tokens": 4},
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def make_run(source: Path, out: Path) -> Run:
    return Run(Recipe.load(source), out, show=mute, command="weightsteer run recipe.yaml")


def test_a_whole_run_and_again_without_doing_anything_twice(tmp_path: Path) -> None:
    source = small_recipe(tmp_path)
    page = make_run(source, tmp_path / "run").run()
    text = page.read_text()
    assert "weightsteer run recipe.yaml" in text
    assert (tmp_path / "run" / "behaviour_against_capability.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (tmp_path / "run" / "rows.jsonl").read_text().splitlines()]
    assert {row["method"] for row in rows} == {"base", "contrastive", "tau+", "tau-", "activation", "system prompt"}
    assert all(row["n"] == 2 for row in rows if row["task"] != "nothing")
    strength = RunCard.load(tmp_path / "run" / "vector").strength
    assert strength is not None
    assert strength.low < 0 < strength.high
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.suffix in (".safetensors", ".jsonl")}
    make_run(source, tmp_path / "run").run()
    changed = [p.name for p, stamp in files.items() if p.stat().st_mtime_ns != stamp]
    assert changed == ["rows.jsonl"]  # derived from the cells, written again the same
    assert [json.loads(line) for line in (tmp_path / "run" / "rows.jsonl").read_text().splitlines()] == rows


@pytest.mark.slow
def test_a_run_killed_at_any_point_ends_the_same(tmp_path: Path) -> None:
    source = small_recipe(tmp_path)
    make_run(source, tmp_path / "whole").run()
    folder, log = tmp_path / "killed", tmp_path / "log"
    arguments = ("run", str(source), "--out", str(folder))
    moments = (
        "positive.work/*/checkpoint-*",
        "negative",
        "vector",
        "strengths.json",
        "measurements.jsonl",
        "rows.jsonl",
        "report.html",
    )
    for moment in moments:  # each kill comes as soon as the artifact is there
        process = killable.start(log, killable.command, *arguments)
        while process.is_alive() and not any(folder.glob(moment)):
            time.sleep(0.005)
        process.kill()
        process.join()
        assert any(folder.glob(moment)), f"the run ended before {moment} was there: {log.read_text()}"
    command = [sys.executable, "-m", "weightsteer.cli", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums depend on it
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    for name in ARTIFACTS:
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    for name in ("rows.jsonl", "samples.jsonl", "strengths.json"):
        assert (folder / name).read_text() == (tmp_path / "whole" / name).read_text(), name
    assert not list(folder.glob("*.work"))
    assert "recommended for more" in done.stdout
    assert "try next:" in done.stdout


def test_the_recipe_that_a_run_has_kept_goes_on_with_it(tmp_path: Path, checkpoint: Path) -> None:
    """It names no folder of this machine; what it was begun with is known here."""
    source = small_recipe(tmp_path, model=str(checkpoint))
    begun = make_run(source, tmp_path / "run")
    assert str(checkpoint) not in begun.folder.recipe.read_text()
    again = make_run(begun.folder.recipe, tmp_path / "run")
    assert again.recipe == begun.recipe


def test_a_blank_prompt_of_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match="field 'samples.prompts"):
        Recipe.load(small_recipe(tmp_path, samples={"prompts": ["Hello?", " \n"]}))
    commands = commands_for(tmp_path / "v", StrengthRange(0.5, -0.5, -1.0, 1.0), "\n\nHello?\nAgain.")
    assert "'Hello?'" in commands[0]


def test_commands_to_paste_are_quoted(tmp_path: Path) -> None:
    place = tmp_path / "my run"
    (place / "vector").mkdir(parents=True)
    strength = StrengthRange(0.5, -0.5, -1.0, 1.0)
    words = shlex.split(commands_for(place / "vector", strength, "- Is this good?")[0])
    assert words == ["weightsteer", "steer", str(place / "vector"), " - Is this good?", "--k=-0.5,0,0.5"]
    assert str(place / "vector") in shlex.split(run_facts(place)["next"].replace(";", " "))


def test_another_recipe_does_not_take_over_a_run(tmp_path: Path) -> None:
    source = small_recipe(tmp_path)
    make_run(source, tmp_path / "run")
    other = small_recipe(tmp_path, seed=1)
    with pytest.raises(SteerError, match="differs in the recipe's 'seed'"):
        make_run(other, tmp_path / "run")
    numbers = {"rank": 2, "learning_rates": [1e-2], "evaluations": 2, "warmup_steps": 1}  # no passes, and no batch
    paper = {"epochs": 1, "batch_size": 8}  # what a recipe leaves out follows from its data and is no number of theirs
    make_run(small_recipe(tmp_path, train=numbers), tmp_path / "by data")
    with pytest.raises(SteerError, match="differs in the recipe's 'train'"):
        make_run(small_recipe(tmp_path, train=numbers | paper), tmp_path / "by data")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("")
    with pytest.raises(SteerError, match="not made by weightsteer"):
        make_run(source, tmp_path / "mine")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": [{"task": "chess"}]}, "unknown task 'chess'"),
        ({"tasks": []}, "field 'tasks'"),
        ({"colour": "red"}, "field 'colour'"),
        ({"sweep": {"methods": {"magic": None}}}, "field 'sweep.methods.magic"),
        ({"sweep": {"methods": {"contrastive": ["much"]}}}, "valid number"),
        ({"train": {"speed": 3}}, "field 'train'.*speed"),
        ({"train": {"learning_rates": 0.1}}, "field 'train'"),
        ({"train": {"rank": 2.5}}, "field 'train': 'rank': .*found 2.5"),
        ({"train": {"validation": "much"}}, "field 'train': 'validation'"),
        ({"train": {"kind": "full"}}, "'kind' of a training follows from the method"),
        ({"repair_target": {"generate": {"family": "gcd"}, "train": {"speed": 3}}}, "field 'train'.*speed"),
        ({"tasks": [{"task": "prose"}, {"task": "facts", "max_new_tokens": 3}]}, "nothing is generated"),
        ({"sweep": {"methods": {"contrastive": [1]}, "fractions_of": {"contrastive": [1]}}}, "has a list of k"),
        ({"sweep": {"variants": {"odd": "scale_by_depth(w, alfa=1)"}}}, "options of scale_by_depth: alpha, beta"),
        ({"tasks": [{"task": "facts"}, {"task": "facts", "limit": 3}]}, "two tasks have one name"),
        ({"sweep": {"methods": {"tau+": None}}}, "needs 'contrastive'"),
        ({"sweep": {"items_of": {"full": 3}}}, "'full' is no method of its sweep"),
        ({"sweep": {"variants": {"tau+": "w"}}}, "variant 'tau\\+' has the name of a method"),
        (
            {"sweep": {"methods": {"contrastive": None, "joint training": [1]}}},
            "'joint training' needs the field 'repair_target'",
        ),
        ({"repair_target": {}}, "expected 'data' .a list of files. or 'generate'"),
        ({"repair_target": {"generate": {"family": "roots"}}}, "roots"),
        ({"judge": {"url": "nowhere", "model": "m"}}, "nowhere"),
        ({"sweep": {"methods": {"contrastive": []}}}, "'contrastive' needs a list of k"),
        ({"sweep": {"methods": {"contrastive": None, "system prompt": [2]}}}, "'system prompt': expected k of 1"),
        ({"sweep": {"methods": {"contrastive": None, "fine-tuned": [0.3]}}}, "'fine-tuned': expected k of 0.25"),
        ({"sweep": {"methods": {"contrastive": [0]}}}, "'contrastive' needs a list of k"),
        ({"sweep": {"items_of": {"contrastive": 0}}}, "'contrastive': expected 1 or more, found 0"),
        ({"sweep": {"variants": {"base": "w"}}}, "variant 'base' has the name of a method"),
        ({"sweep": {"variants": {"activation": "w"}}}, "variant 'activation' has the name of a method"),
        ({"train": {"max_steps": -5}}, "max_steps: expected a whole number of at least 1 .*, found -5"),
        ({"sweep": {"fractions": []}}, "fractions and sides must not be empty"),
        ({"sweep": {"variants": {"odd": "nosuch(w)"}}}, "variant 'odd': .*nosuch cannot be called so"),
        ({"sweep": {"variants": {"odd": "w +"}}}, "cannot be read"),
        ({"train_of": {"full": {}}}, "'full' is no method of its sweep"),
        ({"train_of": {"tau+": {}}}, "train_of"),
        ({"budget": {"chess/won": 1.0}}, "needs a task 'chess'"),
        ({"budget": {"facts": 1.0}}, "expected task/metric"),
        ({"data": {"positive": "p.jsonl"}}, r"both 'positive' \(D\+\) and 'negative' \(D-\)"),
        ({"data": {"pairs": "none.jsonl"}}, "none.jsonl: cannot be read"),
        ({"behavior": "angry"}, "no such behaviour"),
        ({"tasks": [{"task": "facts"}]}, "needs a task 'prose'"),
    ],
)
def test_mistakes_are_found_before_any_work(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    source = small_recipe(tmp_path, **changes)
    with pytest.raises(SteerError, match=message):
        make_run(source, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_no_task_asks_what_is_trained_on(tmp_path: Path) -> None:
    rows = [{"prompt": f"Is {i} big?", "positive": "yes", "negative": "no"} for i in range(8)]
    pairs, answers = tmp_path / "pairs.jsonl", tmp_path / "answers.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers.write_text("".join(json.dumps({"prompt": row["prompt"], "answer": "yes"}) + "\n" for row in rows[:3]))
    for asked, count in (
        ({"task": "preference", "data": str(pairs)}, 8),
        ({"task": "answers", "name": "preference", "data": str(answers)}, 3),
    ):
        tasks = [asked, {"task": "facts"}, {"task": "prose"}]
        source = small_recipe(tmp_path, data={"pairs": str(pairs)}, tasks=tasks, plot=["facts/accuracy"])
        with pytest.raises(SteerError, match=f"asks {count} questions that are trained on"):
            make_run(source, tmp_path / "run")


@pytest.mark.parametrize("task", ["four_way", "arithmetic_choice", "choices"])
def test_what_a_task_calls_its_prompts_does_not_matter(task: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"task": task} | ({"data": "larger"} if task == "arithmetic_choice" else {})
    item: Any = load_task(TaskSpec(**fields)).items[0]
    prompt = item.lettered("")[0] if task == "choices" else item.question
    rows = [{"prompt": f"Is {i} big?", "positive": "yes", "negative": "no"} for i in range(8)]
    rows[3]["prompt"] = prompt
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = [fields, {"task": "facts"}, {"task": "prose"}]
    sweep = {"behavior": "facts/accuracy"}
    source = small_recipe(tmp_path, data={"pairs": str(pairs)}, tasks=tasks, sweep=sweep, plot=["facts/accuracy"])
    with pytest.raises(SteerError, match=f"task '{task}' asks 1 questions that are trained on"):
        make_run(source, tmp_path / "run")


def test_coefficients_are_not_learned_on_what_is_asked_where_the_sides_are_sampled(tmp_path: Path) -> None:
    rows = [{"prompt": f"Is {i} big?", "positive": "yes", "negative": "no"} for i in range(8)]
    pairs = tmp_path / "held.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = small_recipe(
        tmp_path,
        behavior="sycophancy",
        data={"sampling": {}},
        judge={"model": str(tmp_path / "base")},
        dial={"pairs": str(pairs)},
        tasks=[{"task": "preference", "data": str(pairs)}, {"task": "facts"}, {"task": "prose"}],
        sweep={"methods": {"contrastive": None, "learned dial": None}, "behavior": "preference/margin"},
        plot=["preference/margin"],
    )
    with pytest.raises(SteerError, match="task 'preference' asks 8 questions that are trained on"):
        make_run(source, tmp_path / "run")


def test_a_trait_is_not_asked_for_on_the_questions_that_the_sides_come_from(tmp_path: Path) -> None:
    trait = tmp_path / "mine.json"
    shipped = Behavior.load("gloomy")
    trait.write_text(
        json.dumps(
            {
                "instruction": [{"pos": shipped.positive_prompts[0], "neg": shipped.negative_prompts[0]}],
                "questions": ["Why?", "How?"],
                "eval_prompt": shipped.judge_prompt,
            }
        )
    )
    source = small_recipe(
        tmp_path,
        behavior=str(trait),
        data={"sampling": {}},
        judge={"model": str(tmp_path / "base")},
        tasks=[{"task": name} for name in ("trait", "facts", "prose")],
        sweep={"behavior": "trait/trait"},
        plot=["trait/trait"],
    )
    with pytest.raises(SteerError, match="task 'trait' asks 2 questions that are trained on"):
        make_run(source, tmp_path / "run")


def test_malformed_files(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match="cannot be read"):
        Recipe.load(tmp_path / "none.yaml")
    path = tmp_path / "r.yaml"
    for text, message in (("a: [", "not YAML"), ("- 1", "expected a mapping")):
        path.write_text(text)
        with pytest.raises(SteerError, match=message):
            Recipe.load(path)
    path.write_bytes(b"\x89PNG\xff")
    with pytest.raises(SteerError, match="not UTF-8 text"):
        Recipe.load(path)


def test_variants_are_swept_like_methods(tmp_path: Path) -> None:
    variants = {"late": "filter(w, layers='1')", "twice": "2*positive - 2*negative"}
    sweep = {"methods": {"contrastive": [1.0]}, "variants": variants, "fractions": [1.0], "search_items": 1}
    make_run(small_recipe(tmp_path, sweep=sweep), tmp_path / "run").run()
    rows = [json.loads(line) for line in (tmp_path / "run" / "rows.jsonl").read_text().splitlines()]
    assert {row["method"] for row in rows} == {"base", "contrastive", "late", "twice"}


def test_a_metric_that_is_not_measured_is_found_before_training(tmp_path: Path) -> None:
    source = small_recipe(tmp_path, plot=["facts/speed"])
    with pytest.raises(SteerError, match="task 'facts' has no such metric; it has accuracy, margin"):
        make_run(source, tmp_path / "run").run()
    assert not list((tmp_path / "run").glob("positive*"))
    for count in (0, 2):  # what is drawn, and the samples, may change in a run
        mended = small_recipe(tmp_path, plot=["facts/accuracy"], samples={"count": count, "max_new_tokens": 4})
        page = make_run(mended, tmp_path / "run").run().read_text()
        shown = Behavior.load("sycophancy").questions[::-1][:3]
        assert [str(escape(prompt)) in page for prompt in shown] == [i < count for i in range(3)]


def test_yaml_reads_a_power_of_ten_as_text(tmp_path: Path) -> None:
    recipe = Recipe.load(small_recipe(tmp_path))
    settings = recipe.train_settings(yaml.safe_load("{validation: 5e-2, weight_decay: 1e-2, learning_rates: [1e-3]}"))
    assert (settings.validation, settings.weight_decay, settings.learning_rates) == (0.05, 0.01, (0.001,))


def test_runs_that_are_compared_differ_in_their_seeds_alone(tmp_path: Path) -> None:
    fields = yaml.safe_load(small_recipe(tmp_path).read_text())
    for name, changes in (("a", {}), ("b", {"seed": 1, "name": "b"}), ("c", {"dtype": "bfloat16"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").write_text(yaml.safe_dump(fields | changes))
    a, b, c = (tmp_path / name for name in "abc")
    refuse_other_recipes([a, b, tmp_path / "of old"])
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "recipe.yaml").write_text(yaml.safe_dump(fields | {"train": {**fields["train"], "epochs": 1}}))
    with pytest.raises(SteerError, match="d: differs from .*a in the recipe's 'train'"):
        refuse_other_recipes([a, tmp_path / "d"])
    with pytest.raises(SteerError, match="c: differs from .*a in the recipe's 'dtype'"):
        refuse_other_recipes([a, b, c])


def test_two_processes_do_not_run_one_folder(tmp_path: Path) -> None:
    one, two = (make_run(small_recipe(tmp_path), tmp_path / "run") for _ in range(2))

    def second() -> None:
        with pytest.raises(SteerError, match=f"process {os.getpid()} on .* is writing it; wait until it has ended"):
            two.run()

    with hold(one.folder.path), ThreadPoolExecutor(1) as pool:
        pool.submit(second).result()


def test_own_sides_go_the_same_way(tmp_path: Path) -> None:
    for side, word in (("positive", "yes"), ("negative", "no")):
        rows = [{"prompt": f"Is {i} big?", "answer": f"{word}, {i}"} for i in range(8)]
        (tmp_path / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {side: str(tmp_path / f"{side}.jsonl") for side in ("positive", "negative")}
    recipe = Recipe.load(small_recipe(tmp_path, data=data))
    positive, negative = recipe.sides()
    held = [pair.prompt for pair in held_out_pairs(recipe)]
    assert len(held) == 4
    assert [example.prompt for example in negative] == [f"Is {i} big?" for i in range(8) if f"Is {i} big?" not in held]
    assert [example.prompt for example in positive] == [example.prompt for example in negative]
    named = recipe.model_copy(update={"behavior": "sycophancy"})  # then the task has that behaviour's pairs
    assert [example.answer for example in named.sides()[1]] == [f"no, {i}" for i in range(8)]


@pytest.mark.parametrize(("questions", "answers", "left"), [(8, 25, 100), (20, 50, 800), (20, 1, 16)])
def test_of_prompts_with_many_answers_a_fifth_is_held_out(
    questions: int, answers: int, left: int, tmp_path: Path
) -> None:
    rows = [
        {"prompt": f"Is {i} big?", "positive": f"yes, {i}, {j}", "negative": f"no, {i}, {j}"}
        for i in range(questions)
        for j in range(answers)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe.load(small_recipe(tmp_path, data={"pairs": str(tmp_path / "pairs.jsonl")}))
    held = {pair.prompt for pair in held_out_pairs(recipe)}
    positive, negative = recipe.sides()
    assert len(positive) == len(negative) == left
    assert not held & {example.prompt for example in positive}
    assert len(held_out_pairs(recipe)) == min(64, 4 * answers)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.stem}/{path.stem}")
def test_shipped_recipes_are_valid(path: Path) -> None:
    recipe = Recipe.load(path)
    check_alone(recipe)
    ours = [spec for spec in recipe.tasks if spec.data is None]
    assert recipe.model_copy(update={"tasks": ours}).load_tasks()
    assert recipe.sides()


def test_shown_strengths_span_the_sides_that_have_a_k() -> None:
    found = StrengthRange(2.0, -3.0, -4, 4)
    assert found.shown == [-3.0, -1.5, 0.0, 1.0, 2.0]
    assert replace(found, recommended=0.0).shown == [-3.0, -1.5, 0.0]


def own_recipe(tmp_path: Path, count: int = 12, **changes: object) -> Path:
    """A recipe with pairs of its own, and no word of a behaviour."""
    rows = [
        {"prompt": f"Is {i} big?", "positive": f"yes, {i} it is", "negative": f"no, {i} it is not"}
        for i in range(count)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"pairs": str(tmp_path / "pairs.jsonl")}
    tasks = [{"task": t, "limit": 2} for t in ("preference", "facts", "prose")]
    return small_recipe(tmp_path, name="bigness", **{"data": data, "tasks": tasks, **changes})


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("data: 1", "data"),
        ("data: {pairs: [a]}", "pairs"),
        ("sweep: {methods: 3}", "methods"),
        ("sweep: {methods: [{task: prose}]}", "methods"),
        ("sweep: {variants: {v: 3}}", "variants"),
    ],
)
def test_a_recipes_field_of_a_wrong_type_is_named(line: str, field: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    rest = "" if line.startswith("data") else "data: {pairs: sycophancy}\n"
    path.write_text(f"name: odd\nmodel: tiny\ntasks: [{{task: prose}}]\n{rest}{line}\n")
    with pytest.raises(SteerError, match=field):
        Recipe.load(path)


def test_a_recipe_with_its_own_pairs_measures_them_and_nothing_else(tmp_path: Path) -> None:
    sweep = {"methods": {"contrastive": [-1.0, 1.0]}, "search_items": 1}
    run = make_run(own_recipe(tmp_path, sweep=sweep), tmp_path / "run")
    held = {pair.prompt for pair in held_out_pairs(run.recipe)}
    assert {item.prompt for item in run.tasks[0].items} <= held
    assert not held & {example.prompt for side in run.recipe.sides() for example in side}
    page = run.run().read_text()
    assert "Weight steering: bigness" in page
    assert "pairs.jsonl show" in page
    assert "sycophan" not in page.lower().replace(str(tmp_path), "")
    kept = Recipe.load_kept(run.folder.recipe)
    assert (kept.behavior, kept.plot) == (OWN, ["preference/margin"])
    make_run(tmp_path / "recipe.yaml", tmp_path / "run").run()  # it goes on


def test_what_says_nothing_of_ones_own_behaviour_is_refused(tmp_path: Path) -> None:
    recipe = Recipe.load(own_recipe(tmp_path, sweep={}))
    assert "system prompt" not in recipe.sweep.methods
    with pytest.raises(SteerError, match="needs the field 'behavior'"):
        make_run(own_recipe(tmp_path, sweep={"methods": {"contrastive": None, "system prompt": [1.0]}}), tmp_path / "a")
    tasks = [{"task": t, "limit": 2} for t in ("facts", "prose")]
    with pytest.raises(SteerError, match="needs a task 'preference'"):
        make_run(own_recipe(tmp_path, tasks=tasks), tmp_path / "b")
    with pytest.raises(SteerError, match="takes the pairs of 4 prompts out of training, and the data have 5 prompts"):
        make_run(own_recipe(tmp_path, count=5), tmp_path / "c")
    assert Recipe.load(small_recipe(tmp_path, data={"pairs": "gloomy"})).behavior == "gloomy"
    stated = Recipe.load(small_recipe(tmp_path, data={"pairs": "gloomy"}, behavior="sycophancy"))
    assert stated.behavior == "sycophancy"
    assert Recipe.load(small_recipe(tmp_path)).behavior == "sycophancy"


def test_strengths_and_the_length_of_samples_may_change_in_a_run(tmp_path: Path) -> None:
    """What is measured stays; a k that breaks the model, or samples that are too short, cost no training."""
    listed = {"sweep": {"methods": {"contrastive": [-1.0, 1e38]}, "search_items": 1}, "budget": {"prose/nll": 1e9}}
    tasks = [{"task": task, "limit": 2} for task in ("preference", "prose")]
    fields = {**listed, "tasks": tasks, "plot": ["preference/margin"]}
    with pytest.raises(SteerError, match=r"task preference, contrastive at k = 1e\+38: the model gives no number"):
        make_run(small_recipe(tmp_path, **fields), tmp_path / "run").run()
    made = (tmp_path / "run" / "vector" / "weightsteer.json").read_text()
    fields["sweep"] = {"methods": {"contrastive": [-1.0, 1.0]}, "search_items": 1}
    run = make_run(small_recipe(tmp_path, **fields), tmp_path / "run")
    run.run()
    assert {row["k"] for row in map(json.loads, run.folder.measurements.read_text().splitlines())} >= {0.0, -1.0, 1.0}
    assert json.loads(made)["created"] == RunCard.load(run.folder.vector).created
    short = run.folder.samples.read_text()
    run = make_run(small_recipe(tmp_path, **fields, samples={"count": 1, "max_new_tokens": 12}), tmp_path / "run")
    run.run()
    assert run.folder.samples.read_text() != short
    assert {json.loads(line)["max_new_tokens"] for line in run.folder.samples.read_text().splitlines()} == {12}
    with pytest.raises(SteerError, match="sweep.fractions"):
        Recipe.load(small_recipe(tmp_path, sweep={"fractions": [0.0]}))


@pytest.mark.parametrize("ks", [["0", "-65x"], ["0", "nan"], ["0", "1.0"], ["1"], ["0", "1"]])
def test_samples_at_what_is_no_strength_are_refused(ks: list[str], tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    rows = [{"prompt": "p", "replies": {"0": "a", "2": "b"}}, {"prompt": "q", "replies": dict.fromkeys(ks, "a")}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SteerError, match=r"samples.jsonl, row 2: expected replies"):
        read_samples(path)


def test_a_k_whose_samples_loop_is_not_recommended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {0.0: "all is well", 0.5: "it is so", 1.0: "so so so so so so so so so so"}
    monkeypatch.setattr(
        "weightsteer.runs.pipeline.replies_at_strengths",
        lambda vector, lm, prompts, ks, **options: [[said[abs(k)]] * len(prompts) for k in ks],
    )
    sweep = {"methods": {"contrastive": [-1.0, -0.5, 0.5, 1.0]}, "search_items": 1}
    run = make_run(small_recipe(tmp_path, sweep=sweep, budget={"prose/nll": 1e9}), tmp_path / "run")
    run.run()
    strength = RunCard.load(run.folder.vector).strength
    assert strength is not None
    assert max(abs(strength.recommended), abs(strength.negative)) <= 0.5
    assert (strength.low, strength.high) == (-1.0, 1.0)
    rows = [json.loads(line) for line in run.folder.samples.read_text().splitlines()]
    assert set(rows[0]["replies"]) == {"-1", "-0.5", "0", "0.5", "1"}
