"""Conversations as a tokenizer's chat template renders them: what is served, what is trained, what is scored.

All three are cut from one rendering of the whole conversation, tokenised once. So the tokens where a prompt and its
answer meet are those that a model sees in practice, and the end of a turn is what the template writes there.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from jinja2 import TemplateError, meta
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from .errors import SteerError, first_line
from .schema import shown

PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
    "{{ eos_token if loop.last and m['role'] == 'assistant' and eos_token else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
BOS = "{{ bos_token }}"  # before it, where the tokenizer puts one before plain text

Messages = Sequence[Mapping[str, str]]  # turns of a talk, each with 'role' and 'content'
PromptLike = str | Messages  # what the user says, or the turns up to there

SYSTEM_ROLES = ("system", "developer")
OURS = ("messages", "add_generation_prompt")  # variables of a template that are not the user's to set
SENTINELS = ("Xq7vZ", "Bk3wJ", "Hm9yD")  # texts that no template holds or changes
FAILURES = (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)  # of rendering


def plain_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template for a tokenizer that has none: a dialogue in words, begun as the tokenizer begins plain text."""
    with_start = list(tokenizer("a")["input_ids"])
    begins = tokenizer.bos_token_id is not None and with_start[:1] == [tokenizer.bos_token_id]
    return BOS + PLAIN_TEMPLATE if begins else PLAIN_TEMPLATE


