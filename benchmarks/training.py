"""Training tokens per second against TRL's SFTTrainer with PEFT: the same pairs, batch and LoRA."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from measure import Usage, in_turn
from peft import LoraConfig
from synthetic import ALL_LINEAR
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from weightsteer import LM, TrainSettings, load_pairs
from weightsteer.behavior import Example, sides_of
from weightsteer.run_card import RunCard
from weightsteer.training import train_side
from weightsteer.training.callbacks import StepClock

BATCH, RANK, ALPHA, RATE = 8, 32, 16, 1e-4
PAIRS = 136  # of which we hold 8 out; one epoch of the rest is 16 steps


def against_trl(runs: int, pairs: int = PAIRS) -> str:
    """Tokens a second in training steps: prompts included; padding, validation and saving not."""
    examples = sides_of(load_pairs("sycophancy")[:pairs])[0]
    lines = ["| products in | weightsteer, tokens/s | TRL, tokens/s | ours, times TRL's |", "| --- | --- | --- | --- |"]
    for name, bf16 in {"float32": False, "bfloat16": True}.items():
        medians = in_turn({"ours": partial(_ours, examples, bf16), "TRL": partial(_trl, examples, bf16)}, runs, warm=0)
        ours, theirs = 1 / medians["ours"].wall, 1 / medians["TRL"].wall
        lines.append(f"| {name} | {ours:.0f} | {theirs:.0f} | {ours / theirs:.2f} |")
    return (
        f"## Training\n\nLoRA of rank {RANK} on all linear layers of the embedded model, batch {BATCH}, one epoch of "
        f"{pairs} answers, no gradient checkpointing; float32 weights, bfloat16 by autocast. Median of {runs}:\n\n"
        + "\n".join(lines)
    )


def _ours(examples: Sequence[Example], bf16: bool) -> Usage:
    """Seconds per token of `train_side`."""
    settings = TrainSettings(
        rank=RANK, alpha=ALPHA, learning_rates=(RATE,), epochs=1.0, batch_size=BATCH, bf16=bf16, evaluations=1,
        validation=8 / len(examples),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        card = RunCard.load(train_side(_model(), examples, Path(folder) / "positive", settings=settings))
    gc.collect()
    return Usage(card.measured_number("search_seconds") / card.measured_number("search_tokens"))


def _trl(examples: Sequence[Example], bf16: bool) -> Usage:
    """Seconds per token of TRL, which gets its answers as completions, so that its loss is on them alone too."""
    lm, clock = _model(), StepClock()
    rows = [
        {
            "prompt": [{"role": "user", "content": example.prompt}],
            "completion": [{"role": "assistant", "content": example.answer}],
        }
        for example in examples
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder, num_train_epochs=1, per_device_train_batch_size=BATCH, learning_rate=RATE, bf16=bf16,
            gradient_checkpointing=False, completion_only_loss=True, use_cpu=True, save_strategy="no",
            report_to="none", disable_tqdm=True, include_num_input_tokens_seen="non_padding", logging_steps=1000,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=lm.model,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=lm.tokenizer,
            peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=ALL_LINEAR),
            callbacks=[clock, _NoLog()],
        )
        trainer.train()
    tokens = trainer.state.num_input_tokens_seen
    gc.collect()
    return Usage(clock.seconds / tokens)


class _NoLog(TrainerCallback):
    """Keeps the Trainer's lines out of the tables."""

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs.get("logs", {}).clear()


def _model() -> LM:
    return LM.load(device="cpu", dtype="float32")
