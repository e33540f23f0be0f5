"""A causal language model with its tokenizer: load, generate, read log-probabilities, compare."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from .chat_template import PLAIN_TEMPLATE as PLAIN_TEMPLATE
from .chat_template import ChatTemplate, Exchange, PromptLike, plain_template, refuse_text, turns_of
from .checkpoints.adapted import Adapted, adapted_model, merge_adapter
from .checkpoints.checkpoint import fingerprint
from .checkpoints.device import placement_for
from .checkpoints.embedded_model import EMBEDDED_NAME
from .checkpoints.load_model import dtype_named, load_causal_lm, load_tokenizer
from .checkpoints.load_options import LoadOptions, refuse_missing_packages
from .checkpoints.locate import locate_model
from .errors import SteerError
from .files import digest
from .generation import HowWritten, Writer
from .model_parts import decoder_blocks
from .model_parts import projecting_only as projecting_only
from .progress import Progress, silent
from .scoring import Score, score_choices, score_texts
from .thinking import Reply, opens_thinking, why_unanswered


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
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)  # the template's variables
    origin: Mapping[str, Any] | None = field(default=None, compare=False)  # what `load` was asked; None if in memory

    @classmethod
    def load(
        cls,
        name: str | Path = EMBEDDED_NAME,
        *,
        device: str | None = None,
        dtype: str = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        options: LoadOptions | None = None,
    ) -> LM:
        """Load the embedded model, a Hugging Face id, a folder of safetensors, or a .gguf file.

        Args:
            name: "smollm2-135m-instruct" (no download), an id such as "Qwen/Qwen2.5-7B-Instruct",
                or a path. Of a PEFT adapter, the base that it names is loaded and the adapter merged into it.
            device: "cpu", "cuda", "cuda:1", "mps", or "auto" to spread a large model by accelerate;
                None takes the accelerator if there is one.
            dtype: "float32", "bfloat16", "float16", or "auto": the checkpoint's own.
            revision: hub branch, tag or commit.
            trust_remote_code: run code that the model's repository carries; off unless asked.
            chat_template_kwargs: variables of the chat template, such as {"enable_thinking": False}.
            options: whether the weights are quantised, which attention, and how a large model is spread.

        Raises:
            SteerError: no such model, it cannot be loaded, or its template has no such variable.
        """
        asked = {argument: value for argument, value in locals().items() if argument != "cls"}
        name, load = str(name), options or LoadOptions()
        refuse_missing_packages(load)
        if adapter := adapted_model(name, revision):
            adapter.refuse_packed_base(name, load)
            below: dict[str, Any] = {"revision": adapter.revision, "trust_remote_code": trust_remote_code}
            base = cls.load(adapter.base, device=device, dtype=dtype, options=load, **below)
            return replace(base._with_adapter(adapter, name, chat_template_kwargs), origin=asked)
        where, placement = locate_model(name), placement_for(device, load)
        hub: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        tokenizer = load_tokenizer(name, where, **hub)
        model = load_causal_lm(name, where, dtype=dtype_named(dtype), placement=placement, load=load, options=hub)
        if getattr(model, "_hf_peft_config_loaded", False):
            raise SteerError(
                f"{name}: holds an adapter, which was applied to the model on loading; name the model without it, or "
                "merge the two first"
            )
        model.config.use_cache = True
        revision = getattr(model.config, "_commit_hash", None) or fingerprint(Path(where))
        lm = cls.wrap(model, tokenizer, name=name, revision=revision, chat_template_kwargs=chat_template_kwargs)
        return replace(lm, origin=asked)

    @classmethod
    def wrap(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "",
        revision: str = "",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> LM:
        """Use a model and tokenizer that are already in memory.

        The model is put into evaluation mode. The tokenizer stays as it is: where a padding token or a chat template
        is missing, the LM gets a copy of the tokenizer that has one, and for a template a warning says so.
        """
        name = name or str(model.config.name_or_path)
        no_pad, no_template = tokenizer.pad_token_id is None, getattr(tokenizer, "chat_template", None) is None
        if no_pad or no_template:
            tokenizer = copy.deepcopy(tokenizer)
        if no_pad:  # padding is masked, so any token will do
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
        if no_template:
            tokenizer.chat_template = plain_template(tokenizer)
            warnings.warn(
                f"{name or 'the model'}: has no chat template; prompts are put as a plain dialogue, 'user: ...' and "
                "'assistant:'",
                stacklevel=2,
            )
        model.eval()
        lm = cls(model, tokenizer, name, revision, chat_template_kwargs=dict(chat_template_kwargs or {}))
        if lm.chat_template_kwargs:
            lm.chat_template.check_variables()
        return lm

    def _with_adapter(self, adapter: Adapted, name: str, variables: Mapping[str, Any] | None) -> LM:
        """This model with an adapter merged into it, and the adapter's own tokenizer if it has one."""
        tokenizer = load_tokenizer(name, str(adapter.folder)) if adapter.has_tokenizer else self.tokenizer
        model = merge_adapter(self.model, adapter, name)
        revision = fingerprint(adapter.folder)
        return type(self).wrap(model, tokenizer, name=name, revision=revision, chat_template_kwargs=variables)

    def with_system_prompt(self, text: str | None) -> LM:
        """The same model under another system prompt (None: the template's own default)."""
        return replace(self, system_prompt=text)

    @property
    def load_options(self) -> LoadOptions:
        """As which it was loaded: whole, as it is stored, where it was made in memory."""
        return (self.origin or {}).get("options") or LoadOptions()

    @property
    def device(self) -> torch.device:
        """Where token ids go in: the device of the input embedding."""
        weight: Tensor = self.model.get_input_embeddings().weight  # type: ignore[assignment]
        return weight.device

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks, first to last (see `decoder_blocks`)."""
        return decoder_blocks(self.model)

    @property
    def chat_template(self) -> ChatTemplate:
        """The one place for chat templates."""
        return ChatTemplate(self.tokenizer, self.name, self.chat_template_kwargs)

    @property
    def template_identity(self) -> dict[str, str]:
        """What the template's variables, where some are set, add to the hashes of what is made with this model."""
        return {"chat_template_kwargs": digest(dict(self.chat_template_kwargs))} if self.chat_template_kwargs else {}

    def chat_ids(self, prompt: PromptLike) -> list[int]:
        """Token ids of a user turn (or of a talk's turns), up to where the assistant's answer starts.

        Raises:
            SteerError: the template refuses the conversation, or it is longer than the model's context.
        """
        return self.require_fitting(self.chat_template.prompt_ids(turns_of(prompt, self.system_prompt)))

    def exchange(self, prompt: PromptLike, answer: str) -> Exchange:
        """Token ids of a prompt with its answer, as the template renders the whole conversation.

        The end goes up to the token at which generation stops: what the template writes after it, such as a line
        break, no model is ever asked to write.

        Raises:
            SteerError: the template refuses the conversation.
        """
        found = self.chat_template.exchange(turns_of(prompt, self.system_prompt), answer)
        self._known(found.head + found.answer + found.end)
        stop = next((place for place, token in enumerate(found.end) if token in self.stops), None)
        return found if stop is None else replace(found, end=found.end[: stop + 1])

    def answer_ids(self, answer: str, *, ended: bool = False) -> list[int]:
        """Token ids of an answer, as the template renders it after a short prompt; `ended` appends the turn's end."""
        found = self.exchange("Hi", answer)
        return found.answer + found.end if ended else found.answer

    def require_fitting(self, ids: list[int]) -> list[int]:
        """The ids of a prompt, if the model can read them all.

        Raises:
            SteerError: there are more than its context has places for, or it has no embedding for one.
        """
        context = self.context
        if context is not None and len(ids) > context:
            raise SteerError(
                f"{self.name}: a text of {len(ids)} tokens is longer than the model's context of {context}; shorten it"
            )
        return self._known(ids)

    @property
    def context(self) -> int | None:
        """Places of the model's context; None where its config does not say."""
        found = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return found if isinstance(found, int) else None

    def _known(self, ids: list[int]) -> list[int]:
        """The ids, if the model has a row of its embedding for each."""
        rows = self._rows
        if ids and max(ids) >= rows:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise SteerError(
                f"{self.name}: its tokenizer has the token {token!r} ({max(ids)}), but the model's embedding only "
                f"{rows} rows; give the model that belongs to the tokenizer, or resize its embedding"
            )
        return ids

    @property
    def _rows(self) -> int:
        weight: Tensor = self.model.get_input_embeddings().weight  # type: ignore[assignment]
        return int(getattr(self.model.get_input_embeddings(), "num_embeddings", weight.shape[0]))

    @property
    def turn_end(self) -> int | None:
        """The token that ends an assistant's turn; None where neither the template nor the tokenizer has one."""
        return self.chat_template.turn_end

    @property
    def stops(self) -> list[int]:
        """Tokens at which generation ends: the model's own, and the end of a turn."""
        own = self.model.generation_config.eos_token_id if self.model.generation_config else None
        listed = own if isinstance(own, list) else [] if own is None else [own]
        return sorted({*listed, *({self.turn_end} - {None})})

    def generate(
        self,
        prompts: Sequence[PromptLike],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 8,
        progress: Progress = silent,
        streamer: BaseStreamer | None = None,
    ) -> list[str]:
        """The answers to each prompt, without what the model thinks before them; see `replies`.

        A reply that ends inside its thinking, or whose logits are not numbers, has no answer: it is "", and a warning
        says so.
        """
        replies = self.replies(
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
            progress=progress,
            streamer=streamer,
        )
        if missing := why_unanswered(replies):
            warnings.warn(f"{self.name}: {missing}", stacklevel=2)
        return [reply.answer or "" for reply in replies]

    def replies(
        self,
        prompts: Sequence[PromptLike],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 8,
        progress: Progress = silent,
        streamer: BaseStreamer | None = None,
    ) -> list[Reply]:
        """Reply to each prompt: by the likeliest token at temperature 0, else sampled from `seed`.

        The model's own generation settings (repetition penalty, beams, top-p and so on) do not count, so that what is
        measured is the model; its end tokens do. Prompts of like length share a left-padded batch, or prompts of the
        same length where a model does not take padding; replies come in the order of the prompts. With one k for each
        prompt (see `SteeringHandle`), each gets its own. `streamer` gets each batch's tokens as they come.
        """
        refuse_text(prompts)
        texts = [self.chat_template.prompt_text(turns_of(prompt, self.system_prompt)) for prompt in prompts]
        rows = [self.require_fitting(self.chat_template.ids_of(text)) for text in texts]
        self._tell_of_cuts(rows, max_new_tokens)
        opened = [opens_thinking(text) for text in texts]
        if temperature > 0:
            torch.manual_seed(seed)
        how: HowWritten = {"max_new_tokens": max_new_tokens, "temperature": temperature, "batch_size": batch_size}
        return self._writer.replies(rows, opened, progress=progress, streamer=streamer, **how)

    def reply_aloud(
        self,
        prompt: PromptLike,
        streamer: BaseStreamer,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        stopped: Callable[[], bool] | None = None,
    ) -> Reply:
        """One reply, which a streamer gets token by token; see `replies`.

        `stopped` is asked after each token whether to end the reply there.
        """
        text = self.chat_template.prompt_text(turns_of(prompt, self.system_prompt))
        ids = self.require_fitting(self.chat_template.ids_of(text))
        if temperature > 0:
            torch.manual_seed(seed)
        self._tell_of_cuts([ids], max_new_tokens)
        writer = self._writer
        room = writer.room(ids, max_new_tokens)
        (row,), (broken,) = writer.write([ids], room, temperature, streamer=streamer, stopped=stopped)
        return writer.reply(row, opened=opens_thinking(text), broken=broken)

    def _tell_of_cuts(self, rows: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        """Warn of prompts after which the model's context has no place for so many tokens."""
        writer = self._writer
        if cut := sum(writer.room(row, max_new_tokens) < max_new_tokens for row in rows):
            warnings.warn(
                f"{self.name}: its context of {self.context} tokens ends before a reply of {max_new_tokens} does, "
                f"after {cut} of {len(rows)} prompts; such replies are cut there",
                stacklevel=3,
            )

    def read_reply(self, ids: Sequence[int], *, opened: bool = False) -> Reply:
        """A reply from the ids that a model wrote; `opened`: the prompt has begun its thinking."""
        return self._writer.reply(ids, opened=opened, broken=False)

    def score_choices(
        self,
        prompts: Sequence[PromptLike],
        choices: Sequence[Sequence[str]],
        *,
        batch_size: int = 8,
        progress: Progress = silent,
    ) -> list[list[Score]]:
        """See `scoring.score_choices`."""
        return score_choices(self, prompts, choices, batch_size=batch_size, progress=progress)

    def score_texts(self, texts: Sequence[str], *, batch_size: int = 8) -> list[Score]:
        """See `scoring.score_texts`."""
        return score_texts(self, texts, batch_size=batch_size)

    @property
    def _writer(self) -> Writer:
        continuous = self.load_options.batching == "continuous"
        words = self.chat_template.stop_text
        return Writer(self.model, self.tokenizer, self.pad_id, self.device, self.stops, words, continuous, self.context)

    @property
    def pad_id(self) -> int:
        """Token id that fills batches; what is filled is masked, so where the model has no row for it, another does."""
        pad = self.tokenizer.pad_token_id
        return int(pad) if pad is not None and pad < self._rows else 0
