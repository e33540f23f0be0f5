"""What watching costs: the monitor's share of a LoRA step of the embedded model.

OMP_WAIT_POLICY=passive .venv/bin/python benchmarks/monitoring.py VECTOR [VECTOR ...]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from weightsteer import LM, SteeringMonitor, WeightVector, load_pairs

STEPS = 12


class Timed(SteeringMonitor):
    """The monitor, with the time that each reading takes and that each step took."""

    def __init__(self, vectors: dict[str, WeightVector]) -> None:
        super().__init__(vectors, every=1)
        self.spent: list[float] = []
        self.steps: list[float] = []
        self.begun = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        start = time.perf_counter()
        super().on_step_end(args, state, control, **kwargs)
        self.steps.append(start - self.begun)
        self.spent.append(time.perf_counter() - start)


def shares(vectors: dict[str, WeightVector]) -> list[float]:
    """Time of a reading over time of the step before it, for each step but the first two."""
    lm = LM.load()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model: Any = get_peft_model(lm.model, LoraConfig(r=32, lora_alpha=16, target_modules=targets))
    rows = []
    for pair in load_pairs("sycophancy")[: 8 * STEPS]:
        prompt, answer = lm.chat_ids(pair.prompt), lm.answer_ids(pair.positive)
        ids = [*prompt, *answer]
        rows.append({"input_ids": ids, "labels": [-100] * len(prompt) + list(answer), "attention_mask": [1] * len(ids)})
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=STEPS, per_device_train_batch_size=8, save_strategy="no", report_to="none"
        )
        collator = DataCollatorForSeq2Seq(lm.tokenizer, label_pad_token_id=-100)
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator)
        monitor = Timed(vectors)
        monitor.watch(trainer)
        trainer.train()
    return [spent / step for spent, step in zip(monitor.spent[2:], monitor.steps[2:], strict=True)]


def main() -> None:
    vectors = {f"v{number}": WeightVector.load(folder) for number, folder in enumerate(sys.argv[1:])}
    for count in sorted({1, len(vectors)}):
        found = shares(dict(list(vectors.items())[:count]))
        print(
            f"{count} vectors: a reading takes {statistics.median(found):.2%} of a step of 8 (median of {len(found)}; "
            f"{min(found):.2%} to {max(found):.2%}); at every=10 {statistics.median(found) / 10:.2%}"
        )


if __name__ == "__main__":
    main()
