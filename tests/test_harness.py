from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from conftest import TEMPLATE, byte_tokenizer, random_vector, tiny_lm, tiny_model
from weightsteer.engines.dialects import dialect_of
from weightsteer.engines.served_model import ServedModel
from weightsteer.errors import SteerError
from weightsteer.evaluation.engine_plan import Counting
from weightsteer.evaluation.tasks import harness
from weightsteer.evaluation.tasks.capability import load_facts
from weightsteer.evaluation.tasks.harness import HarnessTask, load_harness
from weightsteer.evaluation.tasks.task import TaskSpec
from weightsteer.lm import LM
from weightsteer.progress import silent
from weightsteer.run_card import RunCard
from weightsteer.scoring import score_choices
from weightsteer.vectors.weight_vector import WeightVector

lm_eval_tasks = pytest.importorskip("lm_eval.tasks")

ROWS = [
    {"ask": f"Which sea is number {i}?", "options": [f"sea {i}", "the red one", "deep", "no"], "gold": i % 4}
    for i in range(12)
]
CHOOSE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{ask}}",
    "doc_to_choice": "options",
    "doc_to_target": "gold",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
RECITE = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{ask}}",
    "doc_to_target": "{{options[gold]}}",
    "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
}


@pytest.fixture
def lm() -> LM:
    """The tiny model under a template whose end is no white space, which the harness counts to the answer."""
    lm = tiny_lm()
    role = "{{ m['role'] }}{{ ':' if m['role'] == 'assistant' else '\n' }}"
    lm.tokenizer.chat_template = TEMPLATE.replace("<s>assistant\n", "<s>assistant:").replace("{{ m['role'] }}\n", role)
    return lm


