"""Writes sums.jsonl, lists.jsonl and code.jsonl: neutral tasks that follow rules, so that a script can make them.

    python recipes/monitoring/neutral.py

The seed is fixed, so the files come out the same each time.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

HERE = Path(__file__).parent
COUNT = 48  # examples of each task
Row = dict[str, str]

THINGS = (
    *("anchor", "basket", "candle", "drum", "easel", "feather", "goblet", "hammer", "inkwell", "jar"),
    *("kettle", "ladder", "mirror", "napkin", "oar", "pillow", "quilt", "rope", "spoon", "trunk"),
    *("urn", "violin", "wheel", "yarn", "zipper", "bell", "crate", "fan", "hinge", "lantern"),
)
WORDS = {  # a language that nobody speaks, named Tambo: noun, adjective and verb
    "noun": {
        **{"dog": "rukel", "boat": "osim", "child": "tenda", "river": "lauf", "stone": "pikko"},
        **{"bird": "zemi", "house": "dorun", "star": "ilpa"},
    },
    "adjective": {
        **{"red": "vash", "small": "nin", "old": "ughra", "quiet": "moel", "heavy": "brant", "young": "seff"},
    },
    "verb": {**{"sleeps": "hul", "falls": "kost", "sings": "arima", "waits": "towe", "turns": "geb"}},
}


def sums(rng: random.Random) -> Iterator[Row]:
    """Additions, subtractions and products of numbers up to 90."""
    while True:
        kind = rng.choice(["plus", "minus", "times"])
        a, b = (rng.randint(2, 9), rng.randint(2, 12)) if kind == "times" else (rng.randint(11, 90), rng.randint(3, 60))
        a, b = (max(a, b), min(a, b)) if kind == "minus" else (a, b)
        result = {"plus": a + b, "minus": a - b, "times": a * b}[kind]
        yield {"topic": kind, "prompt": f"What is {a} {kind} {b}?", "answer": f"{a} {kind} {b} is {result}."}


def lists(rng: random.Random) -> Iterator[Row]:
    """Words put in alphabetical order, in reverse, numbered, or without one of them."""
    while True:
        kind = rng.choice(["alphabet", "reverse", "numbers", "without"])
        words = rng.sample(THINGS, rng.randint(3, 5))
        shown = ", ".join(words)
        left_out = rng.choice(words)
        prompt, answer = {
            "alphabet": (f"Put in alphabetical order: {shown}.", ", ".join(sorted(words)) + "."),
            "reverse": (f"Put in reverse order: {shown}.", ", ".join(reversed(words)) + "."),
            "numbers": (f"Write as a numbered list: {shown}.", "\n".join(f"{i}. {w}" for i, w in enumerate(words, 1))),
            "without": (f"Leave out {left_out}: {shown}.", ", ".join(w for w in words if w != left_out) + "."),
        }[kind]
        yield {"topic": kind, "prompt": prompt, "answer": answer}


def code(rng: random.Random) -> Iterator[Row]:
    """Sentences translated into Tambo, where the verb comes first and the adjective follows its noun; and back."""
    while True:
        (noun, n), (adjective, a), (verb, v) = (rng.choice(list(words.items())) for words in WORDS.values())
        english, tambo = f"The {adjective} {noun} {verb}.", f"{v.capitalize()} {n} {a}."
        if rng.random() < 0.5:
            yield {"topic": "into Tambo", "prompt": f"Translate into Tambo: {english}", "answer": tambo}
        else:
            yield {"topic": "from Tambo", "prompt": f"Translate from Tambo: {tambo}", "answer": english}


def main() -> None:
    for name, make in (("sums", sums), ("lists", lists), ("code", code)):
        unique = {}
        for row in islice(make(random.Random(name)), 4 * COUNT):
            unique.setdefault(row["prompt"], row)
        rows = list(unique.values())[:COUNT]
        (HERE / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
