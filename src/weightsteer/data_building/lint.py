"""What in the data would leak into the vector besides the behaviour."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import pairwise

from ..behavior import Example, prompt_text
from ..example_files.checks import Finding, check_sides

WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
SHORT = 8  # an answer of fewer characters carries no behaviour
SKEW = 1.15  # mean lengths further apart than this teach length
OPENING_SHARE = 0.10  # a three-word opening in more answers than this teaches that phrase
ONE_SIDED = 8  # a phrase on one side this many times, and at most 1/8 as often on the other


def lint_sides(
    positive: Sequence[Example], negative: Sequence[Example], special_tokens: Collection[str] = ()
) -> list[Finding]:
    """Look for length skew, duplicate prompts, one-sided phrases, missing counterparts, near-empty answers.

    What `check_sides` finds comes first. The other findings are things to look at: a phrase that IS the
    behaviour ("I agree") is rightly one-sided.
    """
    if not positive or not negative:
        return check_sides(positive, negative, special_tokens)
    return [
        *check_sides(positive, negative, special_tokens),
        *_lengths(positive, negative),
        *_duplicates("D+", positive),
        *_duplicates("D-", negative),
        *_counterparts(positive, negative),
        *_near_empty("D+", positive),
        *_near_empty("D-", negative),
        *_openings("D+", positive),
        *_openings("D-", negative),
        *_one_sided(positive, negative),
    ]


def _words(text: str) -> list[str]:
    return [word.lower() for word in WORD.findall(text)]


def _lengths(positive: Sequence[Example], negative: Sequence[Example]) -> list[Finding]:
    means = [statistics.mean(len(_words(e.answer)) for e in side) for side in (positive, negative)]
    ratio = max(means) / max(min(means), 1e-9)
    if ratio <= SKEW:
        return []
    text = f"answers have {means[0]:.1f} words in D+ and {means[1]:.1f} in D-: the vector will change length"
    return [Finding("length skew", text)]


def _duplicates(side: str, examples: Sequence[Example]) -> list[Finding]:
    """Prompts that occur more than once, which weigh more than others; rightly so where all are sampled alike."""
    counts = Counter(prompt_text(e.prompt).strip() for e in examples)
    prompt, most = counts.most_common(1)[0]
    if most == 1:
        return []
    repeated = sum(count > 1 for count in counts.values())
    text = f"{repeated} of {len(counts)} prompts occur more than once in {side}, at most {most} times ({prompt[:60]!r})"
    return [Finding("duplicate prompt", text)]


def _counterparts(positive: Sequence[Example], negative: Sequence[Example]) -> list[Finding]:
    prompts = [{prompt_text(e.prompt).strip() for e in side} for side in (positive, negative)]
    findings = []
    for side, only in (("D+", prompts[0] - prompts[1]), ("D-", prompts[1] - prompts[0])):
        if only:
            text = f"{len(only)} prompts are only in {side}, such as {min(only)[:60]!r}: their topic will leak"
            findings.append(Finding("missing counterpart", text))
    return findings


def _near_empty(side: str, examples: Sequence[Example]) -> list[Finding]:
    short = [e for e in examples if len(e.answer.strip()) < SHORT]
    if not short:
        return []
    text = f"{side} has {len(short)} answers of fewer than {SHORT} characters, such as {short[0].answer[:40]!r}"
    return [Finding("near-empty answer", text)]


def _openings(side: str, examples: Sequence[Example]) -> list[Finding]:
    counts = Counter(" ".join(_words(e.answer)[:3]) for e in examples)
    opening, count = counts.most_common(1)[0]
    if not opening or count < 3 or count / len(examples) <= OPENING_SHARE:
        return []
    text = f"{count} of {len(examples)} answers in {side} open with {opening!r}: the vector will learn the phrase"
    return [Finding("repeated opening", text)]


def _one_sided(positive: Sequence[Example], negative: Sequence[Example]) -> list[Finding]:
    """Words and pairs of words that many answers of one side use and hardly any of the other."""
    counts = [Counter(phrase for e in side for phrase in _phrases(e.answer)) for side in (positive, negative)]
    findings = []
    for side, mine, other in (("D+", counts[0], counts[1]), ("D-", counts[1], counts[0])):
        hits = [(n, p) for p, n in mine.items() if n >= ONE_SIDED and other[p] * 8 <= n]
        if hits:
            listed = ", ".join(f"{p!r} ({n} to {other[p]})" for n, p in sorted(hits, reverse=True)[:8])
            findings.append(Finding("one-sided phrase", f"answers in {side} alone say {listed}"))
    return findings


def _phrases(answer: str) -> set[str]:
    words = _words(answer)
    return {*words, *(f"{a} {b}" for a, b in pairwise(words))}
