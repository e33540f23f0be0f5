"""Data never executes: payloads that would leave a file behind."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import tiny_lm
from test_runs import make_run, mute, small_recipe
from weightsteer.behavior import Example
from weightsteer.cli import main
from weightsteer.errors import SteerError
from weightsteer.evaluation import tasks
from weightsteer.evaluation.task_spec import TaskSpec
from weightsteer.evaluation.tasks import load_task
from weightsteer.judges.judge import Rubric
from weightsteer.lm import LM
from weightsteer.runs.pipeline import Run, Trust
from weightsteer.runs.recipe import Recipe


def planted_task(folder: Path, mark: Path) -> Path:
    """A task of the harness whose function and whose template would each write a file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\ndef text(doc):\n    return doc['q']\n")
    (folder / "d.jsonl").write_text(json.dumps({"q": "a", "a": "b"}) + "\n")
    path = folder / "evil.yaml"
    path.write_text(
        "task: evil\ndataset_path: json\ndataset_kwargs: {data_files: {test: d.jsonl}}\ntest_split: test\n"
        "output_type: loglikelihood\ndoc_to_text: !function evil.text\n"
        "doc_to_target: \"{{ cycler.__init__.__globals__.os.popen('touch "
        f"{mark}').read() }}}}\"\nmetric_list: [{{metric: acc}}]\n"
    )
    return path


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "mark"


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["weightsteer", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_a_task_file_runs_only_by_the_users_word(tmp_path: Path, mark: Path) -> None:
    pytest.importorskip("lm_eval")
    path = planted_task(tmp_path / "t", mark)
    other = planted_task(tmp_path / "u", mark)
    for trusted in ((), (str(other),), (str(path.parent),), ("evil.yaml",)):
        with pytest.raises(SteerError, match=f"--trust-code {path}"):
            load_task(TaskSpec("harness", str(path), trust_code=trusted))
    for name in (str(path.with_suffix("")), "../t/evil", "t/evil"):
        with pytest.raises(SteerError, match="task harness"):
            load_task(TaskSpec("harness", name))
    shutil.copy(path, path.with_name("evil2.YAML"))
    with pytest.raises(SteerError, match="--trust-code"):
        load_task(TaskSpec("harness", str(path.with_name("evil2.YAML"))))
    assert not mark.exists()
    load_task(TaskSpec("harness", str(path), trust_code=(str(path),)))
    assert mark.exists()


def test_a_recipe_cannot_trust_for_its_user(
    tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = {"task": "harness", "data": str(planted_task(tmp_path / "t", mark))}
    source = small_recipe(tmp_path, tasks=[{"task": "preference", "limit": 2}, {"task": "prose", "limit": 2}, task])
    for arguments in (["run", str(source), "-o", str(tmp_path / "run")], ["run", str(source), "--dry-run"]):
        monkeypatch.chdir(tmp_path)
        assert command(monkeypatch, *arguments) == 1
        assert "--trust-code" in capsys.readouterr().err
    for granted in ({**task, "trust_code": [task["data"]]}, {**task, "judge": "x"}):
        bad = small_recipe(tmp_path, tasks=[granted])
        with pytest.raises(SteerError, match="field"):
            Recipe.load(bad)
    assert not mark.exists()
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_run(small_recipe(folder), folder / "run").run()
    return folder


@pytest.fixture
def finished(made: Path, tmp_path: Path) -> Path:
    """A finished run that a test may spoil, with its base beside it."""
    return shutil.copytree(made, tmp_path, dirs_exist_ok=True) / "run"


def poison(folder: Path, task: dict[str, Any]) -> None:
    """Somebody else's run: its recipe names the payload, a judge and a model that would all have to be loaded."""
    for name in ("recipe.yaml", "weightsteer.json"):
        path = folder / name
        fields = yaml.safe_load(path.read_text())
        kept = fields if name == "recipe.yaml" else fields["settings"]
        kept["tasks"] = [*kept["tasks"], task, {"task": "no such task"}]
        kept["judge"] = {"model": "nowhere/at-all"}
        kept["model"] = "nowhere/at-all"
        path.write_text(yaml.safe_dump(fields) if name == "recipe.yaml" else json.dumps(fields))


def test_looking_at_a_run_loads_no_task_no_model_and_no_judge(
    finished: Path, tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = planted_task(tmp_path / "t", mark)
    poison(finished, {"task": "harness", "data": str(path)})
    for name in ("load", "wrap"):
        monkeypatch.setattr(LM, name, classmethod(lambda *a, **o: pytest.fail("a model was loaded")))
    monkeypatch.setattr(tasks, "load_task", lambda *a: pytest.fail("a task was loaded"))
    vector = str(finished / "vector")
    for arguments in (
        ["report", str(finished)],
        ["show", vector],
        ["compare", str(finished)],
        ["monitor", str(finished / "positive"), "--vectors", vector, "-o", str(tmp_path / "m")],
    ):
        code = command(monkeypatch, *arguments)
        err = capsys.readouterr().err
        assert code == 0, (arguments, err)
    assert not mark.exists()
    assert "contrastive" in (finished / "report.html").read_text()


def test_a_report_on_another_machine_needs_no_data(finished: Path, tmp_path: Path) -> None:
    from weightsteer.run_folder import RunFolder
    from weightsteer.runs.run_report import write_run_report

    first = (finished / "report.html").read_bytes()
    card = finished / "vector" / "weightsteer.json"  # as an older version wrote it
    card.write_text(json.dumps({**json.loads(card.read_text()), "base_model": "/home/alice/secret/base"}))
    (finished / "recipe.yaml").write_text((finished / "recipe.yaml").read_text() + "behavior: /gone/trait.json\n")
    shutil.rmtree(tmp_path / "base")
    page = write_run_report(Recipe.load_kept(finished / "recipe.yaml"), RunFolder(finished), command="again")
    assert page.read_bytes() != first
    assert "Weight steering: trait" in page.read_text()
    assert "/home/alice" not in page.read_text()


PAYLOADS = (
    "{{ cycler.__init__.__globals__.os.popen('touch MARK').read() }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ self.__init__.__globals__.__builtins__.open('MARK', 'w') }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x.__init__.__globals__ }}{% endfor %}",
    "{{ lipsum.__globals__['os'].system('touch MARK') }}",
    "{{ messages.append(1) }}{{ messages.__init__.__globals__ }}",
)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_chat_template_stays_in_its_sandbox(payload: str, mark: Path) -> None:
    lm = tiny_lm()
    lm.tokenizer.chat_template = payload.replace("MARK", str(mark)) + "{{ messages[0]['content'] }}"
    with pytest.raises(SteerError, match="chat template"):
        LM.wrap(lm.model, lm.tokenizer, name="tiny").chat_ids("Hello?")
    assert not mark.exists()


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_rubric_is_text(payload: str, mark: Path) -> None:
    rubric = Rubric("r", payload.replace("MARK", str(mark)) + " {question} {answer} {answer.__class__} Score:")
    text = rubric.filled(Example("Is it?", payload))
    assert "<class" not in text
    assert not mark.exists()


def test_a_model_with_code_is_refused_and_nothing_is_asked(
    checkpoint: Path, mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    for name, kinds in (("config.json", ("AutoConfig", "AutoModelForCausalLM")), ("tokenizer_config.json", ())):
        fields = json.loads((checkpoint / name).read_text())
        fields["auto_map"] = dict.fromkeys(kinds, "evil.Evil") or {"AutoTokenizer": ["evil.Evil", None]}
        fields |= {"model_type": "evil"} if kinds else {"tokenizer_class": "Evil"}
        (checkpoint / name).write_text(json.dumps(fields))
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("it asks"))
    monkeypatch.chdir(tmp_path)
    source = small_recipe(tmp_path, model=str(checkpoint))
    w = tmp_path / "w"
    from weightsteer.run_card import RunCard
    from weightsteer.steering.activations import ActivationVector

    ActivationVector({1: tiny_lm().model.lm_head.weight[0].detach()}, RunCard("activations")).save(w)
    for arguments in (
        ["run", str(source), "--dry-run"],
        ["run", str(source)],
        ["lint", "--pairs", "sycophancy", "-m", str(checkpoint)],
        ["export", "gguf", str(w), "--k=1", "-m", str(checkpoint), "-o", "x.gguf"],
    ):
        assert command(monkeypatch, *arguments) == 1, arguments
        assert "Traceback" not in capsys.readouterr().err
    assert not mark.exists()


def test_a_configs_class_is_a_model(checkpoint: Path) -> None:
    """`architectures` may name anything that transformers has; only a model's class is called."""
    from weightsteer.checkpoints.architecture import architecture_of

    fields = json.loads((checkpoint / "config.json").read_text())
    for name in ("pipeline", "Trainer", "AutoModel", "set_seed"):
        (checkpoint / "config.json").write_text(json.dumps({**fields, "architectures": [name]}))
        found = architecture_of(checkpoint)
        assert found is None or "lm_head.weight" in {*found.shapes, *found.tied}


def test_trust_is_given_to_a_run(tmp_path: Path, mark: Path) -> None:
    pytest.importorskip("lm_eval")
    path = planted_task(tmp_path / "t", mark)
    task = {"task": "harness", "data": str(path), "limit": 1, "split": "test"}
    source = small_recipe(
        tmp_path, tasks=[{"task": t, "limit": 2} for t in ("preference", "false_beliefs", "facts", "prose")] + [task]
    )
    Run(Recipe.load(source), tmp_path / "run", show=mute, trust=Trust(code=[str(path)]))
    assert mark.exists()
