"""A rehearsal: any recipe, end to end, on a tiny random model of its architecture with a handful of examples."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from .behavior import SHIPPED
from .errors import SteerError
from .lm import PLAIN_TEMPLATE
from .locate import locate_model
from .precheck import check_trainings
from .progress import quiet_transformers
from .recipe import Recipe
from .recipe_fields import ContrastRecipe, DataRecipe, DriftRecipe, GenerateRecipe, JudgeRecipe, TaskRecipe, TuneRecipe
from .records import RunCard, new_folder
from .tasks.arithmetic_text import FAMILIES

SPECIAL = ("<pad>", "<s>", "</s>")
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TRAIN: Mapping[str, Any] = {
    "rank": 2,
    "alpha": 4,
    "batch_size": 2,
    "accumulation": 1,
    "max_steps": 4,
    "warmup_steps": 1,
    "evaluations": 2,
    "learning_rates": [1e-2],
}
EXAMPLES = 4
MOST_PARAMETERS = 20_000_000
NEW_TOKENS = 4
JUDGED = ("safety", "trait", "four_way_open")  # tasks whose verdicts, by a tiny model, are no numbers


def rehearsal(recipe: Recipe, model: Path) -> Recipe:
    """The same recipe at the smallest size: every stage, method and task stays; data that is not here is replaced.

    Missing files become the shipped examples of their kind, and a judge becomes the tiny model itself, whose rubbish
    verdicts show how malformed ones are handled.
    """
    check_trainings(recipe)  # its mistakes are to be found here too
    judged = {task.name or task.task for task in recipe.tasks if recipe.judge and task.task in JUDGED}
    small = {
        "name": f"{recipe.name}-rehearsal",
        "model": str(model),
        "device": "cpu",
        "dtype": "float32",
        "behavior": recipe.behavior if _is_here(recipe.behavior) else SHIPPED[0],
        "data": _small_data(recipe.data),
        "start": recipe.start and _small_tune(recipe.start, TuneRecipe),
        "drift": recipe.drift and _small_tune(recipe.drift, DriftRecipe),
        "train": dict(TRAIN),
        "train_of": {},
        "judge": recipe.judge and JudgeRecipe(model=str(model)),
        "tasks": [_small_task(task) for task in recipe.tasks],
        "sweep": recipe.sweep.model_copy(
            update={
                "methods": {name: ks and sorted({ks[0], ks[-1]}) for name, ks in recipe.sweep.methods.items()},
                "behavior": _chosen_by(recipe.sweep.behavior, judged),
                "fractions": recipe.sweep.fractions[-1:],
                "fractions_of": {},
                "items_of": {},
                "activation_pairs": EXAMPLES,
                "probe_items": 1,
            }
        ),
        "budget": {_chosen_by(text, judged): 1e9 for text in recipe.budget},
        "samples": recipe.samples.model_copy(update={"count": 1, "max_new_tokens": NEW_TOKENS}),
        "batch_size": 4,
    }
    return recipe.model_copy(update=small)


def _chosen_by(text: str, judged: Collection[str]) -> str:
    """What k is chosen by, or the loss where that takes a judge."""
    return "prose/nll" if text.partition("/")[0] in judged else text


def _is_here(data: str) -> bool:
    name = data.partition(":")[0]  # may say which side, or that a file is harmless
    return name in SHIPPED or Path(name).exists()


def _small_data(data: DataRecipe) -> DataRecipe:
    if data.contrast:
        all_kept = ContrastRecipe(
            samples=1, max_new_tokens=NEW_TOKENS, positive_from=0.0, negative_to=100.0, questions=2, likelihood=True
        )
        return DataRecipe(contrast=all_kept, limit=EXAMPLES)
    named = [name for name in (data.pairs, data.positive, data.negative) if name]
    if all(_is_here(name) for name in named):
        return data.model_copy(update={"limit": EXAMPLES})
    return DataRecipe(pairs=SHIPPED[0], limit=EXAMPLES)


def _small_tune(tune: TuneRecipe, kind: type[TuneRecipe]) -> TuneRecipe:
    """Files that are not here become a little arithmetic."""
    fields = {**tune.model_dump(), "train": dict(TRAIN), "limit": EXAMPLES}
    if tune.generate:
        fields["generate"] = {**tune.generate.model_dump(), "count": EXAMPLES}
    elif not all(_is_here(path) for path in tune.data):
        fields |= {"data": [], "generate": GenerateRecipe(family="addition", count=EXAMPLES).model_dump()}
    return kind(**fields)


def _small_task(task: TaskRecipe) -> TaskRecipe:
    """Two items of each split; the shipped ones where the file is not here. Named sets of the harness are not here."""
    here = task.data is None or all(_is_here(part) or part in FAMILIES for part in task.data.split(","))
    update = {
        "limit": 2,
        "split": None,
        "data": task.data if here else None,
        "behavior": task.behavior if task.behavior and _is_here(task.behavior) else None,
        "max_new_tokens": task.max_new_tokens and NEW_TOKENS,
    }
    return task.model_copy(update=update)


def tiny_model_of(recipe: Recipe, target: Path) -> Path:
    """Write a random model of the recipe's architecture, of about 30k parameters, with a byte tokenizer.

    Raises:
        SteerError: the recipe names no `architecture` and the model's config cannot be read, or no causal language
            model of that type can be made small.
    """
    kind = _architecture(recipe)
    if target.exists() and RunCard.load(target).settings.get("architecture") == kind:
        return target
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    try:
        config = AutoConfig.for_model(kind, **SIZES, vocab_size=len(tokenizer))
        with quiet_transformers(), torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if size > MOST_PARAMETERS:
            raise ValueError(f"it still has {size:,} parameters; name its text model, such as gemma3_text")
        with quiet_transformers():
            model = AutoModelForCausalLM.from_config(config).float()
    except (ValueError, AttributeError, KeyError, RuntimeError) as error:
        raise SteerError(f"architecture {kind!r}: no small model can be made of it ({error})") from None
    with quiet_transformers(), new_folder(target, "rehearsal") as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        RunCard.now("rehearsal", base_model=recipe.model, settings={"architecture": kind}).save(part)
    return target


def _architecture(recipe: Recipe) -> str:
    """The model's type, as transformers names it."""
    if recipe.architecture:
        return recipe.architecture
    folder, gguf = locate_model(recipe.model)
    try:
        options = {"gguf_file": gguf} if gguf else {}
        config = AutoConfig.from_pretrained(folder, **options)
    except (OSError, ValueError) as error:
        raise SteerError(
            f"{recipe.model}: its config cannot be read ({error}); name its 'architecture' in the recipe, such as qwen2"
        ) from None
    return str(config.model_type)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, three special tokens, and a plain chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, bos, eos = SPECIAL
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos)
    fast.chat_template = PLAIN_TEMPLATE
    return fast
