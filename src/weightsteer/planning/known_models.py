"""Configs of a few models, as their makers publish them, so that a plan needs no network for these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Published:
    """A model's kind and sizes; the source is config.json at huggingface.co/NAME."""

    kind: str
    sizes: tuple[int, int, int, int, int, int]  # hidden, feed-forward, blocks, heads, heads of keys, vocabulary
    tied: bool = False

    @property
    def fields(self) -> dict[str, Any]:
        """The arguments of transformers' config."""
        names = (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "vocab_size",
        )
        sizes = dict(zip(names, self.sizes, strict=True))
        return {**sizes, "tie_word_embeddings": self.tied, "max_position_embeddings": 32768}


KNOWN: Mapping[str, Published] = {
    "Qwen/Qwen2.5-0.5B-Instruct": Published("qwen2", (896, 4864, 24, 14, 2, 151936), tied=True),
    "Qwen/Qwen2.5-1.5B-Instruct": Published("qwen2", (1536, 8960, 28, 12, 2, 151936), tied=True),
    "Qwen/Qwen2.5-7B-Instruct": Published("qwen2", (3584, 18944, 28, 28, 4, 152064)),
    "Qwen/Qwen2.5-32B-Instruct": Published("qwen2", (5120, 27648, 64, 40, 8, 152064)),
    "Qwen/Qwen2.5-72B-Instruct": Published("qwen2", (8192, 29568, 80, 64, 8, 152064)),
    "meta-llama/Llama-2-7b-chat-hf": Published("llama", (4096, 11008, 32, 32, 32, 32000)),
    "meta-llama/Llama-3.1-8B-Instruct": Published("llama", (4096, 14336, 32, 32, 8, 128256)),
    "meta-llama/Llama-3.3-70B-Instruct": Published("llama", (8192, 28672, 80, 64, 8, 128256)),
}
