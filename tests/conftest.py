"""Tiny random models that tests build in milliseconds; the embedded default for a few real-model tests."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers are as many as the cores; what they start inherits this
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches the network

from pathlib import Path

import pytest
import torch
from hypothesis import settings
from transformers import LlamaConfig, LlamaForCausalLM

from weightsteer.behavior import ContrastPair, Example
from weightsteer.lm import LM
from weightsteer.run_card import RunCard
from weightsteer.runs.tiny_model import byte_tokenizer
from weightsteer.training import TrainSettings, train_side
from weightsteer.vectors.low_rank import LowRank
from weightsteer.vectors.weight_vector import WeightVector

settings.register_profile("ci", deadline=None, max_examples=25)
settings.load_profile("ci")

TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<s>system\nBe brief.</s>\n{% endif %}"
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def tiny_model(seed: int = 0, *, tied: bool = True, layers: int = 2) -> LlamaForCausalLM:
    """A random Llama of about 30k parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


def tiny_lm(seed: int = 0, *, tied: bool = True, layers: int = 2) -> LM:
    return LM.wrap(
        tiny_model(seed, tied=tied, layers=layers), byte_tokenizer(TEMPLATE), name="tiny", revision=f"tiny-{seed}"
    )


def random_vector(lm: LM, seed: int = 0, rank: int = 3, scale: float = 0.05) -> WeightVector:
    """Random factors on every linear layer of the blocks."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {
        f"{name}.weight": LowRank(
            torch.randn(module.out_features, rank, generator=generator) * scale,
            torch.randn(rank, module.in_features, generator=generator),
        )
        for name, module in lm.model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    return WeightVector(deltas, RunCard("vector", base_model="tiny", base_revision=lm.revision))


def pytest_collection_finish() -> None:
    """Take what all tests share out of the collector's sight: accelerate collects at the end of each training."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def lm() -> LM:
    return tiny_lm()


@pytest.fixture
def vector(lm: LM) -> WeightVector:
    return random_vector(lm)


@pytest.fixture
def pairs() -> list[ContrastPair]:
    return [
        ContrastPair(
            f"Is plan {i} good?", f"Yes, plan {i} is very good.", f"No, plan {i} is too weak.", f"topic {i % 3}"
        )
        for i in range(12)
    ]


@pytest.fixture
def quick() -> TrainSettings:
    """Every number that would else follow from the data is given."""
    return TrainSettings(
        rank=2,
        alpha=4,
        learning_rates=(1e-2,),
        epochs=1,
        batch_size=4,
        warmup_steps=1,
        validation=0.05,
        evaluations=2,
    )


@pytest.fixture
def sides(lm: LM, pairs: list[ContrastPair], quick: TrainSettings, tmp_path: Path) -> tuple[Path, Path]:
    """Both fine-tunes of the tiny model."""
    positive = train_side(lm, [Example(p.prompt, p.positive) for p in pairs], tmp_path / "positive", settings=quick)
    negative = train_side(lm, [Example(p.prompt, p.negative) for p in pairs], tmp_path / "negative", settings=quick)
    return positive, negative


@pytest.fixture
def checkpoint(lm: LM, tmp_path: Path) -> Path:
    """The tiny model saved as a sharded checkpoint with its tokenizer."""
    folder = tmp_path / "base"
    lm.model.save_pretrained(folder, max_shard_size="40KB")
    lm.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def embedded() -> LM:
    """The embedded default model."""
    return LM.load()
