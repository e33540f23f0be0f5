"""Training on the GPU: the memory of each paper recipe's longest batch, and tokens per second."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from gpu_model import CARD, SEVEN, Bench, Verdict
from torch import Tensor, nn

from weightsteer.lm import LM
from weightsteer.model_parts import projecting_only
from weightsteer.runs.recipe import Recipe
from weightsteer.steering.methods import METHODS
from weightsteer.training.settings import PAPER, TrainSettings, WholeSettings, filled
from weightsteer.training.trainables import trainable

RECIPES = Path(__file__).parents[1] / "recipes" / "paper"
LEAST_USE = 0.3  # of the card's own rate of bfloat16 products, that training is to reach


@dataclass(frozen=True)
class Batch:
    """The longest batch of a training of a recipe."""

    recipe: str
    model: str
    settings: WholeSettings
    rows: int
    length: int  # tokens

    @property
    def dtype(self) -> torch.dtype:
        """LoRA trains over bfloat16; a bias, or all weights, in float32 with products in bfloat16."""
        return torch.bfloat16 if self.settings.kind == "lora" else torch.float32


def longest_batches() -> list[Batch]:
    """Of every training of every paper recipe; equal ones once, under the names of all."""
    found: dict[tuple[object, ...], Batch] = {}
    for path in sorted(RECIPES.glob("*.yaml")):
        recipe = Recipe.load(path)
        kinds = {"lora": recipe.train}
        for name in recipe.sweep.methods:
            if (kind := METHODS[name].training) in ("bias", "full") and METHODS[name].has_own_training:
                kinds[kind] = {**recipe.train, **recipe.train_of.get(name, {}), "kind": kind, "bf16": True}
        for kind, fields in kinds.items():
            settings = filled(recipe.train_settings(fields), PAPER)
            key = (recipe.model, kind, settings.batch_size, settings.max_length)
            names = f"{found[key].recipe}, {path.stem}" if key in found else path.stem
            found[key] = Batch(names, recipe.model, settings, settings.batch_size, settings.max_length)
    return list(found.values())


def memory(bench: Bench) -> Iterator[Verdict]:
    """Peak bytes of one step on each longest batch, with and without gradient checkpointing."""
    for batch in longest_batches():
        for checkpointing in (True, False):
            small = replace(batch, rows=2, length=64) if bench.tiny else batch
            what = f"{batch.recipe}, {batch.settings.kind}, {batch.rows} x {batch.length} tokens"
            what += ", gradient checkpointing" if checkpointing else ""
            peak = _peak_of(bench, small, checkpointing)
            if peak is None:
                # without checkpointing a batch may be too large: that is what the option is for
                yield Verdict(what, False if checkpointing else None, "out of memory")
            elif not bench.on_gpu:
                yield Verdict(what, True, f"ran at {small.rows} x {small.length} tokens; a CPU's peak is not counted")
            else:
                fits = peak <= CARD
                yield Verdict(what, fits if checkpointing else None, f"{peak / 1e9:.1f} GB of {CARD / 1e9:.0f}")


def _peak_of(bench: Bench, batch: Batch, checkpointing: bool) -> float | None:
    """Peak bytes of a step; None where the card's memory does not suffice."""
    lm = bench.model(batch.model, batch.dtype)
    bench.reset_peak()
    try:
        with training(bench, lm, batch.settings, checkpointing, bf16=batch.settings.bf16) as step:
            step(bench.tokens(lm, batch.rows, batch.length))
        bench.wait()
        return bench.peak()
    except torch.OutOfMemoryError:
        return None
    finally:
        del lm
        gc.collect()
        if bench.on_gpu:
            torch.cuda.empty_cache()


@contextmanager
def training(
    bench: Bench, lm: LM, settings: TrainSettings, checkpointing: bool, *, bf16: bool = False
) -> Iterator[Callable[[Tensor], float]]:
    """Yield one training step of ours: half of each row is its answer, and only that is projected."""
    with trainable(lm, replace(settings, gradient_checkpointing=checkpointing)) as ready:
        model: nn.Module = ready.model
        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=bench.on_gpu)

        def step(ids: Tensor) -> float:
            wanted = torch.zeros_like(ids, dtype=torch.bool)
            wanted[:, ids.shape[1] // 2 : -1] = True
            with torch.autocast(bench.device.type, torch.bfloat16, enabled=bf16), projecting_only(lm.model, wanted):
                logits = model(input_ids=ids, use_cache=False).logits[0]
            loss = nn.functional.cross_entropy(logits.float(), ids[:, 1:][wanted[:, :-1]])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return float(loss)

        yield step


def speed(bench: Bench) -> Iterator[Verdict]:
    """Tokens a second of LoRA on the 7B shape, and which share of the card's own rate of products that is."""
    rate = _products_a_second(bench)
    rows, length = (2, 64) if bench.tiny else (8, 512)
    for checkpointing in (True, False):
        lm = bench.model(SEVEN)
        ids = bench.tokens(lm, rows, length)
        weights = sum(parameter.numel() for parameter in lm.model.parameters())
        with training(bench, lm, PAPER, checkpointing) as step:
            first = step(ids)
            seconds = bench.seconds(partial(step, ids), 2 if bench.tiny else 5)
            last = step(ids)
        per_second = rows * length / seconds
        share = per_second * weights * (6 if checkpointing else 4) / rate  # forward and back to the inputs alone
        what = f"LoRA, {rows} x {length} tokens{', gradient checkpointing' if checkpointing else ''}"
        found = f"{per_second:.0f} tokens/s, {share:.0%} of {rate / 1e12:.3g} TFLOP/s"
        found += f", loss {first:.3f} to {last:.3f}"
        yield Verdict(what, last < first and (share >= LEAST_USE or not bench.on_gpu), found)
        del lm


def _products_a_second(bench: Bench) -> float:
    """Floating point operations a second of one large product in bfloat16, here."""
    size = 512 if bench.tiny else 8192
    matrix = torch.randn(size, size, device=bench.device, dtype=torch.bfloat16)
    return 2 * size**3 / bench.seconds(lambda: matrix @ matrix, 10)
