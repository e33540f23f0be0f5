"""Trains the tiny model in one of two processes, with a monitor, and writes what that process saw."""

from __future__ import annotations

import json
import os
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from conftest import random_vector, tiny_lm, tiny_model
from weightsteer.monitor import SteeringMonitor


def train(rank: int, port: int, out: Path) -> None:
    """Be one of two processes that meet at `port`, by the variables that torchrun sets."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {name: str(value) for name, value in (place | {"RANK": rank, "LOCAL_RANK": rank}).items()}
    model = get_peft_model(tiny_model(), LoraConfig(r=3, target_modules=["q_proj", "up_proj"]))
    texts = [[3 + i, 9, 40, 7] for i in range(8)]
    rows = [{"input_ids": ids, "labels": ids, "attention_mask": [1] * 4} for ids in texts]
    arguments = TrainingArguments(
        output_dir=str(out / "run"),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        ddp_backend="gloo",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    monitor = SteeringMonitor({"v": random_vector(tiny_lm())}, every=1, out=out / "readings.jsonl")
    monitor.watch(trainer)
    trainer.train()
    seen = {"world": trainer.args.world_size, "cosines": [r.cosine for r in monitor.readings]}
    (out / f"rank{rank}.json").write_text(json.dumps(seen))