def is_plain(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer's template is `plain_template`, that is, none of its own."""
    return tokenizer.chat_template in (PLAIN_TEMPLATE, BOS + PLAIN_TEMPLATE)


@dataclass(frozen=True)
class Exchange:
    """A prompt and the answer to it as token ids; one after the other they are the whole conversation's."""

    prompt: list[int]  # what a model is served
    lead: list[int]  # what the template writes before an answer and no model is served, such as an empty thought
    answer: list[int]
    end: list[int]  # the end of the assistant's turn, and what follows it

    @property
    def head(self) -> list[int]:
        """What comes before the answer."""
        return self.prompt + self.lead


@dataclass
class _Traits:
    """What a template does, found by rendering it; kept for each tokenizer."""

    parts: bool  # takes content as a list of parts only
    system: bool  # has a system role
    heard: bool  # shows what the user says
    header: str  # the assistant's header, where the template writes none for generation
    said: set[str] = field(default_factory=set)

    def warn(self, what: str, text: str) -> None:
        """Warn of `what`, the first time."""
        if what not in self.said:
            self.said.add(what)
            warnings.warn(text, stacklevel=2)


_KNOWN: WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[str, str], _Traits]] = WeakKeyDictionary()


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer, with the variables that a user has set for it.

    Args:
        name: the model's, for messages.
        variables: such as {"enable_thinking": False}.
    """

    tokenizer: PreTrainedTokenizerBase
    name: str
    variables: Mapping[str, Any]

    @property
    def text(self) -> str:
        """The template itself; of several named ones the default.

        Raises:
            SteerError: there are several and none is the default.
        """
        try:
            return self.tokenizer.get_chat_template()
        except ValueError:
            known = ", ".join(sorted(self.tokenizer.chat_template or ()))
            raise SteerError(
                f"{self.name}: has several chat templates ({known}) and none named default; keep one of them, as "
                "chat_template.jinja in the model's folder"
            ) from None

    def check_variables(self) -> None:
        """Raise if a variable was set that the template does not read, or that is not the user's to set."""
        known = template_variables(self.text) - set(OURS) - set(self.tokenizer.special_tokens_map)
        for name in self.variables:
            if name not in known:
                found = ", ".join(sorted(known - {"raise_exception", "strftime_now"})) or "none"
                raise SteerError(
                    f"chat_template_kwargs: {self.name}'s template has no variable {name!r}; those that it has: {found}"
                )

    def prompt_text(self, messages: Messages) -> str:
        """The turns, up to where the assistant's answer starts.

        Raises:
            SteerError: the template refuses the conversation.
        """
        return self._render(messages, prompt=True) + self._traits.header

    def prompt_ids(self, messages: Messages) -> list[int]:
        """The token ids of `prompt_text`."""
        return self.ids_of(self.prompt_text(messages))

    def exchange(self, messages: Messages, answer: str) -> Exchange:
        """The turns, and the answer to them.

        Raises:
            SteerError: the template refuses the conversation.
        """
        whole = self._render([*messages, {"role": "assistant", "content": answer}])
        served = self.prompt_text(messages)
        begin, start, end = self._cuts(messages, whole, served)
        ids, bounds = self._split(whole, (begin, start), end)
        prompt, head, body = bounds
        exchange = Exchange(ids[:prompt], ids[prompt:head], ids[head:body], ids[body:])
        if exchange.prompt != self.ids_of(served):
            self._warn_of_difference(whole[:begin], served)
        return exchange

    def _warn_of_difference(self, rendered: str, served: str) -> None:
        if rendered == served:
            found = f"the tokens at the end of {served[-30:]!r} are others once an answer follows"
        else:
            found = (
                f"its chat template renders a finished answer after {rendered[-30:]!r}, and asks for one by "
                f"{served[-30:]!r}"
            )
        self._traits.warn(
            "difference",
            f"{self.name}: {found}; training and scoring follow the finished answer, generation the prompt",
        )

    @property
    def turn_end(self) -> int | None:
        """The token that ends an assistant's turn: the first control token after an answer, or the tokenizer's own."""
        ask, answer, _ = SENTINELS
        after = self._render([_user(ask), {"role": "assistant", "content": answer}]).rpartition(answer)[2]
        control = self._control_tokens
        return next((token for token in self.ids_of(after) if token in control), self.tokenizer.eos_token_id)

    @property
    def stop_text(self) -> str | None:
        """The words that begin the user's next turn, where no control token does."""
        ask, answer, again = SENTINELS
        try:
            talk = self._render([_user(ask), {"role": "assistant", "content": answer}, _user(again)])
        except SteerError:  # a template for one question
            return None
        between = talk.rpartition(again)[0].rpartition(answer)[2].rstrip()
        return between if between.strip() and not self._control_tokens & set(self.ids_of(between)) else None

    @property
    def _control_tokens(self) -> set[int]:
        """Tokens that are no text."""
        added = {i for i, token in self.tokenizer.added_tokens_decoder.items() if str(token).strip()}
        return added | set(self.tokenizer.all_special_ids)

    @property
    def has_system_role(self) -> bool:
        """Whether a system prompt has a place of its own."""
        return self._traits.system

    @property
    def _traits(self) -> _Traits:
        known = _KNOWN.setdefault(self.tokenizer, {})
        key = (self.text, json.dumps(dict(self.variables), sort_keys=True, default=str))
        if key not in known:
            known[key] = self._find_traits()
        return known[key]

    def _find_traits(self) -> _Traits:
        ask, answer, order = SENTINELS
        as_text = self._shows([_user(ask)], ask, parts=False)
        parts = not as_text and self._shows([_user(ask)], ask, parts=True)
        system = self._shows([{"role": "system", "content": order}, _user(ask)], order, parts=parts)
        header = ""
        try:
            open_end, closed = (self._try([_user(ask)], parts, prompt=prompt) for prompt in (True, False))
            whole = self._try([_user(ask), {"role": "assistant", "content": answer}], parts)
        except FAILURES:  # it will refuse the conversation, and say so
            return _Traits(parts, system, as_text or parts, header)
        before = whole.rpartition(answer)[0]
        if open_end == closed and before.startswith(closed):
            header = before[len(closed) :]
        return _Traits(parts, system, as_text or parts, header if header.strip() else "")

    def _shows(self, messages: Messages, text: str, *, parts: bool) -> bool:
        try:
            return text in self._try(messages, parts, prompt=True)
        except FAILURES:
            return False

    def _try(self, messages: Messages, parts: bool, *, prompt: bool = False) -> str:
        turns: list[dict[str, Any]] = [dict(turn) for turn in messages]
        if parts:
            turns = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        rendered = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=prompt, chat_template=self.text, **self.variables
        )
        return str(rendered)

    def _render(self, messages: Messages, *, prompt: bool = False) -> str:
        traits = self._traits
        if messages and messages[0]["role"] in SYSTEM_ROLES and not traits.system:
            messages = self._folded(messages, traits)
        try:
            text = self._try(messages, traits.parts, prompt=prompt)
        except FAILURES as error:
            raise SteerError(f"{self.name}: its chat template refuses the conversation ({first_line(error)})") from None
        if not traits.heard:
            raise SteerError(f"{self.name}: its chat template leaves out what the user says")
        return text

    def _folded(self, messages: Messages, traits: _Traits) -> Messages:
        """The system prompt before the first user turn's words: the way of models that know no system role."""
        system, talk = messages[0], messages[1:]
        if not talk or talk[0]["role"] != "user":
            raise SteerError(f"{self.name}: its chat template has no system role, and no user turn follows the prompt")
        if not system["content"]:
            return talk
        traits.warn(
            "folded",
            f"{self.name}: its chat template has no system role; the system prompt is put before the user's first "
            "words",
        )
        return [_user(system["content"] + "\n\n" + talk[0]["content"]), *talk[1:]]

    def _cuts(self, messages: Messages, whole: str, served: str) -> tuple[int, int, int]:
        """Where in the whole rendering the served prompt ends, where the answer starts, and where it ends."""
        mark = SENTINELS[1]
        before, _, after = self._render([*messages, {"role": "assistant", "content": mark}]).rpartition(mark)
        end = len(whole) - len(after) if whole.endswith(after) else len(whole)
        start = len(before)
        if not whole.startswith(before) or start > end:  # what comes before depends on the answer: its own thinking
            start = begin = _common(whole, served)
        elif before.startswith(served):
            begin = len(served)
            start = start if before[begin:].strip() else begin  # a blank before an answer is a part of it
        else:
            begin = start
        return begin, start, max(start, end)

    def ids_of(self, text: str) -> list[int]:
        """Token ids of rendered text."""
        return list(self.tokenizer(whole_text(text), add_special_tokens=False)["input_ids"])

    def _split(self, text: str, starts: tuple[int, int], end: int) -> tuple[list[int], tuple[int, int, int]]:
        """Token ids of a text, and the bounds among them of three places in it.

        A token that lies across a start, or across the end, belongs to the answer.
        """
        if not self.tokenizer.is_fast:
            ids = self.ids_of(text)
            before = [_common(ids, self.ids_of(text[:place])) for place in starts]
            upto = self.ids_of(text[:end])
            shared = _common(ids, upto)
            return ids, (before[0], before[1], min(shared + (shared < len(upto)), len(ids)))
        encoded = self.tokenizer(whole_text(text), add_special_tokens=False, return_offsets_mapping=True)
        spans = encoded["offset_mapping"]
        first, second = (sum(stop <= place for _, stop in spans) for place in starts)
        return list(encoded["input_ids"]), (first, second, max(second, sum(begin < end for begin, _ in spans)))


