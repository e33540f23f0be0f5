"""Write docs/gallery.md: five behaviours of 20 pairs, each with one prompt answered at three strengths.

    python scripts/gallery.py runs/gallery

Trains with no option at all, on the embedded model, what is not there already; some ten minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from weightsteer import LM, WeightVector, generate_at_strengths, train_vector
from weightsteer.behavior import Behavior
from weightsteer.evaluation.looping import loops
from weightsteer.files import write_text
from weightsteer.progress import show_progress

PAGE = Path(__file__).parents[1] / "docs" / "gallery.md"
BEHAVIOURS = ("formal", "concise", "candid", "plain", "cheerful")
PROMPTS, TOKENS = 6, 60
LADDER = (1.0, 0.75, 0.5, 0.35)  # k on both sides, the largest at which no reply loops
Replies = Mapping[float, Sequence[str]]  # k -> the reply to each prompt

HEAD = """# Gallery

`python scripts/gallery.py runs/gallery` makes this page. For five shipped behaviours of 20 pairs
each it trains both sides with no option and subtracts them. It asks the first six of the
behaviour's `questions`, which are in no pair, at three strengths. The model is the embedded one of
135 million parameters, decoding is greedy, and a reply is cut after 60 tokens, which `...` marks.
The k are the vector's recommended ones. Where its card has none, we take the largest k of 1, 0.75,
0.5 and 0.35 at which none of the six replies loops. The prompt shown is the first of the six whose
three replies differ and do not loop. The facts in the replies are those of a very small model.
"""


def strengths(vector: WeightVector) -> list[Sequence[float]]:
    """Which three k to try, in this order: the card's, or -k, 0 and k from large to small."""
    found = vector.card.strength
    if found is not None:
        return [(found.negative, 0.0, found.recommended)]
    return [(-k, 0.0, k) for k in LADDER]


def replies_at(vector: WeightVector, lm: LM, prompts: Sequence[str], ks: Sequence[float]) -> Replies:
    """The reply to each prompt at each k."""
    rows = [generate_at_strengths(vector, lm, prompt, ks, max_new_tokens=TOKENS) for prompt in prompts]
    return {k: [row[place] for row in rows] for place, k in enumerate(ks)}


def first_shown(replies: Replies) -> int | None:
    """The first prompt whose replies differ and do not loop."""
    for number, texts in enumerate(zip(*replies.values(), strict=True)):
        if len(set(texts)) == len(texts) and not any(map(loops, texts)):
            return number
    return None


def chosen(vector: WeightVector, lm: LM, prompts: Sequence[str]) -> Replies:
    """The replies at the largest strengths at which none loops; at the smallest ones where some always do."""
    found: Replies = {}
    for ks in strengths(vector):
        found = replies_at(vector, lm, prompts, ks)
        if not any(loops(text) for k in ks if k for text in found[k]):
            break
    return found


def section(lm: LM, name: str, out: Path) -> str:
    """One behaviour's part of the page."""
    with show_progress(name) as progress:
        vector = train_vector(lm, name, out=out / name, progress=progress)
    behavior = Behavior.load(name)
    prompts = behavior.questions[:PROMPTS]
    replies = chosen(vector, lm, prompts)
    ks = sorted(replies)
    number = first_shown(replies)
    place = 0 if number is None else number
    looping = ", ".join(f"{sum(map(loops, replies[k]))} at k = {k:g}" for k in ks)
    rows = [(behavior.negative_label, ks[0]), ("the model itself", ks[1]), (behavior.positive_label, ks[2])]
    parts = [f"## {behavior.positive_label.capitalize()} or {behavior.negative_label}", "", behavior.description, ""]
    parts += [f"**{prompts[place]}** (prompt {place + 1} of {PROMPTS})", ""]
    for label, k in rows:
        parts += [f"k = {k:g}, {label}:", "", _quoted(lm, replies[k][place]), ""]
    parts += [f"Of the {PROMPTS} replies at each k, these loop: {looping}.", ""]
    parts += ["```sh", f"weightsteer steer {out / name}/vector {prompts[place]!r} --k={ks[0]:g},0,{ks[2]:g}", "```"]
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