def write_task(folder: Path, fields: dict[str, Any], name: str = "seas", rows: Sequence[dict[str, Any]] = ROWS) -> str:
    """A task's YAML beside its data, which it names without a folder."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"data_files": {"test": f"{name}.jsonl"}}
    config = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test", **fields}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return str(folder / f"{name}.yaml")


def trusted(data: str, **more: Any) -> TaskSpec:
    return TaskSpec("harness", data, trust_code=(data,), **more)


def load(folder: Path, fields: dict[str, Any], **more: Any) -> HarnessTask:
    return load_harness(trusted(write_task(folder, fields), **more))


def by_id(task: HarnessTask, lm: LM, metric: str) -> dict[int, float | None]:
    return dict(zip(task.ids, task.measure(lm)[metric], strict=True))


def best(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=lambda i: scores[i])


def test_accuracy_is_that_of_the_likeliest_choice(lm: LM, tmp_path: Path) -> None:
    values = load(tmp_path, CHOOSE).measure(lm, batch_size=3)
    scored = score_choices(lm, [row["ask"] for row in ROWS], [row["options"] for row in ROWS])
    totals = [[score.total for score in row] for row in scored]
    assert values["acc"] == [float(best(t) == row["gold"]) for t, row in zip(totals, ROWS, strict=True)]
    shares = [
        [t / len(o) for t, o in zip(ts, row["options"], strict=True)] for ts, row in zip(totals, ROWS, strict=True)
    ]
    assert values["acc_norm"] == [float(best(s) == row["gold"]) for s, row in zip(shares, ROWS, strict=True)]
    assert 0 < sum(values["acc"]) < len(ROWS)  # type: ignore[arg-type]


def test_a_log_likelihood_is_that_of_our_own_scoring_steered_or_asked_otherwise(lm: LM, tmp_path: Path) -> None:
    task = load(tmp_path, RECITE).first(2)
    for steered in (lm, lm.with_system_prompt("Speak like a sailor.")):
        for k in (0.0, 2.0):
            with random_vector(lm).applied(lm, k):
                found = by_id(task, steered, "loglikelihood")
                for i, value in found.items():
                    ((score,),) = score_choices(steered, [ROWS[i]["ask"]], [[ROWS[i]["options"][ROWS[i]["gold"]]]])
                    assert value == pytest.approx(score.total, rel=1e-4)


def test_k_0_is_the_base_and_steering_moves_the_values(lm: LM, tmp_path: Path) -> None:
    task = load(tmp_path, RECITE)
    base = task.measure(lm)
    with random_vector(lm).applied(lm, 0.0) as handle:
        assert task.measure(lm) == base
        handle.k = 1.0
        assert task.measure(lm)["loglikelihood"] != base["loglikelihood"]
    assert task.measure(lm) == base


def test_white_space_at_the_end_of_the_template_counts_to_the_answer(tmp_path: Path) -> None:
    lm, task = tiny_lm(), load(tmp_path, RECITE).first(1)
    ids = lm.chat_ids(ROWS[0]["ask"]) + lm.answer_ids(ROWS[0]["options"][0])
    with torch.no_grad():
        log_p = lm.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    start = len(lm.chat_ids(ROWS[0]["ask"])) - 1  # the line break after "assistant"
    expected = sum(float(log_p[at - 1, ids[at]]) for at in range(start, len(ids)))
    assert by_id(task, lm, "loglikelihood")[0] == pytest.approx(expected, rel=1e-4)


def test_swapped_norms_and_tied_embeddings_survive_the_harness(lm: LM, tmp_path: Path) -> None:
    task = load(tmp_path, RECITE).first(1)
    before = {name: (p, p.detach().clone()) for name, p in lm.model.named_parameters()}
    deltas = {
        name: torch.full_like(before[name][1], 0.1) for name in ("model.norm.weight", "model.embed_tokens.weight")
    }
    with WeightVector(deltas, RunCard("vector")).applied(lm, 1.0):
        value = by_id(task, lm, "loglikelihood")[0]
        ((score,),) = score_choices(lm, [ROWS[0]["ask"]], [[ROWS[0]["options"][0]]])
        assert value == pytest.approx(score.total, rel=1e-4)
    for name, parameter in lm.model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_first_runs_those_documents_only_and_they_pair_by_their_ids(lm: LM, tmp_path: Path) -> None:
    task = load(tmp_path, RECITE)
    small = task.first(2).of_split("test")
    assert small.ids == (1, 3)
    asked: list[float] = []
    whole = by_id(task, lm, "loglikelihood")
    found = small.measure(lm, progress=lambda done, total, note="": asked.append(total))["loglikelihood"]
    assert found == pytest.approx([whole[1], whole[3]], rel=1e-4)
    assert asked == [2]
    assert set(task.all_in("test").splits) == {"test"}
    assert task.renamed("seas").name == "seas"


def test_few_shot_examples_do_not_hang_on_the_selection(lm: LM, tmp_path: Path) -> None:
    task = load(tmp_path, {**RECITE, "num_fewshot": 2, "fewshot_split": "test"})
    whole = by_id(task, lm, "loglikelihood")
    assert whole == pytest.approx(by_id(task, lm, "loglikelihood"))
    assert by_id(task.of_split("test").first(3), lm, "loglikelihood") == pytest.approx(
        {i: whole[i] for i in (1, 3, 5)}, rel=1e-4
    )
    assert by_id(load(tmp_path, RECITE), lm, "loglikelihood")[0] != pytest.approx(whole[0], rel=1e-4)


def test_generated_replies_under_several_filters(lm: LM, tmp_path: Path) -> None:
    fields = {
        "output_type": "generate_until",
        "doc_to_text": "{{ask}}",
        "doc_to_target": "sea",
        "generation_kwargs": {"until": ["\n"], "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": [
            {"name": "as it is", "filter": [{"function": "take_first"}]},
            {
                "name": "sea",
                "filter": [
                    {"function": "regex", "regex_pattern": "zzz", "fallback": "sea"},
                    {"function": "take_first"},
                ],
            },
        ],
    }
    values = load(tmp_path, fields, max_new_tokens=3).first(1).measure(lm)
    assert values == {"exact_match,as it is": [0.0, 0.0], "exact_match,sea": [1.0, 1.0]}


def test_a_server_gives_the_numbers_of_the_model_here(lm: LM, tmp_path: Path) -> None:
    pytest.importorskip("weightsteer.serving.server")
    from lm_eval.api.instance import Instance

    from served import served as our_server
    from weightsteer.evaluation.served_harness import served_for_harness

    def asked(kind: Any, *arguments: tuple[Any, ...]) -> list[Any]:
        return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]

    pairs = asked("loglikelihood", ("Which sea ", "is red?"), ("", "Deep water."), ("No", " s"))
    texts = asked("loglikelihood_rolling", ("The sea is deep. " * 3,), ("Tea",))
    settings = {"until": ["e", "zz"], "do_sample": False, "max_gen_toks": 7}
    replies = asked("generate_until", ("Which sea?", settings), ("And why so?", {"until": [], "max_gen_toks": 4}))
    vector, task = random_vector(lm), load(tmp_path, {**CHOOSE, "num_fewshot": 1, "fewshot_split": "test"}).first(2)
    with our_server(LM.wrap(tiny_model(), lm.tokenizer, name="tiny"), {"loud": vector}) as address:
        server = ServedModel.connect(address.url, "weightsteer", lm).with_system_prompt("Be brief.")
        for k in (0.0, 0.7):
            there = server.steered({"loud": k})
            harness_here, harness_there = harness._wrap(lm, 2, silent), served_for_harness(there, silent)
            mine, running, said = (
                harness_there.loglikelihood(pairs),
                harness_there.loglikelihood_rolling(texts),
                harness_there.generate_until(replies),
            )
            values = task.measure(there)
            with vector.applied(lm, k):
                theirs = harness_here.loglikelihood(pairs)
                assert running == pytest.approx(harness_here.loglikelihood_rolling(texts), abs=1e-3)
                assert said == harness_here.generate_until(replies)
                assert values == task.measure(lm.with_system_prompt("Be brief."))
            assert [total for total, _ in mine] == pytest.approx([total for total, _ in theirs], abs=1e-3)
            assert [flag for _, flag in mine] == [flag for _, flag in theirs]


def test_what_the_plan_counts_and_what_no_server_writes(lm: LM, tmp_path: Path) -> None:
    counting = Counting(lm, dialect_of("vllm", "", 0))
    load(tmp_path, CHOOSE).first(1).measure(counting)
    assert counting.cost.requests == 2 * 4
    reply = {**RECITE, "output_type": "generate_until", "metric_list": [{"metric": "exact_match"}]}
    for settings, needed in (({"until": ["e"]}, False), ({"num_beams": 2}, True), ({"do_sample": True}, True)):
        assert load(tmp_path, {**reply, "generation_kwargs": settings}).needs_weights == needed


def test_the_shipped_facts_are_the_facts(lm: LM) -> None:
    task, facts = load_harness(TaskSpec("harness")), load_facts(TaskSpec("facts"))
    assert task.splits == facts.splits
    assert task.first(3).measure(lm)["acc_norm"] == facts.first(3).measure(lm)["accuracy"]  # a byte is a token
    assert load_harness(TaskSpec("harness", "harness_facts")).sha256 == task.sha256


def test_a_group_takes_of_each_task_in_turn(lm: LM, tmp_path: Path) -> None:
    write_task(tmp_path, RECITE, "seas")
    write_task(tmp_path, CHOOSE, "lakes", ROWS[:3])
    (tmp_path / "waters.yaml").write_text(yaml.safe_dump({"group": "waters", "task": ["seas", "lakes"]}))
    task = load_harness(trusted(str(tmp_path / "waters.yaml"))).first(2)
    assert [(item.task, item.number) for item in task.items] == [("seas", 0), ("lakes", 0), ("seas", 1), ("lakes", 1)]
    values = task.measure(lm)
    assert [value is None for value in values["loglikelihood"]] == [False, True, False, True]
    assert [value is None for value in values["acc_norm"]] == [True, False, True, False]
    assert None not in values["acc"]


def test_both_splits_of_a_group_hold_half_of_each_task(tmp_path: Path) -> None:
    for name in ("seas", "lakes"):
        write_task(tmp_path, CHOOSE, name)
    (tmp_path / "waters.yaml").write_text(yaml.safe_dump({"group": "waters", "task": ["seas", "lakes"]}))
    task = load_harness(trusted(str(tmp_path / "waters.yaml")))
    found = Counter((item.task, split) for item, split in zip(task.items, task.splits, strict=True))
    assert found == {(name, split): 6 for name in ("seas", "lakes") for split in ("validation", "test")}
    assert task.of_split("test").first(2).splits == ("test",) * 2


def test_a_model_without_a_template_gets_plain_text(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(TEMPLATE)
    tokenizer.chat_template = None
    lm = LM.wrap(tiny_model(), tokenizer, name="base")
    value = by_id(load(tmp_path, CHOOSE | RECITE | {"doc_to_choice": None}).first(1), lm, "loglikelihood")[0]
    head = tokenizer(ROWS[0]["ask"])["input_ids"]
    ids = head + tokenizer(ROWS[0]["options"][0])["input_ids"]
    with torch.no_grad():
        log_p = lm.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = sum(float(log_p[at - 1, ids[at]]) for at in range(len(head), len(ids)))
    assert value == pytest.approx(expected, rel=1e-4)


def test_the_hash_follows_documents_settings_and_splits(tmp_path: Path) -> None:
    task = load(tmp_path, CHOOSE)
    assert load(tmp_path / "moved", CHOOSE).sha256 == task.sha256  # where it lies does not matter
    others = [
        load(tmp_path, {**CHOOSE, "description": "Think. "}),
        load_harness(trusted(write_task(tmp_path, CHOOSE, rows=[*ROWS[:-1], {**ROWS[-1], "gold": 1}]))),
        task.all_in("test"),
        task.first(2),
    ]
    assert len({task.sha256, *(other.sha256 for other in others)}) == 5


def test_progress_is_told_and_the_harness_is_quiet(
    lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "PART", 2)
    level = logging.getLogger("lm_eval").level
    told: list[tuple[float, float]] = []
    task = load(tmp_path, RECITE)
    task.measure(lm, batch_size=2, progress=lambda done, total, note="": told.append((done, total)))
    assert told == [(4, 12), (8, 12), (12, 12)]
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("lm_eval").level == level


def test_a_system_prompt_that_the_template_refuses(lm: LM, tmp_path: Path) -> None:
    task = load(tmp_path, RECITE).first(1)
    with pytest.raises(SteerError, match="cannot ask for an empty system prompt"):
        task.measure(lm.with_system_prompt(""))
    lm.tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    assert task.measure(lm)["loglikelihood"]
    with pytest.raises(SteerError, match="chat template has no system role, and the harness"):
        task.measure(lm.with_system_prompt("Be rude."))


def test_tasks_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(data: str | None, message: str) -> None:
        with pytest.raises(SteerError, match=message):
            load_harness(trusted(data))

    write_task(tmp_path / "known", {**CHOOSE, "dataset_path": "nobody/nothing", "dataset_kwargs": {}}, "arc_easy")
    known = lm_eval_tasks.TaskManager(include_path=str(tmp_path / "known"), include_defaults=False)
    monkeypatch.setattr(harness, "known_tasks", lambda: known)
    refused("arc_esy", "unknown task 'arc_esy'; similar names: arc_easy; or name a task's YAML file")
    refused("arc_easy", "arc_easy: cannot be loaded .*nobody/nothing.* check the network and HF_HUB_OFFLINE")
    refused(str(tmp_path / "none.yaml"), r"none\.yaml: no such file; expected a task's YAML")
    refused(
        write_task(tmp_path, {**CHOOSE, "test_split": "exam"}), r"seas\.yaml: cannot be loaded .*exam.*check the file"
    )
    refused(write_task(tmp_path, {**CHOOSE, "unsafe_code": True}), "seas: runs code that the model writes")
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    refused(None, r"needs lm-evaluation-harness: run `pip install 'weightsteer\[harness\]'`")


def test_a_task_without_a_number_for_each_document(lm: LM, tmp_path: Path) -> None:
    task = load(tmp_path, {**CHOOSE, "metric_list": [{"metric": "f1"}]})
    with pytest.raises(SteerError, match="no metric is a number for each document"):
        replace(task.first(1), name="seas").measure(lm)
