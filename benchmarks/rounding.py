"""Which rounding keeps more of a vector's effect: logit shifts of merged weights against the float32 truth.

    python benchmarks/rounding.py VECTOR        # of the embedded model; prints Markdown tables

The base is the model rounded to the output's dtype, as people have it. The truth is base + k w in float32. All forward
passes are float32, so that only the weights' rounding shows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from weightsteer.example_files.load import load_pairs
from weightsteer.export.rounding import Dither, Rounding, dither_
from weightsteer.lm import LM
from weightsteer.vectors.delta import to_dense
from weightsteer.vectors.weight_vector import WeightVector

STRENGTHS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
Merged = Callable[[Tensor, Tensor, float], Tensor]  # base weight, delta, k -> the merged weight


def study(model: nn.Module, deltas: Mapping[str, Tensor], ids: Tensor, dtype: torch.dtype) -> list[str]:
    """One line a strength: size of the change, and for each way what it misses in weights and logits."""
    dither = Dither(0)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(parameter.to(dtype).float())
    base = logits_of(model, ids)

    def from_factors(rounding: Rounding) -> Merged:
        def merged(theta: Tensor, delta: Tensor, k: float) -> Tensor:
            total = theta + k * delta
            return (dither_(total, dtype, dither) if rounding == "stochastic" else total).to(dtype).float()

        return merged

    def from_rounded_sides(theta: Tensor, delta: Tensor, k: float) -> Tensor:
        """The same vector, made from a fine-tune that was saved in the narrow dtype."""
        stored = (theta + delta).to(dtype).float() - theta
        return (theta + k * stored).to(dtype).float()

    ways: dict[str, Merged] = {
        "nearest": from_factors("nearest"),
        "stochastic": from_factors("stochastic"),
        "from rounded fine-tunes": from_rounded_sides,
    }
    lines = []
    size = sum(float(delta.double().square().sum()) for delta in deltas.values()) ** 0.5
    whole = sum(float(parameters[name].double().square().sum()) for name in deltas) ** 0.5
    for k in STRENGTHS:
        with changed(parameters, deltas, k, lambda theta, delta, k: theta + k * delta):
            truth = logits_of(model, ids) - base
        cells = []
        for way in ways.values():
            missed = 0.0
            with changed(parameters, deltas, k, way) as originals:
                for name, delta in deltas.items():
                    missed += float((parameters[name] - originals[name] - k * delta).double().square().sum())
                shift = logits_of(model, ids) - base
            kept = float((shift * truth).sum() / truth.square().sum())
            error = float((shift - truth).norm() / truth.norm())
            cells.append(f"{missed**0.5 / (abs(k) * size):.0%} | {error:.1%} | {kept:.3f}")
        lines.append(f"| {k:g} | {abs(k) * size / whole:.5f} | " + " | ".join(cells) + " |")
    return lines


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """All logits in float64, less their mean over the vocabulary, which no probability sees."""
    with torch.no_grad():
        logits: Tensor = model(ids).logits.double()
    return logits - logits.mean(-1, keepdim=True)


@contextmanager
def changed(
    parameters: Mapping[str, Tensor], deltas: Mapping[str, Tensor], k: float, way: Merged
) -> Iterator[dict[str, Tensor]]:
    """The model with every delta merged `way`; yields the originals and puts them back."""
    originals = {name: parameters[name].detach().clone() for name in deltas}
    with torch.no_grad():
        for name, delta in deltas.items():
            parameters[name].copy_(way(originals[name], delta, k))
    yield originals
    with torch.no_grad():
        for name, original in originals.items():
            parameters[name].copy_(original)


def embedded(folder: str) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    """The embedded model, a trained vector of it, and held-out questions."""
    lm = LM.load(device="cpu", dtype="float32")
    texts = [pair.prompt for pair in load_pairs("gloomy")[:24]]
    rows = [list(lm.chat_ids(text)) for text in texts]
    width = min(len(row) for row in rows)
    vector = WeightVector.load(folder)
    return lm.model, {n: to_dense(d).float() for n, d in vector.deltas.items()}, torch.tensor([r[:width] for r in rows])


def random_model() -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    """A random Llama with a random low-rank vector of a trained one's relative size (0.002)."""
    torch.manual_seed(0)
    sizes = LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=8
    )
    model = LlamaForCausalLM(sizes)
    deltas = {}
    for name, parameter in model.named_parameters():
        if "proj" in name:
            low = torch.randn(parameter.shape[0], 16) @ torch.randn(16, parameter.shape[1])
            deltas[name] = low * (0.002 * parameter.detach().norm() / low.norm())
    return model, deltas, torch.randint(0, 1000, (8, 32))


def main() -> None:
    """Print a table for each model and dtype."""
    columns = ["nearest", "stochastic", "from rounded fine-tunes"]
    head = " | ".join(f"{name}: weights missed | logits missed | effect kept" for name in columns)
    for title, build in {"Embedded model": lambda: embedded(sys.argv[1]), "Random model": random_model}.items():
        for dtype in (torch.bfloat16, torch.float16):
            print(f"\n{title}, {str(dtype).removeprefix('torch.')}:\n\n| k | size of k w | {head} |")
            print("| --- " * 11 + "|")
            print("\n".join(study(*build(), dtype)), flush=True)


if __name__ == "__main__":
    main()
