"""Random models of the sizes of the paper's, made on the device, and what the checks share."""

from __future__ import annotations

import platform
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from weightsteer.lm import LM
from weightsteer.run_card import RunCard
from weightsteer.runs.tiny_model import byte_tokenizer
from weightsteer.vectors.low_rank import LowRank
from weightsteer.vectors.weight_vector import WeightVector

CARD = 80e9  # bytes of the card that the paper's recipes name
SHAPES: dict[str, dict[str, Any]] = {  # config.json of the models, as their makers publish them
    "Qwen/Qwen2.5-7B-Instruct": {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
    },
    "Qwen/Qwen2.5-1.5B-Instruct": {
        "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "meta-llama/Llama-2-7b-chat-hf": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False,
    },
}  # fmt: skip
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
SEVEN = "Qwen/Qwen2.5-7B-Instruct"


@dataclass(frozen=True)
class Verdict:
    """What one check found; `passed` is None where it could not be made."""

    what: str
    passed: bool | None
    found: str


@dataclass(frozen=True)
class Bench:
    """The device, and whether sizes are tiny."""

    tiny: bool
    device: torch.device
    scratch: Path

    @classmethod
    def begin(cls, *, tiny: bool, scratch: Path) -> Bench:
        """On the GPU if there is one."""
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high")
        return cls(tiny, torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"), scratch)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def machine(self) -> str:
        """The card and its memory, or the processor."""
        if not self.on_gpu:
            return f"CPU {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
        card = torch.cuda.get_device_properties(0)
        return f"{card.name}, {card.total_memory / 1e9:.1f} GB"

    def config(self, name: str = SEVEN, **changes: Any) -> Any:
        """A model's config; tiny keeps its kind."""
        sizes = {**SHAPES[name], **(TINY if self.tiny else {}), "max_position_embeddings": 32768, **changes}
        return AutoConfig.for_model(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)

    def model(self, name: str = SEVEN, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> LM:
        """A random model on the device, with a byte tokenizer; its replies are rubbish of the right speed."""
        torch.manual_seed(0)
        with self.device:
            made = AutoModelForCausalLM.from_config(self.config(name, **changes), dtype=dtype)
        return LM.wrap(made, byte_tokenizer(), name=f"random {name}", revision="random")

    def tokens(self, lm: LM, rows: int, length: int) -> torch.Tensor:
        """Random token ids, (rows, length)."""
        size = int(lm.model.config.vocab_size)
        return torch.randint(3, size, (rows, length), generator=torch.Generator().manual_seed(0)).to(self.device)

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], runs: int) -> float:
        """Mean seconds of one call, after two that do not count."""
        for _ in range(2):
            work()
        self.wait()
        start = time.perf_counter()
        for _ in range(runs):
            work()
        self.wait()
        return (time.perf_counter() - start) / runs

    def reset_peak(self) -> None:
        """Begin a new measurement of the peak memory."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float:
        """Bytes at most since `reset_peak`; on a CPU since the program began."""
        if self.on_gpu:
            return float(torch.cuda.max_memory_allocated())
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0

    def held(self) -> float:
        """Bytes that are allocated now; 0 on a CPU, where nobody counts them."""
        return float(torch.cuda.memory_allocated()) if self.on_gpu else 0.0


def random_vector(lm: LM, rank: int = 64, scale: float = 1e-3) -> WeightVector:
    """A random vector of a trained one's form: every linear layer of the blocks, at the rank of two LoRAs."""
    g = torch.Generator().manual_seed(0)
    deltas = {
        f"{name}.weight": LowRank(
            scale * torch.randn(module.out_features, rank, generator=g),
            torch.randn(rank, module.in_features, generator=g) / module.in_features**0.5,
        )
        for name, module in lm.model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    return WeightVector(deltas, RunCard("vector"))
