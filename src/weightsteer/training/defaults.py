"""What a training takes where the user says nothing: from the number of examples and the model's width.

The rules were measured on two models with five behaviours of 20 pairs each: docs/training-defaults.md.
"""

from __future__ import annotations

from dataclasses import replace

from .settings import PAPER, TrainSettings, WholeSettings, filled

LEAST_STEPS = 30  # fewer leave a vector that is too small to see; the best point is among the first 20
MOST_PASSES = 20  # over the data, however few examples there are
HELD_OUT = 4  # examples at least; fewer choose the stopping point by chance
SMALL = 400  # examples; below that, batches of 4 make more steps of one pass
WARM_UP = 0.1  # share of the steps
RATE, WIDTH, FALL = 5e-4, 2048, 0.8  # the learning rate of LoRA at one width, and how fast it falls with the width

# What is taken where nothing is said, in words, by the field's name.
DESCRIBED = {
    "kind": TrainSettings.kind,
    "rank": f"{TrainSettings.rank}",
    "alpha": f"{TrainSettings.alpha}",
    "learning_rates": f"from the model: {RATE:g} * ({WIDTH} / hidden size) ** {FALL:g} for lora, else "
    + " and ".join(f"{rate:g}" for rate in PAPER.learning_rates),
    "epochs": f"from the data: 1, or as many as make {LEAST_STEPS} steps, at most {MOST_PASSES}",
    "max_steps": "as many as the epochs make",
    "batch_size": f"from the data: 4, or 8 from {SMALL} examples on",
    "snapshots": f"{TrainSettings.snapshots}",
    "kl_weight": f"{TrainSettings.kl_weight:g}",
    "finetunes": f"{TrainSettings.finetunes}",
    "seed": f"{TrainSettings.seed}",
    "processes": f"{TrainSettings.processes}",
    "shard": TrainSettings.shard,
}


def resolve(settings: TrainSettings, *, examples: int, width: int, preferences: bool = False) -> WholeSettings:
    """The settings with every number that the user left open; of a mean, as each of its fine-tunes would have them.

    Args:
        examples: of one side, all its fine-tunes together.
        width: the model's hidden size.
        preferences: whether the training is one by preferences (DPO).
    """
    validation = settings.validation or held_out_share(examples)
    trained = max(1, trained_on(examples, settings) // settings.finetunes)
    batch = settings.batch_size or (4 if examples // settings.finetunes < SMALL else 8)
    batches = -(-trained // (batch * settings.accumulation))  # of one pass
    passes = 1 if settings.max_steps else min(MOST_PASSES, max(1, -(-LEAST_STEPS // batches)))
    epochs = settings.epochs or float(passes)
    steps = settings.max_steps or max(1, round(batches * epochs))
    found = replace(
        PAPER,
        learning_rates=learning_rates(settings.kind, width, preferences=preferences),
        epochs=epochs,
        batch_size=batch,
        warmup_steps=max(1, round(WARM_UP * steps)),
        validation=validation,
    )
    return filled(settings, found)


def learning_rates(kind: str, width: int, *, preferences: bool = False) -> tuple[float, ...]:
    """The learning rates to try: one for LoRA, which falls with the width; for other trainings the paper's two.

    A wider model wants smaller steps: each of its outputs sums over more weights. Two digits are kept, since the rate
    names a folder and is read by people.
    """
    if kind != "lora" or preferences:
        return PAPER.learning_rates
    return (float(f"{RATE * (WIDTH / width) ** FALL:.1e}"),)


def held_out_share(examples: int) -> float:
    """The share that is held out: 5%, of few examples 4, of very few a fifth."""
    few = min(HELD_OUT, examples // 5)
    return max(PAPER.validation, few / examples) if examples else PAPER.validation


def trained_on(examples: int, settings: TrainSettings) -> int:
    """How many of the examples are not held out."""
    return examples - held_out(examples, settings.validation or held_out_share(examples))


def held_out(examples: int, share: float) -> int:
    """How many examples a share holds out: at least one."""
    return max(1, round(share * examples))
