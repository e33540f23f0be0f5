"""A tiny random model of any architecture, with a byte tokenizer: what a dry run steers."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from ..checkpoints.adapted import without_adapters
from ..checkpoints.locate import locate_config
from ..checkpoints.whole import is_whole
from ..errors import SteerError
from ..lm import PLAIN_TEMPLATE
from ..progress import quiet_transformers
from ..run_card import RunCard, new_folder
from .recipe import Recipe

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
MOST_PARAMETERS = 20_000_000


def make_tiny_model(recipe: Recipe, target: Path) -> Path:
    """Write a random model of the recipe's architecture, of about 30k parameters, with a byte tokenizer.

    Raises:
        SteerError: the recipe names no `architecture` and the model's config cannot be read, or no causal language
            model of that type can be made small.
    """
    kind = _architecture(recipe)
    if is_whole(target) and RunCard.load(target).settings.get("architecture") == kind:
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
    with quiet_transformers(), new_folder(target, "tiny model") as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        RunCard.now("tiny model", base_model=recipe.model, settings={"architecture": kind}).save(part)
    return target


def _architecture(recipe: Recipe) -> str:
    """The model's type, as transformers names it."""
    if recipe.architecture:
        return recipe.architecture
    where = locate_config(without_adapters(recipe.model))
    try:
        config = AutoConfig.from_pretrained(**where, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise SteerError(
            f"{recipe.model}: its config cannot be read ({error}); name its 'architecture' in the recipe, such as qwen2"
        ) from None
    return str(config.model_type)


def byte_tokenizer(template: str = PLAIN_TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a byte, three special tokens, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, bos, eos = SPECIAL
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos)
    fast.chat_template = template
    return fast
