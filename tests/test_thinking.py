from __future__ import annotations

from typing import Any

import pytest
import torch

from chat_templates import FAMILIES
from test_chat_template import merging_tokenizer, model_for
from weightsteer.errors import SteerError
from weightsteer.evaluation.tasks.task import answers_to
from weightsteer.lm import LM
from weightsteer.thinking import Reply, opens_thinking, split_thinking


@pytest.mark.parametrize(
    ("text", "opened", "parts"),
    [
        ("Yes.", False, ("", "Yes.")),
        ("<think>\nHm.\n</think>\n\nYes.", False, ("Hm.", "Yes.")),
        ("<think>\n\n</think>\n\nYes.", False, ("", "Yes.")),
        ("Hm.\n</think>\n\nYes.", True, ("Hm.", "Yes.")),
        ("<think>\nHm. So", False, ("Hm. So", None)),
        ("Hm. So", True, ("Hm. So", None)),
        ("[THINK]Hm.[/THINK]Yes.", False, ("Hm.", "Yes.")),
        ("<|channel|>analysis<|message|>Hm.<|channel|>final<|message|>Yes.", False, ("Hm.", "Yes.")),
        ("The tag <think> opens a thought.", False, ("", "The tag <think> opens a thought.")),
        ("The tag </think> closes a thought.", False, ("", "The tag </think> closes a thought.")),
        ("Hm.\n</think>\n\nYes.", False, ("Hm.", "Yes.")),  # the template began it, and nobody says so
        ("Hm.</think>\nYes.", False, ("Hm.", "Yes.")),
        ("Hm.</think>Yes.", True, ("Hm.", "Yes.")),
        ("<thought>\nHm.\n</thought>\n\nYes.", False, ("Hm.", "Yes.")),
        ("<|START_THINKING|>Hm.<|END_THINKING|>Yes.", False, ("Hm.", "Yes.")),
    ],
)
def test_the_answer_is_what_follows_the_thinking(text: str, opened: bool, parts: tuple[str, str | None]) -> None:
    assert split_thinking(text, opened=opened) == parts


def test_a_prompt_that_opens_the_thinking() -> None:
    assert opens_thinking("<|Assistant|><think>\n")
    assert not opens_thinking("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def writing(lm: LM, *texts: str) -> LM:
    """The model, made to write these texts one after the other."""
    waiting = list(texts)

    def generate(input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        if "output_logits" in options:
            raise TypeError("only text")
        written = lm.tokenizer(waiting.pop(0), add_special_tokens=False)["input_ids"]
        return torch.cat([input_ids, torch.tensor([written])], dim=1)

    lm.model.generate = generate  # type: ignore[assignment]
    return lm


@pytest.mark.parametrize("name", ["thinking", "reasoning that the prompt opens"])
def test_replies_are_told_from_their_thinking(name: str) -> None:
    family = FAMILIES[name]
    tokenizer = merging_tokenizer(family.tokens, family.text)
    start, end = ("" if name != "thinking" else "<think>\n"), tokenizer.eos_token
    lm = LM.wrap(model_for(tokenizer), tokenizer, name="thinker")
    cut = f"{start}He asks, so"
    writing(lm, *[f"{start}He asks.\n</think>\n\nYes.{end}", cut] * 3)
    assert lm.replies(["Hi", "Hi"]) == [Reply("Yes.", "He asks."), Reply(None, "He asks, so", ended=False)]
    with pytest.warns(UserWarning, match="thinker: 1 of 2 replies ended inside their thinking and have no answer"):
        assert lm.generate(["Hi", "Hi"]) == ["Yes.", ""]
    with pytest.warns(UserWarning, match="they do not count"):
        assert answers_to(lm, ["Hi", "Hi"], max_new_tokens=9) == ["Yes.", None]
    with pytest.raises(SteerError, match="2 of 2 replies ended inside their thinking"):
        answers_to(writing(lm, cut, cut), ["Hi", "Hi"], max_new_tokens=9)
