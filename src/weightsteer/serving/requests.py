"""A request's form as the rows that answer it: prompts in token ids, strengths by vector, and where to end."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..chat_template import whole_text
from ..errors import SteerError
from ..lm import LM
from .answers import Answers
from .asked import Asked
from .dial import Dial, RequestError, Setting
from .forms import MOST_ROWS, ChatForm, FanForm, Form, KlForm, TextForm, Turn

REPLY_TOKENS = 1024  # the longest reply to a talk that names no length
SEEDS = 1 << 62


@dataclass(frozen=True)
class Reader:
    """Makes rows of requests. Its methods may run in any thread."""

    lm: LM
    dial: Dial
    _tokenizing: threading.Lock = field(default_factory=threading.Lock)  # tokenizers do not bear two threads

    def chat(self, form: ChatForm) -> tuple[list[Asked], Answers]:
        """The rows of `/v1/chat/completions`.

        Raises:
            RequestError: no such model, or more tokens than the model's context has.
        """
        setting = self.dial.setting(form.model, form.k)
        ids = self._chat_ids(form.messages)
        longest = self._room(ids, form.longest, REPLY_TOKENS)
        rows = self._rows(form, [ids], setting, longest, top=form.top, talk=True, prompt_top=form.prompt_logprobs)
        return rows, self._answers("chat", form, rows, setting, 1)

    def text(self, form: TextForm) -> tuple[list[Asked], Answers]:
        """The rows of `/v1/completions`.

        Raises:
            RequestError: no such model or token, or more tokens than the model's context has.
        """
        setting = self.dial.setting(form.model, form.k)
        prompts = self._prompts(form)
        if len(prompts) * form.n > MOST_ROWS:
            raise RequestError(
                f"prompt: {len(prompts) * form.n} replies are asked for, and {MOST_ROWS} are the most", param="prompt"
            )
        for ids in prompts:
            self._room(ids, form.max_tokens, form.max_tokens)
        prompt_top = form.prompt_logprobs
        if form.echo and form.logprobs is not None:
            prompt_top = max(form.logprobs, prompt_top or 0)
        rows = self._rows(form, prompts, setting, form.max_tokens, top=form.logprobs, talk=False, prompt_top=prompt_top)
        return rows, self._answers("text", form, rows, setting, len(prompts))

    def fan(self, form: FanForm) -> tuple[list[Asked], str]:
        """The rows of `/dial/fan`, and what to say of their strengths.

        Raises:
            RequestError: no such vector, or more tokens than the model's context has.
        """
        settings = [self.dial.setting(None, strengths) for strengths in form.strengths]
        ids = self._chat_ids(form.messages)
        common: dict[str, Any] = {
            "ids": tuple(ids),
            "max_tokens": self._room(ids, form.max_tokens, REPLY_TOKENS),
            "temperature": form.temperature,
            "top_p": form.top_p,
            "seed": form.seed,
            "stop": self._stops((), talk=True),
            "stop_ids": frozenset(self.lm.stops),
        }
        warnings = dict.fromkeys(setting.warning for setting in settings if setting.warning)
        return [Asked(strengths=setting.strengths, **common) for setting in settings], "; ".join(warnings)

    def exchange(self, form: KlForm) -> tuple[list[int], list[int], Setting]:
        """The tokens of `/dial/kl`: the prompt's and the reply's, and the strengths.

        Raises:
            RequestError: no such vector, an empty reply, or more tokens than the model's context has.
        """
        setting = self.dial.setting(None, form.strengths)
        with self._tokenizing:
            exchange = _reading(
                "messages", lambda: self.lm.exchange([turn.plain for turn in form.messages], form.reply)
            )
        if not exchange.answer:
            raise RequestError("reply: expected some text", param="reply")
        self._room(exchange.head + exchange.answer, 0, 0)
        return exchange.head, exchange.answer, setting

    def _chat_ids(self, messages: Sequence[Turn]) -> list[int]:
        with self._tokenizing:
            return _reading("messages", lambda: self.lm.chat_ids([turn.plain for turn in messages]))

    def _prompts(self, form: TextForm) -> list[list[int]]:
        """The prompts as token ids."""
        given = form.prompt
        if isinstance(given, str):
            listed: list[Any] = [given]
        else:
            listed = [given] if given and isinstance(given[0], int) else list(given)
        found: list[list[int]] = []
        with self._tokenizing:
            for prompt in listed:
                if isinstance(prompt, str):
                    text = _reading("prompt", lambda prompt=prompt: whole_text(prompt))
                    prompt = list(self.lm.tokenizer(text, add_special_tokens=form.add_special_tokens)["input_ids"])
                found.append(prompt)
        if not found or not all(found):
            raise RequestError("prompt: expected at least one token in each", param="prompt")
        for ids in found:
            _reading("prompt", lambda ids=ids: self._known(ids))
        return found

    def _known(self, ids: list[int]) -> list[int]:
        weight: Tensor = self.lm.model.get_input_embeddings().weight  # type: ignore[assignment]
        rows = weight.shape[0]
        if max(ids) >= rows:
            raise SteerError(f"token {max(ids)}: the model has the tokens 0 to {rows - 1}")
        return ids

    def _room(self, ids: Sequence[int], wanted: int | None, default: int) -> int:
        """How many tokens may follow a prompt; the last one is never read, and needs no place."""
        context = getattr(self.lm.model.config.get_text_config(), "max_position_embeddings", None)
        if not isinstance(context, int):
            return default if wanted is None else wanted
        room = context - len(ids) + 1
        if len(ids) > context or (wanted is not None and wanted > max(room, 1)):
            more = f" and the reply of up to {wanted}" if wanted else ""
            raise RequestError(
                f"the prompt of {len(ids)} tokens{more} is longer than the model's context of {context} tokens",
                param="messages" if wanted is None else "max_tokens",
                code="context_length_exceeded",
            )
        return min(default, room) if wanted is None else wanted

    def _stops(self, stops: Sequence[str], *, talk: bool) -> tuple[str, ...]:
        """Texts that end a reply: the request's own, and in a talk what begins the user's next turn."""
        ends = self.lm.chat_template.stop_text if talk else None
        return (*stops, ends) if ends else tuple(stops)

    def _rows(
        self,
        form: Form,
        prompts: Sequence[Sequence[int]],
        setting: Setting,
        max_tokens: int,
        *,
        top: int | None,
        prompt_top: int | None,
        talk: bool,
    ) -> list[Asked]:
        if form.stream and prompt_top is not None and form.prompt_logprobs is not None:
            raise RequestError("prompt_logprobs: is not streamed; leave out stream", param="prompt_logprobs")
        seed = secrets.randbelow(SEEDS) if form.seed is None else form.seed
        ends = frozenset() if form.ignore_eos else frozenset(self.lm.stops)
        return [
            Asked(
                ids=tuple(ids),
                strengths=setting.strengths,
                max_tokens=max_tokens,
                temperature=form.temperature,
                top_p=form.top_p,
                seed=seed + number,
                stop=self._stops(form.stop, talk=talk),
                stop_ids=ends | frozenset(form.stop_token_ids),
                top=top,
                prompt_top=prompt_top,
            )
            for ids in prompts
            for number in range(form.n)
        ]

    def _answers(self, kind: Any, form: Form, rows: Sequence[Asked], setting: Setting, distinct: int) -> Answers:
        return Answers(
            kind=kind,
            model=form.model or self.dial.base,
            tokenizer=self.lm.tokenizer,
            prompts=[row.ids for row in rows],
            distinct=distinct,
            warning=setting.warning,
            echo=isinstance(form, TextForm) and form.echo,
            asked_chances=rows[0].top is not None,
            prompt_chances=form.prompt_logprobs is not None,
        )


def _reading(param: str, read: Any) -> Any:
    """What `read` gives; a user's mistake in it is one of the request's field `param`."""
    try:
        return read()
    except RequestError:
        raise
    except SteerError as error:
        code = "context_length_exceeded" if "context of" in str(error) else None
        raise RequestError(str(error), param=param, code=code) from None


Fields = Mapping[str, Any]
