"""A sweep against lm-evaluation-harness: the same questions, on the adapter merged at each k."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from measure import in_turn, table, time_function
from peft import PeftModel
from steering import vector_for
from transformers import AutoModelForCausalLM

from weightsteer import LM
from weightsteer.evaluation.sweep import run_sweep
from weightsteer.evaluation.task_spec import TaskSpec
from weightsteer.evaluation.tasks.capability import load_facts
from weightsteer.evaluation.tasks.data import task_file
from weightsteer.run_folder import RunFolder
from weightsteer.steering.steering import Direction

KS = (-2.0, -1.5, -1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 1.5, 2.0)  # ten cells; 0 is the base
BATCH = 8


def sweep(runs: int, questions: int | None = None) -> str:
    """Ten cells of the shipped facts, two answers scored for each question; importing either program is not timed."""
    lm = LM.load(device="cpu", dtype="float32")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        lm.model.save_pretrained(root / "base")
        lm.tokenizer.save_pretrained(root / "base")
        vector_for(lm, 64).save(root / "vector")
        found: dict[str, list[float]] = {}
        medians = in_turn(
            {
                "weightsteer": lambda: time_function(lambda: found.update(ours=_ours(lm, root, questions))),
                "lm-evaluation-harness, merged at each k": lambda: time_function(
                    lambda: found.update(theirs=_theirs(root, questions))
                ),
            },
            runs,
            warm=0,
        )
    apart = max(abs(a - b) for a, b in zip(found["ours"], found["theirs"], strict=True))
    count = questions or len(load_facts(TaskSpec("facts")).items)
    return (
        f"## A sweep\n\n{len(KS)} cells of {count} questions with two answers each, embedded model, float32, batch "
        f"{BATCH}; accuracies differ by {apart:.3f} at most:\n\n{table(medians, 'weightsteer')}"
    )


def _ours(lm: LM, root: Path, questions: int | None) -> list[float]:
    """Accuracy at each k, by hooks on one model."""
    from weightsteer.vectors.weight_vector import WeightVector

    task = load_facts(TaskSpec("facts")).all_in("test")
    task = task.first(questions) if questions else task
    method = Direction("contrastive", WeightVector.load(root / "vector"))
    with tempfile.TemporaryDirectory() as folder:
        rows = run_sweep(lm, [(method, [k for k in KS if k])], [task], RunFolder(Path(folder)), batch_size=BATCH)
    accuracy = {row.k: row.value for row in rows if row.metric == "accuracy" and not row.change}
    return [accuracy[k] for k in KS]


def _theirs(root: Path, questions: int | None) -> list[float]:
    """The same from the harness: each k is a model of its own, read from the disk and merged."""
    return [_accuracy(_merged(root, k), root, questions) for k in KS]


def _merged(root: Path, k: float) -> torch.nn.Module:
    base = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(base, str(root / "vector"))
    for module in model.modules():
        if hasattr(module, "scaling") and isinstance(module.scaling, dict):
            module.scaling = {name: scale * k for name, scale in module.scaling.items()}
    merged: torch.nn.Module = model.merge_and_unload()
    return merged


def _accuracy(model: torch.nn.Module, root: Path, questions: int | None) -> float:
    wrapped: Any = HFLM(pretrained=model, tokenizer=str(root / "base"), backend="causal", batch_size=BATCH)
    with chdir(_folder_of_tasks()):  # where the task's data are looked for
        found = simple_evaluate(
            model=wrapped,
            tasks=["harness_facts"],
            task_manager=TaskManager(include_path=".", include_defaults=False),
            limit=questions,
            apply_chat_template=True,
            bootstrap_iters=0,
            log_samples=False,
        )
    return float(found["results"]["harness_facts"]["acc_norm,none"])


def _folder_of_tasks() -> Path:
    return task_file("harness_facts.yaml", None).parent


def main(arguments: Sequence[str]) -> None:
    """Run once, on so many questions."""
    print(sweep(1, int(arguments[0]) if arguments else None))


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
