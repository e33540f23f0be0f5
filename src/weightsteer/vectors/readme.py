"""The README.md of a saved vector or exported adapter: what it is, how it was made, and how to use it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..checkpoints.embedded_model import public_base
from ..places import public_name
from ..run_card import RunCard
from ..shown import markdown_text, yaml_text

README = "README.md"
SHOWN_SETTINGS = ("kind", "rank", "alpha", "epochs", "batch_size", "learning_rates", "weight_decay")

VECTOR = """# A weight vector for {base}

A weight vector w turns one behaviour of a language model up or down. It is added to the weights theta
of {base}, times a strength k: theta + k w. With k above 0 the model shows more of the behaviour,
with k below 0 less of it, and k = 0 is the model as it was.
"""
EXPORT = """# {base}, steered at k = {k:g}

A PEFT adapter that holds k w: a weight vector w, which turns one behaviour of {base}
up or down, times the strength k = {k:g}. It is made to be loaded at the scale 1.
"""
DENSE = """
A part of the vector is no product of two thin matrices, so that no adapter can hold it. It lies in
`delta.safetensors`, which PEFT passes over: what PEFT loads from here is another model. weightsteer reads
both parts, and `weightsteer export merged` writes a checkpoint for other programs.
"""
MADE = """
## How it was made

By weightsteer, by [contrastive weight steering](https://arxiv.org/abs/2511.05408): w is the difference
of two fine-tunes, one on answers that show the behaviour and one on answers that show its opposite.
"""
DERIVED = """
## How it was made

By weightsteer, from vectors or fine-tunes: {expression}

This is what k = 1 gives.
"""
FACTS = """
| | |
| --- | --- |
{rows}

`weightsteer.json` holds all settings, hashes of the data, and the versions of the libraries.

## How to use it
"""
WITH_US = """
With weightsteer, at any strength, from within this folder:

```sh
weightsteer show .
weightsteer steer . "Your question?" --k={ks}
weightsteer chat .
```

```python
from weightsteer import LM, WeightVector

lm = LM.load("{base}")
w = WeightVector.load(".")
with w.applied(lm, k={k:g}):
    print(lm.generate(["Your question?"]))
```
"""
WITH_PEFT = """
With PEFT, at k = {k:g}:

```python
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, ".")
with rescale_adapter_scale(model, {k:g}):
    ...  # generate
```
"""
EXPORT_WITH_PEFT = """
With PEFT, which applies it at k = {k:g}:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, ".")
```
"""
AUTO = "\n`AutoPeftModelForCausalLM` finds the base by itself.\n"
PLAIN = re.compile(r"[\w./-]+", re.ASCII)  # a base's name that can stand in code
UNNAMED = "BASE"  # where the card names none such


def vector_readme(card: RunCard, *, adapter: bool, dense: bool, sections: str = "") -> str:
    """The model card of a vector's folder, with the front matter that the Hugging Face hub reads.

    Args:
        adapter: whether the folder holds a PEFT adapter.
        dense: whether it holds changes that no adapter can.
        sections: more of the page, in Markdown, after its introduction.
    """
    card, name = card.shared(), public_base(card.base_model)
    base, k = markdown_text(name) or "a model that the card does not name", card.settings.get("k")
    exported = isinstance(k, int | float)
    strength = float(k) if isinstance(k, int | float) else 1.0
    expression = card.settings.get("expression")
    rows = "\n".join(f"| {fact} | {markdown_text(value)} |" for fact, value in _facts(card).items())
    code = name if PLAIN.fullmatch(name) else UNNAMED
    k_used = strength if exported else _strengths_of(card)[1]
    with_peft = (EXPORT_WITH_PEFT if exported else WITH_PEFT).format(k=k_used, base=code)
    parts = [
        _front_matter(name, adapter and not dense),
        (EXPORT if exported else VECTOR).format(base=base, k=strength),
        DENSE if dense else "",
        sections,
        DERIVED.format(expression=markdown_text(str(expression))) if expression else MADE,
        FACTS.format(rows=rows),
        "" if exported else WITH_US.format(ks=_strengths_of(card)[0], k=k_used, base=code),
        with_peft if adapter and not dense else "",
        f"\nBASE is {base}.\n" if code == UNNAMED else "",
        AUTO if adapter and not dense and name.count("/") == 1 else "",
    ]
    return "".join(parts)


def _strengths_of(card: RunCard) -> tuple[str, float]:
    """Strengths to try side by side, as `--k` takes them, and the one that shows most: recommended, if any are."""
    chosen = card.strength
    ks = sorted({chosen.negative, 0.0, chosen.recommended}) if chosen else []
    shown = ks if len(ks) > 1 else [-1.0, 0.0, 1.0]
    return ",".join(f"{k:g}" for k in shown), max(shown, key=lambda k: (abs(k), k))


def _front_matter(base: str, adapter: bool) -> str:
    named = [f"base_model: {yaml_text(base)}"] if base else []
    tags = ["weight-steering", "task-vector", *(["lora"] if adapter else [])]
    library = "peft" if adapter else "weightsteer"
    return "\n".join(["---", *named, f"library_name: {library}", f"tags: [{', '.join(tags)}]", "---", "", ""])


def _facts(card: RunCard) -> Mapping[str, str]:
    """What the table says, without what the card leaves open."""
    revision, strength = card.base_revision[:12], card.strength
    settings = {name: _shown(card.settings[name]) for name in SHOWN_SETTINGS if name in card.settings}
    found = {
        "base": ", revision ".join(part for part in (public_name(card.base_model), revision) if part),
        **{name.replace("_", " "): text for name, text in settings.items()},
        "seed": "" if card.seed is None else str(card.seed),
        "made": card.created[:10],
        "with": ", ".join(f"{name} {version}" for name, version in card.versions.items()),
        "recommended k": f"{strength.recommended:g} for more, {strength.negative:g} for less" if strength else "",
        "tested k": f"{strength.low:g} to {strength.high:g}" if strength else "",
    }
    return {name: text for name, text in found.items() if text}


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
