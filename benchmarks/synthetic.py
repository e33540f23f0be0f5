"""A Llama-shaped checkpoint of any size with random weights, and LoRA adapters for it; written a tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

SHARD = 500_000_000  # bytes
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama; the default has 1.26B parameters, embeddings not tied."""

    layers: int = 22
    hidden: int = 2048
    feed_forward: int = 5632
    heads: int = 32
    kv_heads: int = 32
    vocabulary: int = 32000

    def linear(self) -> Iterator[tuple[str, int, int]]:
        """(module, d_out, d_in) of every linear layer of the blocks."""
        kv = self.hidden // self.heads * self.kv_heads
        sizes = {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.feed_forward, self.hidden),
            "mlp.up_proj": (self.feed_forward, self.hidden),
            "mlp.down_proj": (self.hidden, self.feed_forward),
        }
        for layer in range(self.layers):
            for module, (d_out, d_in) in sizes.items():
                yield f"model.layers.{layer}.{module}", d_out, d_in

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of every parameter."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for module, d_out, d_in in self.linear():
            yield f"{module}.weight", (d_out, d_in)
        for layer in range(self.layers):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                yield f"model.layers.{layer}.{norm}.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocabulary, self.hidden)

    def parameters(self) -> int:
        """How many numbers there are."""
        return sum(math.prod(size) for _, size in self.tensors())

    def config(self) -> dict[str, object]:
        """config.json of the model."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.feed_forward,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": False,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
        }


SMALL = Shape()
LARGE = Shape(layers=22, hidden=4096, feed_forward=11008)  # 4.71B
LARGEST = Shape(layers=40, hidden=5120, feed_forward=13824, heads=40, kv_heads=40)  # 13.0B


def write_checkpoint(folder: Path, shape: Shape, seed: int = 0) -> Path:
    """Random bf16 weights of a trained model's size (0.02), sharded at 500 MB; kept if it is there."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}

    def flush() -> None:
        shards.append(list(held))
        save_file(held, folder / f"part-{len(shards)}.safetensors", metadata={"format": "pt"})
        held.clear()

    for name, size in shape.tensors():
        tensor = torch.empty(size, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > SHARD:
            flush()
        held[name] = tensor
    flush()
    names = {}
    for number, part in enumerate(shards, start=1):
        shard = f"model-{number:05}-of-{len(shards):05}.safetensors"
        (folder / f"part-{number}.safetensors").rename(folder / shard)
        names.update(dict.fromkeys(part, shard))
    size = sum((folder / shard).stat().st_size for shard in set(names.values()))
    index = {"metadata": {"total_size": size}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(shape.config()))
    return folder


def write_adapter(folder: Path, shape: Shape, base: Path, *, rank: int = 32, seed: int = 0) -> Path:
    """A random LoRA on all linear layers, as PEFT saves one; k = 1 changes a weight by about 0.2%."""
    if (folder / "adapter_config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, d_out, d_in in shape.linear():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, d_in, generator=generator) / d_in**0.5
        tensors[f"base_model.model.{module}.lora_B.weight"] = 6e-4 * torch.randn(d_out, rank, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": rank,
        "target_modules": ALL_LINEAR,
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
