"""Write docs/gallery.md: five behaviours of 20 pairs, each with one prompt answered at three strengths.

    python scripts/gallery.py runs/gallery

What is trained and calibrated already is kept.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from weightsteer import LM, WeightVector
from weightsteer.behavior import Behavior
from weightsteer.files import write_text
from weightsteer.looping import loops
from weightsteer.progress import show_progress
from weightsteer.run_card import RunCard, StrengthRange
from weightsteer.run_folder import RunFolder
from weightsteer.runs.whole_way import Source, make_dial
from weightsteer.steering.several_k import replies_at_strengths

PAGE = Path(__file__).parents[1] / "docs" / "gallery.md"
BEHAVIOURS = ("formal", "concise", "candid", "plain", "cheerful")
PROMPTS, TOKENS = 6, 60
Replies = Mapping[float, Sequence[str]]  # k -> the reply to each prompt

HEAD = """# Gallery

This page is made by `python scripts/gallery.py runs/gallery`. For five shipped behaviours of 20
pairs each it does what `weightsteer make NAME` does, without an option: it trains both sides,
subtracts them, and calibrates k. Then it asks the first six of the behaviour's `questions`, which
are in no pair, at the recommended strengths and at 0. The prompt shown is the first of the six
whose three replies differ and do not loop. The model is the embedded one of 135 million
parameters, so the facts in its replies are those of a very small model. Decoding is greedy, and a
reply is cut after 60 tokens, which `...` marks.
"""


def strengths(found: StrengthRange) -> tuple[float, float, float]:
    """The recommended k on both sides; on a side without one, the smallest that was measured."""
    return found.negative or found.low / 4, 0.0, found.recommended or found.high / 4


def replies_at(vector: WeightVector, lm: LM, prompts: Sequence[str], ks: Sequence[float]) -> Replies:
    """The reply to each prompt at each k."""
    return dict(zip(ks, replies_at_strengths(vector, lm, prompts, ks, max_new_tokens=TOKENS), strict=True))


def first_shown(replies: Replies) -> int | None:
    """The first prompt whose replies differ and do not loop."""
    for number, texts in enumerate(zip(*replies.values(), strict=True)):
        if len(set(texts)) == len(texts) and not any(map(loops, texts)):
            return number
    return None


def section(lm: LM, name: str, out: Path) -> str:
    """One behaviour's part of the page."""
    folder = RunFolder(out / name).vector
    if not folder.is_dir() or RunCard.load(folder).strength is None:
        make_dial(Source.find(name), lm, out / name, show=show_progress)
    vector, behavior = WeightVector.load(folder), Behavior.load(name)
    assert vector.card.strength is not None
    prompts, ks = behavior.questions[:PROMPTS], strengths(vector.card.strength)
    replies = replies_at(vector, lm, prompts, ks)
    number = first_shown(replies)
    place = 0 if number is None else number
    looping = ", ".join(f"{sum(map(loops, replies[k]))} at k = {k:g}" for k in ks)
    rows = [(behavior.negative_label, ks[0]), ("the model itself", ks[1]), (behavior.positive_label, ks[2])]
    parts = [f"## {behavior.positive_label.capitalize()} or {behavior.negative_label}", "", behavior.description, ""]
    parts += [f"**{prompts[place]}** (prompt {place + 1} of {PROMPTS})", ""]
    for label, k in rows:
        parts += [f"k = {k:g}, {label}:", "", _quoted(lm, replies[k][place]), ""]
    parts += [f"Of the {PROMPTS} replies at each k, these loop: {looping}.", ""]
    parts += ["```sh", f'weightsteer steer runs/{name}/vector "{prompts[place]}" --k={ks[0]:g},0,{ks[2]:g}', "```", ""]
    return "\n".join(textwrap.fill(part, 98) if part == behavior.description else part for part in parts)


def _quoted(lm: LM, reply: str) -> str:
    """A reply as a block of Markdown that shows it as it is; `...` where it was cut."""
    cut = len(lm.tokenizer(reply, add_special_tokens=False)["input_ids"]) >= TOKENS - 1
    lines = [line for text in f"{reply.strip()}{' ...' if cut else ''}".splitlines() for line in _wrapped(text)]
    return "\n".join(["```text", *lines, "```"])


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text.replace("```", "'''"), 96) or [""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--behaviours", default=",".join(BEHAVIOURS), help="some of " + ", ".join(BEHAVIOURS))
    parser.add_argument("--dtype", default="float32", help="as `weightsteer train --dtype`")
    parser.add_argument("--page", type=Path, default=PAGE, help="where the page goes")
    options = parser.parse_args()
    lm = LM.load(dtype=options.dtype)
    parts = [HEAD]
    for name in options.behaviours.split(","):
        parts.append(section(lm, name, options.out))
        write_text(options.page, "\n".join([*parts, ""]))
        print(parts[-1], flush=True)


if __name__ == "__main__":
    main()
