"""Does it help to hold a line while training? Held and resisted vectors against training as it is, and repair after it.

    OMP_NUM_THREADS=1 python recipes/monitoring/holding.py runs/bank

Two tasks of the bank: rewriting with 30% of rude, and with 30% of gloomy replies among its data. Each is trained as it
is, with k w of the trait's vector held in place, and with a penalty on the projection of tau on w. The repair takes
k w from the model that was trained as it is, at three k. Three seeds.
What is finished is kept. About half an hour on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from bank import HELD_OUT, HERE, Bank, FineTune, bank, probe_pairs, read_plan
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from weightsteer import WeightVector, load_examples, task_vector
from weightsteer.checkpoints.embedded_model import public_base
from weightsteer.evaluation.tasks import TaskSpec
from weightsteer.evaluation.tasks.capability import load_prose
from weightsteer.files import read_json, write_json
from weightsteer.model_parts import width_of
from weightsteer.monitor import SteeringMonitor
from weightsteer.scoring import score_choices, score_texts
from weightsteer.training.defaults import resolve
from weightsteer.training.sft import encode

SEEDS = (0, 1, 2)
TRAITS = ("rude", "gloomy")
SHARE = 0.3
HOLD = 0.5  # times w, applied while training
RESIST = 1000.0  # times the squared projection, nats
REPAIR = (0.1, 0.2, 0.4)  # times w, taken from the trained model
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEXTS = 8


def train(made: Bank, entry: FineTune, out: Path, seed: int, **monitoring: Any) -> WeightVector:
    """tau of a LoRA fine-tune by transformers' own Trainer, with a vector watched, held or resisted."""
    if not (out / "adapter_config.json").exists():
        settings = resolve(made.settings(seed), examples=len(entry.examples), width=width_of(made.lm.model))
        torch.manual_seed(seed)
        config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=LINEAR)
        config.base_model_name_or_path = public_base(made.lm.name)
        model: Any = get_peft_model(made.lm.model, config)
        arguments = TrainingArguments(
            output_dir=str(out / "trainer"), max_steps=settings.max_steps, seed=seed,
            warmup_steps=settings.warmup_steps,
            per_device_train_batch_size=settings.batch_size, learning_rate=settings.learning_rates[0],
            save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        rows = [{name: row[name] for name in ("input_ids", "labels")} for row in encode(made.lm, entry.examples, 512)]
        collator = DataCollatorForSeq2Seq(made.lm.tokenizer)
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator)
        SteeringMonitor(every=4, **monitoring).watch(trainer)
        trainer.train()
        model.save_pretrained(out)
        model.unload()
    return task_vector(out)


def measured(made: Bank, path: Path, vector: WeightVector | None, trait: str) -> dict[str, Any]:
    """The trait's margins, the loss on the task's held-out answers and on ordinary text, with a vector applied."""
    if not path.exists():
        pairs, task = probe_pairs(trait), load_examples(HERE / "rewriting.jsonl")[-HELD_OUT:]
        with vector.applied(made.lm) if vector else nullcontext():
            both = score_choices(made.lm, [p.prompt for p in pairs], [(p.positive, p.negative) for p in pairs])
            answers = score_choices(made.lm, [e.prompt for e in task], [(e.answer,) for e in task])
            texts = score_texts(made.lm, load_prose(TaskSpec("prose")).first(TEXTS).items)
        found = {
            "margins": [one.mean - other.mean for one, other in both],
            "task": [-row[0].mean for row in answers],
            "prose": [-score.mean for score in texts],
        }
        write_json(path, found)
    return dict(read_json(path))


def variants(made: Bank, trait: str, entry: FineTune, seed: int, out: Path) -> Iterator[tuple[str, WeightVector]]:
    """Each way's name and its change of the base."""
    w = made.trait(trait)
    watched = {"vectors": {trait: w}}
    plain = train(made, entry, out / "as it is", seed, **watched)
    yield "as it is", plain
    yield f"held at {HOLD:g}", train(made, entry, out / "held", seed, hold={trait: HOLD}, **watched)
    yield f"resisted by {RESIST:g}", train(made, entry, out / "resisted", seed, resist={trait: RESIST}, **watched)
    for k in REPAIR:
        yield f"repaired by -{k:g} w", plain - w * k


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bank", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    plan = read_plan()
    made, out = Bank(options.bank, plan), options.bank / "holding"
    entries = {entry.kind: entry for entry in bank(plan) if entry.share == SHARE}
    rows = []
    for trait in TRAITS:
        base = measured(made, out / trait / "base.json", None, trait)
        found: dict[str, list[dict[str, float]]] = {}
        for seed in SEEDS:
            here = out / trait / str(seed)
            for name, vector in variants(made, trait, entries[trait], seed, here):
                values = measured(made, here / f"{name}.json", vector, trait)
                change = {what: fmean(values[what]) - fmean(base[what]) for what in base}
                found.setdefault(name, []).append(change)
                print(trait, seed, name, {what: round(value, 3) for what, value in change.items()}, flush=True)
        rows += [{"trait": trait, "way": name, "seeds": changes} for name, changes in found.items()]
    write_json(options.bank / "holding.json", {"rows": rows})
    for row in rows:
        cells = [[change[what] for change in row["seeds"]] for what in ("margins", "task", "prose")]
        numbers = " | ".join(f"{fmean(cell):+.3f} ± {stdev(cell) / len(cell) ** 0.5:.3f}" for cell in cells)
        print(f"| {row['trait']} | {row['way']} | {numbers} |")


if __name__ == "__main__":
    main()
