"""A causal language model with its tokenizer: load, generate, read log-probabilities, compare."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .checkpoints.checkpoint import fingerprint
from .checkpoints.embedded_model import EMBEDDED_NAME
from .checkpoints.locate import locate_model
from .errors import SteerError, first_line
from .progress import Progress, quiet_transformers, silent

PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@dataclass(frozen=True)
class LM:
    """A model, its tokenizer and an optional system prompt.

    With `system_prompt=None` the chat template decides: SmolLM2's own injects its default system
    prompt, and we keep that, since every engine that serves the model does. "" asks for an empty one.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    revision: str = ""  # hub commit, or a hash of the local checkpoint; see `fingerprint`
    system_prompt: str | None = None

    @classmethod
    def load(
        cls,
        name: str | Path = EMBEDDED_NAME,
        *,
        device: str | None = None,
        dtype: str = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> LM:
        """Load the embedded model, a Hugging Face id, a folder of safetensors, or a .gguf file.

        Args:
            name: "smollm2-135m-instruct" (no download), an id such as "Qwen/Qwen2.5-7B-Instruct",
                or a path.
            device: "cpu", "cuda", "cuda:1", "mps", or "auto" to spread a large model by accelerate;
                None takes the accelerator if there is one.
            dtype: "float32", "bfloat16", "float16", or "auto": the checkpoint's own.
            revision: hub branch, tag or commit.
            trust_remote_code: run code that the model's repository carries; off unless asked.

        Raises:
            SteerError: no such model, or it cannot be loaded.
        """
        name = str(name)
        where = locate_model(name)
        options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        placement = device or _default_device()
        try:
            with quiet_transformers():
                tokenizer = AutoTokenizer.from_pretrained(where, **options)
                model = AutoModelForCausalLM.from_pretrained(
                    where,
                    dtype=_dtype_named(dtype),
                    device_map="auto" if placement == "auto" else None,
                    use_safetensors=True,  # never a pickle
                    **options,
                )
                if placement != "auto":
                    model = model.to(placement)  # type: ignore[arg-type]
        except (OSError, ValueError, ImportError, RuntimeError, AssertionError, SafetensorError) as error:
            raise SteerError(f"{name}: cannot be loaded ({first_line(error)})") from None
        model.config.use_cache = True
        commit = getattr(model.config, "_commit_hash", None)
        return cls.wrap(model, tokenizer, name=name, revision=commit or fingerprint(Path(where)))

    @classmethod
    def wrap(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "",
        revision: str = "",
    ) -> LM:
        """Use a model and tokenizer that are already in memory.

        The model is put into evaluation mode. The tokenizer stays as it is: where a padding token or a chat template
        is missing, the LM gets a copy of the tokenizer that has one, and for a template a warning says so.
        """
        no_pad, no_template = tokenizer.pad_token_id is None, getattr(tokenizer, "chat_template", None) is None
        if no_pad or no_template:
            tokenizer = copy.deepcopy(tokenizer)
        if no_pad:
            tokenizer.pad_token = tokenizer.eos_token
        if no_template:
            tokenizer.chat_template = PLAIN_TEMPLATE
            warnings.warn(
                f"{name or model.config.name_or_path or 'the model'}: has no chat template; prompts are put as a plain "
                "dialogue, 'user: ...' and 'assistant: '",
                stacklevel=2,
            )
        model.eval()
        return cls(model, tokenizer, name or str(model.config.name_or_path), revision)

    def with_system_prompt(self, text: str | None) -> LM:
        """The same model under another system prompt (None: the template's own default)."""
        return replace(self, system_prompt=text)

    @property
    def device(self) -> torch.device:
        """Where token ids go in: the device of the input embedding."""
        weight: Tensor = self.model.get_input_embeddings().weight  # type: ignore[assignment]
        return weight.device

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks, first to last (see `decoder_blocks`)."""
        return decoder_blocks(self.model)

    def chat_ids(self, prompt: str | Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a user turn (or of a talk's turns), up to where the assistant's answer starts.

        The one place for chat templates.

        Raises:
            SteerError: the template refuses the conversation, such as one with a system prompt.
        """
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        messages = [dict(turn) for turn in turns]
        if self.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:  # some templates know no system role
            raise SteerError(f"{self.name}: its chat template refuses the conversation ({error})") from None
        return list(self.tokenizer(str(text), add_special_tokens=False)["input_ids"])

    def answer_ids(self, answer: str, *, ended: bool = False) -> list[int]:
        """Token ids of an answer; `ended` appends the end-of-turn token (training)."""
        ids = list(self.tokenizer(answer, add_special_tokens=False)["input_ids"])
        return [*ids, self.turn_end] if ended else ids

    @property
    def turn_end(self) -> int:
        """The token that ends an assistant's turn: the first special token after it in the chat template."""
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
        text = str(self.tokenizer.apply_chat_template(turns, tokenize=False))
        after = self.tokenizer(text.rpartition("Yes")[2], add_special_tokens=False)["input_ids"]
        special = [token for token in after if token in self.tokenizer.all_special_ids]
        return int(special[0] if special else self.tokenizer.eos_token_id)

    @property
    def stops(self) -> list[int]:
        """Tokens at which generation ends: the model's own, and the end of a turn."""
        own = self.model.generation_config.eos_token_id if self.model.generation_config else None
        listed = own if isinstance(own, list) else [] if own is None else [own]
        return sorted({self.turn_end, *listed})

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 8,
        progress: Progress = silent,
    ) -> list[str]:
        """Answer each prompt as a user turn: greedy at temperature 0, else sampled from `seed`.

        Prompts of like length share a left-padded batch; replies come in the order of the prompts.
        """
        ids = [self.chat_ids(prompt) for prompt in prompts]
        replies = [""] * len(ids)
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature > 0:
            torch.manual_seed(seed)
        for batch in batches_by_length([len(row) for row in ids], batch_size, progress):
            tokens, mask = pad_left([ids[i] for i in batch], self.pad_id, self.device)
            out = self.model.generate(  # type: ignore[operator]
                input_ids=tokens,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                pad_token_id=self.pad_id,
                eos_token_id=self.stops,
                **(sampling if temperature > 0 else {"do_sample": False}),
            )
            texts = self.tokenizer.batch_decode(out[:, tokens.shape[1] :], skip_special_tokens=True)
            for index, text in zip(batch, texts, strict=True):
                replies[index] = text.strip()
        return replies

    @property
    def pad_id(self) -> int:
        """Token id that fills batches."""
        return int(self.tokenizer.pad_token_id)


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks, first to last: the outermost ModuleList, the longest if there are several.

    Raises:
        SteerError: the model has no ModuleList.
    """
    lists = [(name.count("."), -len(m), m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise SteerError(f"{type(model).__name__}: no decoder blocks found (no ModuleList in the model)")
    return min(lists, key=lambda entry: entry[:2])[2]


@contextmanager
def projecting_only(model: nn.Module, wanted: Tensor) -> Iterator[None]:
    """Compute the vocabulary projection only where `wanted` (batch, length) is true.

    Inside, the model's logits have shape (1, wanted.sum(), vocabulary), in row-major order of the
    wanted positions. The selection happens at the projection's input, so a model's own scaling or
    soft-capping of logits, which acts entry by entry, is untouched.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]

    def select(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        return (hidden[wanted.to(hidden.device)].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def batches_by_length(lengths: Sequence[int], batch_size: int, progress: Progress = silent) -> Iterator[list[int]]:
    """Batches of indices of like length, longest first, so that memory peaks at the start."""
    if batch_size < 1:
        raise SteerError(f"batch size must be at least 1, found {batch_size}")
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    total = math.ceil(len(order) / batch_size)
    for done, start in enumerate(range(0, len(order), batch_size)):
        yield order[start : start + batch_size]
        progress(done + 1, total)


def pad_left(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of ids -> (ids, mask), both (batch, longest), the padding on the left."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def pad_right(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of ids -> (ids, mask), both (batch, longest), the padding on the right."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([list(row) + [pad] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, mask


def _default_device() -> str:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator else "cpu"


def _dtype_named(name: str) -> torch.dtype | str:
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name != "auto" and name not in dtypes:
        raise SteerError(f"dtype: expected auto, {', '.join(dtypes)}, found {name!r}")
    return dtypes.get(name, "auto")