def template_variables(text: str) -> set[str]:
    """The variables that a chat template reads.

    Raises:
        SteerError: it is no Jinja template.
    """
    text = re.sub(r"{%-?\s*(?:end)?generation\s*-?%}", "", text)  # transformers' own tags
    try:
        return meta.find_undeclared_variables(ImmutableSandboxedEnvironment(extensions=[loopcontrols]).parse(text))
    except TemplateError as error:
        raise SteerError(f"chat template: cannot be read ({first_line(error)})") from None


def whole_text(text: str) -> str:
    """The text, which a tokenizer can read.

    Raises:
        SteerError: it holds half a character, as a terminal or a file in another encoding than UTF-8 leaves it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SteerError(
            f"the text is not UTF-8 at {text[max(0, error.start - 20) : error.start + 1]!a}; write it in UTF-8"
        ) from None
    return text


def refuse_text(texts: Sequence[PromptLike]) -> None:
    """Raise for one text in place of a list of them, whose letters would be taken for texts."""
    if isinstance(texts, str):
        raise SteerError(f"expected a list of texts, found one, {texts[:60]!r}; give [text]")


def turns_of(prompt: PromptLike, system_prompt: str | None = None) -> list[dict[str, str]]:
    """A prompt as turns; `system_prompt` goes before them unless they begin with one.

    Raises:
        SteerError: neither a text nor turns.
    """
    if not isinstance(prompt, str) and not (
        isinstance(prompt, Sequence) and all(isinstance(turn, Mapping) and "role" in turn for turn in prompt)
    ):
        raise SteerError(
            f"prompt: expected a text, or turns such as [{{'role': 'user', 'content': 'Hi'}}], found {shown(prompt)}"
        )
    turns = [_user(prompt)] if isinstance(prompt, str) else [dict(turn) for turn in prompt]
    if system_prompt is not None and not (turns and turns[0]["role"] in SYSTEM_ROLES):
        turns.insert(0, {"role": "system", "content": system_prompt})
    return turns


def last_words(prompt: PromptLike) -> str:
    """What a prompt says last, cut to what a message has room for."""
    return (prompt if isinstance(prompt, str) else prompt[-1]["content"])[:60]


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How long a beginning two texts, or two lists, share."""
    length = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        length += 1
    return length
