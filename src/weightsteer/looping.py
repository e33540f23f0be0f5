"""Replies that repeat themselves: the damage that a loss on ordinary text does not show (no torch)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

LOOPING = 0.2  # share of repeated 4-grams above which a reply counts as looping; fluent replies stay below 0.1
MORE_LOOPS = 0.17  # by how much the share of broken replies may exceed the base's: of 6 or 8, by one, as by chance
SPAN = 4
ALONE = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # scripts that put no spaces between words: a letter is a word
WORD = re.compile(rf"[{ALONE}]|[^\W{ALONE}]+|[^\w\s]")


def repeated_share(text: str) -> float:
    """The share of a text's 4-grams of words that stood in it before; 0 for a text of fewer than five words."""
    words = WORD.findall(text.lower())
    grams = Counter(zip(*(words[start:] for start in range(SPAN)), strict=False))
    count = grams.total()
    return 1 - len(grams) / count if count else 0.0


def loops(text: str) -> bool:
    """Whether a reply repeats itself so much that a reader would call it broken."""
    return repeated_share(text) > LOOPING


def broken_share(replies: Sequence[str]) -> float:
    """The share of replies that loop or are empty; 0 of none."""
    return sum(loops(reply) or not reply.strip() for reply in replies) / max(1, len(replies))


def breaks_more(replies: Sequence[str], base: Sequence[str]) -> bool:
    """Whether more of these replies loop or are empty than of the base's to the same prompts, beyond `MORE_LOOPS`."""
    return broken_share(replies) - broken_share(base) > MORE_LOOPS
