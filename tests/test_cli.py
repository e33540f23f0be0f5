from __future__ import annotations

import itertools
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import random_vector, tiny_lm
from weightsteer import cli
from weightsteer.example_files.load import load_examples
from weightsteer.lm import LM
from weightsteer.run_card import RunCard, StrengthRange
from weightsteer.training import neutral
from weightsteer.vectors.weight_vector import WeightVector


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command."""
    sys.argv = ["weightsteer", *map(str, args)]
    capsys.readouterr()  # what fixtures printed
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    print(captured.err, file=sys.stderr)  # for the report of a test that fails
    return int(stop.value.code or 0), captured.out, captured.err


@pytest.fixture
def saved(checkpoint: Path, tmp_path: Path) -> Path:
    """A vector for the tiny checkpoint, with a measured range of k."""
    lm = LM.load(str(checkpoint), device="cpu")
    card = RunCard.now("vector", base_model=str(checkpoint), base_revision=lm.revision, seed=0)
    strength = StrengthRange(2.0, -1.5, -4.0, 4.0, {"prose nll": 0.1})
    return WeightVector(random_vector(lm).deltas, card.with_strength(strength)).save(tmp_path / "w")


def test_a_training_near_the_base_says_so(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neutral, "PROMPTS", 4)
    monkeypatch.setattr(neutral, "REPLY_TOKENS", 4)
    verb = ("train", "--pairs", "formal", "--kl-weight", "0.5", "--max-steps", "1")
    given = ("--model", checkpoint, "--device", "cpu")
    code, _, err = run(capsys, *verb, "--rank", "2", "-o", tmp_path / "near", *given)
    assert code == 0, err
    assert RunCard.load(tmp_path / "near" / "positive").settings["kl_weight"] == 0.5
    code, _, err = run(capsys, *verb, "--kind", "bias", "-o", tmp_path / "bias", *given)
    assert code == 1
    assert "kl_weight: needs kind lora" in err


def test_train_subtract_show_cosine(capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path) -> None:
    for side, word in (("positive", "yes"), ("negative", "no")):
        rows = [{"prompt": f"Is {i} big?", "answer": f"{word}, {i}"} for i in range(8)]
        (tmp_path / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ("--positive", tmp_path / "positive.jsonl", "--negative", tmp_path / "negative.jsonl")
    code, out, err = run(
        capsys, "train", *data, "-o", tmp_path / "t", "-m", checkpoint, "--device", "cpu", "--rank", 2, "--lr", "1e-2"
    )
    assert code == 0, err
    assert "positive" in out
    w = tmp_path / "w2"
    code, out, err = run(capsys, "subtract", tmp_path / "t/positive", tmp_path / "t/negative", "-o", w)
    assert code == 0, err
    assert "14 parameters" in out
    mixed = tmp_path / "mixed"
    code, out, err = run(capsys, "combine", "0.5*a - 0.5*b", f"a={w}", f"b={w}", "-o", mixed)
    assert code == 0, err
    assert "norm 0\n" in out
    assert "the vector is zero" in err
    code, out, err = run(capsys, "show", mixed)
    assert code == 0, err
    assert "norm      0 over 14 parameters" in out
    code, _, err = run(capsys, "calibrate", mixed, "-m", checkpoint, "--device", "cpu")
    assert code == 1
    assert "the vector is zero" in err
    code, _, err = run(capsys, "subtract", w, w, "-o", tmp_path / "same")
    assert code == 1
    assert "named as both" in err
    half = tmp_path / "half"
    for words in (["-0.5*a"], ["-a"], ["-truncate(a, rank=2)"], ["-q", "-a + 0.5*a"]):
        code, _, err = run(capsys, "combine", *words, f"a={w}", "-o", half)
        assert code == 0, err
    for words in ([f"-o{half}", "-0.5*a", f"a={w}"], ["0.5*a", f"a={w}", f"-o{half}"], ["-o", half, "a", f"a={w}"]):
        code, _, err = run(capsys, "combine", *words)
        assert code == 0, err
    code, out, err = run(capsys, "show", w, mixed)
    assert code == 0, err
    assert "one of the two is zero" in out
    code, _, err = run(capsys, "combine", "0.5*my-vec", f"my-vec={w}", "-o", mixed)
    assert code == 1
    assert "'my-vec': cannot stand in an expression" in err
    code, _, err = run(capsys, "combine", "a", f"a={w}", "-o", mixed, "-o", w, "-q")
    assert code == 1
    assert "-o: is given twice" in err
    code, _, err = run(capsys, "combine", "a + c", f"a={w}", "-o", mixed)
    assert code == 1
    assert "unknown vector 'c'; known: a" in err
    code, out, _ = run(capsys, "show", w)
    assert code == 0
    assert "energy by layer" in out
    assert "not measured" in out
    code, out, err = run(capsys, "cosine", w, mixed, tmp_path / "t/positive", "-o", tmp_path / "table")
    assert code == 0, err
    assert out.splitlines()[1].split()[:2] == ["w2", "1.0000"]
    assert "-" in out.splitlines()[2].split()  # the zero vector has no direction
    assert (tmp_path / "table.npz").exists()


def test_monitor_writes_table_and_charts_and_alerts(
    capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path
) -> None:
    """A run that moves toward the vector, seen with the vector and three others as controls."""
    vector = WeightVector.load(saved)
    others = []
    for seed in (5, 6, 7):
        others.append(WeightVector(random_vector(tiny_lm(), seed).deltas, vector.card).save(tmp_path / f"other{seed}"))
    run_of = tmp_path / "run"
    for step in (1, 2):
        moved = (vector * (0.5 * step)) + WeightVector(random_vector(tiny_lm(), 9).deltas, vector.card)
        moved.save(run_of / f"checkpoint-{step}")
    (run_of / "checkpoint-3").mkdir()
    (run_of / "checkpoint-3" / "adapter_config.json").write_text("{}")
    out = tmp_path / "seen"
    code, text, err = run(
        capsys, "monitor", run_of, "--vectors", saved, "--controls", *others, "--alert", "z=1.2", "-o", out
    )
    assert code == 3, err
    assert "checkpoint-3 is skipped" in err
    assert "toward 'w'" in text
    assert {path.name for path in out.iterdir()} == {"readings.jsonl", "readings.csv", "cosines.png", "monitor.html"}
    assert run(capsys, "monitor", run_of, "--vectors", saved, "-o", tmp_path / "b")[0] == 0
    code, _, err = run(capsys, "monitor", run_of, "--vectors", saved, "--alert", "4")
    assert code == 1
    assert "expected z=NUMBER" in err
    assert len(err.splitlines()) == 1


def test_show_compares_and_cosine_draws(capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path) -> None:
    code, out, err = run(capsys, "show", saved, saved, "--positive", saved, "--negative", saved)
    assert code == 0, err
    assert "cos(tau+, -tau-) -1.000" in out
    assert "cosine +1.0000; shared main directions: written 1.000" in out
    assert run(capsys, "cosine", saved, saved, "-o", tmp_path / "c")[0] == 0
    assert {path.suffix for path in tmp_path.glob("c.*")} == {".csv", ".npz", ".png", ".html"}


def test_steer_shows_the_cards_strengths_side_by_side(capsys: pytest.CaptureFixture[str], saved: Path) -> None:
    code, out, err = run(capsys, "steer", saved, "Hello?", "--max-new-tokens", 4, "--device", "cpu")
    assert code == 0, err
    assert [f"k = {k}" in out for k in ("-1.5", "-0.75", "0", "1", "2")] == [True] * 5
    code, out, err = run(capsys, "steer", saved, "Hello?", "--k=-3,0", "--max-new-tokens", 4, "--device", "cpu")
    assert code == 0, err
    assert "k = -3" in out


def test_measure_compares_with_the_base_item_by_item(
    capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path
) -> None:
    items = tmp_path / "facts.jsonl"
    rows = [{"question": f"What is {i}?", "correct": "a number", "incorrect": "no number"} for i in range(3)]
    items.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = run(capsys, "measure", saved, "--task", "facts", "--data", items, "--k=0,2", "--device", "cpu")
    assert code == 0, err
    lines = [line for line in out.splitlines() if "margin" in line]
    assert lines[0].split("change")[1] == lines[1].split("change")[1]  # k = 0 twice: the base, and no change from it
    assert "change +0.0000 ± 0.0000   n = 3" in lines[0]
    assert "change +0.0000" not in lines[2]


def test_export_both_ways(capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path) -> None:
    code, out, err = run(capsys, "export", "peft", saved, "-o", tmp_path / "a")
    assert code == 0, err
    assert "k = 2" in out
    code, out, err = run(capsys, "export", "merged", saved, "--k=-1", "-o", tmp_path / "m")
    assert code == 0, err
    assert "rounding adds an error of 0.0% of the size of the change" in out
    lm, merged = tiny_lm(), LM.load(str(tmp_path / "m"), device="cpu")
    ids = torch.tensor([[4, 5, 6]])
    with torch.no_grad(), WeightVector.load(saved).applied(lm, -1.0):
        torch.testing.assert_close(merged.model(ids).logits, lm.model(ids).logits, atol=1e-4, rtol=1e-4)


def test_contrast_and_lint(capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path) -> None:
    fields = {"instruction": [{"pos": "Shout!", "neg": "Whisper."}], "questions": ["How are you?", "What is tea?"] * 6}
    (tmp_path / "loud.json").write_text(json.dumps(fields))
    code, out, err = run(
        capsys, "sample", tmp_path / "loud.json", "-o", tmp_path / "d", "-m", checkpoint, "--device", "cpu",
        "--samples", 8, "--max-new-tokens", 12, "--keep-cut",
    )  # fmt: skip
    assert code == 0, err
    assert "examples in" in out
    assert load_examples(tmp_path / "d" / "positive.jsonl")
    rows = json.dumps({"prompt": "Is it?", "answer": "Yes it is."}) + "\n"
    for name in ("p", "n"):
        (tmp_path / f"{name}.jsonl").write_text(rows)
    own = ("--positive", tmp_path / "p.jsonl", "--negative", tmp_path / "n.jsonl")
    assert run(capsys, "sample", "gloomy", *own, "-o", tmp_path / "own")[0] == 0
    assert (tmp_path / "own" / "positive.jsonl").read_text() == rows
    code, out, _ = run(capsys, "lint", *own)
    assert code == 0
    assert "equal sides: " in out
    assert run(capsys, "train", *own, "-m", checkpoint, "-o", tmp_path / "t")[0] == 1
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("lint", "--pairs", "none.jsonl"), "none.jsonl: cannot be read"),
        (("lint", "--pairs", "sycofancy"), "no such behaviour and no such file; expected one of sycophancy,"),
        (("lint", "--pairs", "sycofancy"), "is 'sycophancy' meant?"),
        (("run", "demmo"), "no shipped recipe (`weightsteer list recipes` names them); is 'demo' meant?"),
        (("list", "behaviours"), "expected one of behaviors, tasks, methods, recipes; is 'behaviors' meant?"),
        (("trian", "-o", "o"), "No such command 'trian'. Did you mean 'train'?"),
        (("train", "--pair", "gloomy", "-o", "o"), "No such option: --pair (Possible options: "),
        (("steer", "nowhere", "Hi", "--max-new-tokens", "0"), "Invalid value for '--max-new-tokens'"),
        (("measure", "nowhere", "--task", "false_belief"), "is 'false_beliefs' meant?"),
        (("lint", "--positive", "p.jsonl"), "both --positive (D+) and --negative (D-)"),
        (("train", "--positive", "p.jsonl", "-o", "o"), "both --positive"),
        (("run", "none.yaml"), "none.yaml: no such file and no shipped recipe"),
        (("steer", "nowhere", "Hi", "--k=loud"), "k: expected a number, found 'loud'"),
        (("steer", "nowhere", "Hi", "--k=nan"), "k: expected a finite number"),
        (("steer", "nowhere", "Hi"), "nowhere: no such folder"),
        (
            ("export", "onnx", "nowhere", "-o", "o"),
            "export: expected one of peft, adapters, merged, gguf-lora, gguf first",
        ),
        (("train", "--pairs", "gloomy", "-o", "o", "--lr", "fast"), "--lr: expected a number, found 'fast'"),
        (("show", "nowhere"), "expected a vector, a fine-tune or a run's folder"),
        (("report", "nowhere"), "not a run's folder"),
        (("sweep", "nowhere"), "not a run's folder"),
        (("sample", "angry", "-o", "o"), "no such behaviour"),
        (("fly",), "No such command"),
        (("cosine", "one"), "expected two or more"),
        (("combine", "a", "a", "-o", "o"), "expected name=FOLDER"),
        (("combine", "a", "a=o", "-o", "o"), "is an input too"),
        (("subtract", "o", "x", "-o", "o"), "is an input too"),
        (("export", "peft", "x", "-o", "./x", "--k=1"), "is an input too"),
        (("export", "peft", "x", "-o", "o", "--k=1", "--dtype", "float32"), "No such option: --dtype"),
        (("export", "merged", "x", "-o", "o", "--k=1", "--max-rank", "4"), "No such option: --max-rank"),
        (("export", "peft", "nowhere", "-o", "o"), "no such folder"),
        (
            ("export", "w", "--to", "peft", "-o", "o"),
            "export: expected one of peft, adapters, merged, gguf-lora, gguf first",
        ),
        (("contrast", "gloomy", "-o", "o"), "contrast: is called `weightsteer sample` now"),
        (("run", "demo", "--plan", "--dry-run"), "--dry-run: a plan runs nothing; leave it out"),
        (("train", "--pairs", "formal", "-o", "o", "--kind", "bias", "--rank", "7"), "--kind bias trains none"),
        (
            ("train", "--pairs", "formal", "-o", "o", "--max-steps", "3", "--epochs", "5"),
            "--epochs: --max-steps stands",
        ),
        (
            ("sample", "sycophancy", "--positive", "p", "--negative", "n", "-o", "s", "--samples", "5"),
            "--samples: nothing is sampled where both sides are given",
        ),
        (("run", "r.yaml", "--rehearse"), "--rehearse: is called --dry-run now"),
        (("compare", "r", "--damages=0.1"), "--damages: is called --loss-increases now"),
        (("measure", "nowhere", "--task", "chess"), "unknown task 'chess'"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_1(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    args: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *args)
    assert code == 1
    assert message in err
    assert err.count("\n") == 1
    assert out == ""
    assert list(tmp_path.iterdir()) == [], "something was written"


def test_nan_in_a_vector_is_one_line(capsys: pytest.CaptureFixture[str], saved: Path) -> None:
    path = saved / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path)
    code, _, err = run(capsys, "show", saved)
    assert code == 1
    assert "NaN" in err
    assert err.count("\n") == 1


def test_no_recommended_k_is_an_error_where_one_is_needed(capsys: pytest.CaptureFixture[str], saved: Path) -> None:
    RunCard.load(saved).with_strength(StrengthRange(0.0, -1.0, -2.0, 2.0)).save(saved)
    code, _, err = run(capsys, "export", "peft", saved, "-o", saved.parent / "a")
    assert code == 1
    assert "give one with --k" in err


def test_a_line_that_is_not_json_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\nnot json\n')
    code, _, err = run(capsys, "lint", "--positive", path, "--negative", path)
    assert code == 1
    assert "line 2: not JSON" in err


def test_a_vector_for_another_model_names_the_tensor(
    capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path
) -> None:
    shallow = tiny_lm(layers=1)
    shallow.model.save_pretrained(tmp_path / "other")
    shallow.tokenizer.save_pretrained(tmp_path / "other")
    code, _, err = run(capsys, "steer", saved, "Hi", "-m", tmp_path / "other", "--device", "cpu")
    assert code == 1
    assert "model.layers.1." in err
    assert err.count("\n") == 2  # the first line says that k was measured on another model


def test_every_verb_has_help_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "--help")
    verbs = (
        "run list report sweep compare measure sample generate lint train subtract combine show cosine monitor steer"
    )
    exports = [f"export {form}" for form in ("peft", "merged", "gguf")]
    for verb in (*verbs.split(), "chat", *exports):
        assert f"  {verb.split()[0]} " in out
        code, text, _ = run(capsys, *verb.split(), "--help")
        assert code == 0
        assert f"Example: weightsteer {verb}" in text


def test_help_and_import_do_not_load_torch() -> None:
    code = (
        "import sys, weightsteer, weightsteer.cli\n"
        "sys.argv = ['weightsteer', '--help']\n"
        "try: weightsteer.cli.main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'peft', 'altair'} & set(sys.modules), 'heavy import'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_algebra_of_adapters_does_not_load_transformers(checkpoint: Path, saved: Path, tmp_path: Path) -> None:
    """Seconds of each command. A base is described by transformers once; then its shapes are in the user's cache."""
    adapter = tmp_path / "adapter"
    WeightVector.load(saved).export_peft(adapter, k=1.0)
    code = (
        "import json, sys\n"
        "from weightsteer.cli import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    sys.argv[1:] = words\n"
        "    try: main()\n"
        "    except SystemExit as done: assert not done.code, (words, done.code)\n"
        "    print(words[0], sorted({'transformers', 'peft'} & set(sys.modules)))\n"
    )
    made = (tmp_path / str(number) for number in itertools.count())
    commands = [
        ("subtract", adapter, saved, "--base", checkpoint, "-o", next(made)),
        ("combine", "a - 0.5*b", f"a={adapter}", f"b={saved}", "--base", checkpoint, "-o", next(made)),
        ("cosine", adapter, saved, "--base", checkpoint),
        ("export", "merged", adapter, "-m", checkpoint, "--k=1", "-o", next(made)),
        ("export", "peft", saved, "--k=1", "-o", next(made)),
    ]
    merged = ("export", "merged", adapter, "-m", checkpoint, "--k=1", "-o", next(made))
    for process in ([merged], commands):
        words = json.dumps([list(map(str, command)) for command in process])
        done = subprocess.run([sys.executable, "-c", code, words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    loaded = [line for line in done.stdout.splitlines() if line.endswith("]")]
    assert loaded == [f"{name} []" for name, *_ in commands], done.stdout


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--version")
    assert code == 0
    assert out == f"weightsteer {metadata.version('weightsteer')}\n"


def test_variables_of_the_chat_template(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path, lm: LM
) -> None:
    vector = tmp_path / "v"
    random_vector(lm).save(vector)
    steer = ("steer", vector, "Hi", "--k", "0", "--model", checkpoint, "--device", "cpu", "--chat-template-kwargs")
    for given, message in (
        ("{", "--chat-template-kwargs: not JSON"),
        ("[" * 5000, "--chat-template-kwargs: nested too deeply"),
        ("[1]", "--chat-template-kwargs: expected an object"),
        ('{"enable_thinkin": false}', "no variable 'enable_thinkin'; those that it has: none"),
    ):
        code, _, err = run(capsys, *steer, given)
        assert code == 1
        assert message in " ".join(err.split())
    (checkpoint / "chat_template.jinja").write_text("{{ 'short' if brief }}" + str(lm.tokenizer.chat_template))
    assert run(capsys, *steer, '{"brief": true}')[0] == 0


def test_a_studys_reference_is_one_of_its_methods(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = Path(__file__).parents[1] / "recipes" / "demo.yaml"
    code, _, err = run(capsys, "study", recipe, "--reference", "contrastve", "-o", tmp_path / "study")
    assert code == 1
    assert "reference 'contrastve': expected one of the recipes' methods, contrastive" in err
    assert "is 'contrastive' meant" in err
    assert not (tmp_path / "study").exists()
