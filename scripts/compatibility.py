"""Write docs/compatibility.md: what is read, steered, merged and scored, against transformers' and PEFT's own results.

    python scripts/compatibility.py

Takes about five minutes on two cores and needs no network; the models are the tiny ones of the tests.
"""

from __future__ import annotations

import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
warnings.simplefilter("ignore")

import torch  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

import architectures  # noqa: E402
import chat_templates  # noqa: E402
import test_adapter_sources as adapters  # noqa: E402
import test_architectures as steering  # noqa: E402
import test_chat_template as templates  # noqa: E402
import test_example_files as files  # noqa: E402
import test_generation as scoring  # noqa: E402
from weightsteer.behavior import ContrastPair, Example  # noqa: E402
from weightsteer.errors import SteerError, first_line  # noqa: E402
from weightsteer.example_files.load import load_examples, load_pairs  # noqa: E402
from weightsteer.export.merge import export_merged  # noqa: E402
from weightsteer.files import write_text  # noqa: E402
from weightsteer.run_card import RunCard  # noqa: E402
from weightsteer.scoring import score_choices  # noqa: E402
from weightsteer.training.sft import encode  # noqa: E402
from weightsteer.vectors.delta import to_dense  # noqa: E402
from weightsteer.vectors.difference import subtract_finetunes, task_vector  # noqa: E402
from weightsteer.vectors.weight_vector import WeightVector  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
STRENGTH = 1.5
NOT_TRIED = "-"


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference, in units of the largest expected value."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-12))


@dataclass(frozen=True)
class Row:
    """One line of a table; `worst` is what its counts are made of."""

    cells: tuple[str, ...]
    right: bool


def architecture_rows() -> Iterator[Row]:
    """Every family: a change of all parameters, read from checkpoints, steered in memory, merged."""
    for family in (*architectures.FAMILIES, *architectures.VISION):
        print(family, file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            errors = [_error(check, family, Path(folder)) for check in (_read, _steered, _merged)]
        shown = tuple(NOT_TRIED if e is None else f"{e:.0e}" for e in errors)
        right = all(e is not None and e < bound for e, bound in zip(errors, (1e-6, 1e-5, 1e-5), strict=True))
        yield Row((family, *shown), right)


def _error(check: Callable[[str, Path], float], family: str, folder: Path) -> float | None:
    try:
        return check(family, folder)
    except (SteerError, RuntimeError, TypeError, ValueError) as error:
        print(f"  {check.__name__}: {type(error).__name__}: {first_line(error)[:150]}", file=sys.stderr)
        return None


def _changed(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    base, tuned = architectures.tiny(family), architectures.tiny(family)
    with torch.no_grad():
        for name, change in steering.dense_changes(base).items():
            tuned.get_parameter(name).add_(to_dense(change))
    return base, tuned


def _read(family: str, folder: Path) -> float:
    """theta_ft - theta_pre from two checkpoints, against the models' own parameters."""
    base, tuned = _changed(family)
    base.save_pretrained(folder / "base")
    tuned.save_pretrained(folder / "tuned")
    tau = task_vector(folder / "tuned", base=folder / "base")
    expected = {name: p.detach() - base.get_parameter(name).detach() for name, p in tuned.named_parameters()}
    if set(tau.deltas) != set(expected):
        return float("inf")
    return max(relative(to_dense(tau.deltas[name]), change) for name, change in expected.items())


def _steered(family: str, folder: Path) -> float:
    """Logits with k w added in memory, against a model whose parameters were changed."""
    model = architectures.tiny(family)
    deltas = steering.dense_changes(model)
    with WeightVector(deltas, RunCard("vector")).applied(model, STRENGTH):
        found = steering.logits(model)
    return relative(found, steering.shifted(family, deltas, STRENGTH))


def _merged(family: str, folder: Path) -> float:
    """Logits of the merged checkpoint, loaded by transformers, against a model whose parameters were changed."""
    tau = task_vector(folder / "tuned", base=folder / "base")
    export_merged(tau, folder / "base", folder / "merged", k=STRENGTH)
    loaded = type(architectures.tiny(family)).from_pretrained(folder / "merged").eval()
    deltas = {name: to_dense(tau.deltas[name]) for name in tau.deltas}
    return relative(steering.logits(loaded), steering.shifted(family, dict(deltas), STRENGTH))


def scoring_rows() -> Iterator[Row]:
    """Log-probabilities of answers in batches, in nats, against one plain pass for each."""
    choices = ["yes", "no it is not"]
    for kind in scoring.ARCHITECTURES:
        lm, worst = scoring.lm_of(kind), 0.0
        scored = score_choices(lm, scoring.PROMPTS, [choices] * len(scoring.PROMPTS), batch_size=3)
        for prompt, row in zip(scoring.PROMPTS, scored, strict=True):
            for answer, score in zip(choices, row, strict=True):
                exchange = lm.exchange(prompt, answer)
                ids = [*exchange.head, *exchange.answer]
                worst = max(worst, abs(score.total - scoring.direct(lm, ids, len(exchange.head))))
        yield Row((kind, f"{worst:.0e}"), worst < 1e-3)


SAVED: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA on all linear layers": ("llama", {}),
    "rsLoRA": ("llama", {"use_rslora": True}),
    "rank and alpha patterns": ("llama", {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.0.*": 5}}),
    "DoRA": ("llama", {"use_dora": True}),
    "LoRA and all biases": ("gpt2", {"bias": "all"}),
    "LoRA with a bias of its own": ("gpt2", {"lora_bias": True}),
    "LoRA on the input embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "LoRA on the head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "LoRA on Conv1D": ("gpt2", {}),
    "whole embedding and head": ("llama", SAVED),
    "tied embeddings trained as one": (
        "qwen2-tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "experts, Mixtral": ("mixtral", {}),
    "experts by target_parameters, Qwen3-MoE": ("qwen3-moe", adapters.EXPERTS),
    "experts stored transposed, gpt-oss": ("gpt-oss", adapters.EXPERTS),
    "experts stored transposed, Llama-4": ("llama4", adapters.EXPERTS),
    "experts of a hybrid, Jamba": ("jamba", {}),
    "vision-language model, Gemma 3": ("gemma3-vision", {"target_modules": r".*language_model.*(q_proj|down_proj)"}),
}


def adapter_rows() -> Iterator[Row]:
    """Every kind of adapter: the task vector against PEFT's merge minus the base, in float64."""
    for kind, (family, options) in KINDS.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            architectures.tiny(family).save_pretrained(folder / "base")
            saved = adapters.adapter(folder / "adapter", architectures.tiny(family), base=folder / "base", **options)
            tau = task_vector(saved, base=folder / "base")
            after = adapters.merged(lambda family=family: architectures.tiny(family), saved)  # type: ignore[misc]
            before = dict(architectures.tiny(family).named_parameters())
            worst = max(
                float((to_dense(tau.deltas[n]).double() - (after[n] - before[n].double())).abs().max())
                for n in tau.deltas
            )
        yield Row((kind, str(len(tau.deltas)), f"{worst:.0e}"), worst < 1e-6)


SPELLINGS: dict[str, Callable[[str], str]] = {
    "torch.compile": lambda key: f"_orig_mod.{key}",
    "DDP, DeepSpeed": lambda key: f"module.{key}",
    "FSDP": lambda key: key.replace(".mlp", "._fsdp_wrapped_module.mlp"),
    "activation checkpointing": lambda key: key.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"),
    "the adapter's name kept": lambda key: key.replace(".weight", ".default.weight"),
    "PEFT's prefix missing": lambda key: key.removeprefix("base_model.model."),
    "PEFT's prefix doubled": lambda key: f"base_model.model.{key}",
    "the model's prefix missing": lambda key: key.replace("base_model.model.model.", "base_model.model."),
    "the model's prefix doubled": lambda key: key.replace("base_model.model.model.", "base_model.model.model.model."),
    "TRL's value head": lambda key: key.replace("base_model.model.", "base_model.model.pretrained_model."),
}


def spelling_rows() -> Iterator[Row]:
    """One adapter under the keys that other tools write: the difference from itself is exactly zero."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapters.llama().save_pretrained(folder / "base")
        plain = adapters.adapter(folder / "plain", adapters.llama(), base=folder / "base")
        for number, (tool, rename) in enumerate(SPELLINGS.items()):
            norm = subtract_finetunes(plain, adapters.rewrite(plain, folder / str(number), rename)).norm()
            yield Row((tool, f"{norm:g}"), norm == 0.0)


def format_rows() -> Iterator[Row]:
    """Every format of examples and pairs in every container: the same objects come out."""
    one = [Example("Why?\nSay.", 'So, "yes";\tno.'), Example("Wie heißt das?", "日本 👍🏽")]
    forms: dict[str, tuple[list[Any], Callable[[Path], list[Any]], list[Any]]] = {}
    for form, make in files.ONE_TURN.items():
        forms[form] = ([make(str(e.prompt), e.answer) for e in one], load_examples, one)
    for form, row in files.TALKS.items():
        forms[f"{form}, several turns"] = ([row], load_examples, [Example(files.TALK, "Two.")])
    for form, row in files.PAIRS.items():
        forms[f"pairs: {form}"] = ([row], load_pairs, [ContrastPair("Q?", "Yes.", "No.")])
    for form, (rows, load, wanted) in forms.items():
        with tempfile.TemporaryDirectory() as folder:
            equal = sum(
                load(files.write(rows, Path(folder) / f"{i}", container)) == wanted
                for i, container in enumerate(files.CONTAINERS)
            )
        yield Row((form, f"{equal} of {len(files.CONTAINERS)}"), equal == len(files.CONTAINERS))


TALKS = [("Hi there?", "Yes, it is."), ("  Hi \n", " lead and trail \n"), ("日本?", "👍🏽\n\nEnd."), ("a", "b")]


def template_rows() -> Iterator[Row]:
    """Every chat template: what is trained on is the tokenised rendering of the whole conversation."""
    for name, family in chat_templates.FAMILIES.items():
        lm, same = templates.lm_of(name), 0
        for prompt, answer in TALKS:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            whole = templates.rendered(family, lm, turns)
            (row,) = encode(lm, [Example(prompt, answer)], 10_000)
            expected = lm.tokenizer(whole, add_special_tokens=False)["input_ids"]
            ids = row["input_ids"]
            same += ids == expected[: len(ids)] and (len(ids) == len(expected) or ids[-1] in lm.stops)
        yield Row((name, f"{same} of {len(TALKS)}"), same == len(TALKS))


def table(title: str, said: str, head: tuple[str, ...], rows: list[Row]) -> list[str]:
    """A section: what was compared, how many lines are right, and each of them."""
    right = sum(row.right for row in rows)
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ("---",) * len(head), *(row.cells for row in rows))]
    return [f"## {title}", "", textwrap.fill(f"{said} {right} of {len(rows)} are right.", 100), "", *lines, ""]


def page() -> str:
    """The whole page."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    return "\n".join(
        [
            "# Compatibility",
            "",
            textwrap.fill(
                f"Generated by `python scripts/compatibility.py` with {versions}. Models are tiny and random, since an "
                "error of naming, layout or scale shows on them as it would on large ones. Errors are relative to the "
                "largest value, unless the table says otherwise.",
                100,
            ),
            "",
            *table(
                "Architectures",
                "A random change of every parameter is read from two checkpoints, steered in memory, and merged and "
                "loaded again by transformers. A dash means that we refuse it or that transformers cannot do it.",
                ("architecture", "read", "steered", "merged"),
                list(architecture_rows()),
            ),
            *table(
                "Scores",
                "Answers to prompts of several lengths are scored in batches; the error is the largest difference from "
                "one plain forward pass for each, in nats. Windows, alibi, recurrent and hybrid models are among them.",
                ("architecture", "error"),
                list(scoring_rows()),
            ),
            *table(
                "Adapters",
                "Each adapter is saved by PEFT; its task vector is compared with PEFT's merge minus the base in "
                "float64 (largest absolute difference).",
                ("adapter", "parameters", "error"),
                list(adapter_rows()),
            ),
            *table(
                "Names of other tools",
                "One adapter under the keys that tools and versions write, minus itself.",
                ("keys as written by", "norm of the difference"),
                list(spelling_rows()),
            ),
            *table(
                "Data formats",
                f"Each format is written in {len(files.CONTAINERS)} containers ({', '.join(files.CONTAINERS)}), and "
                "the same examples or pairs are read.",
                ("format", "containers read alike"),
                list(format_rows()),
            ),
            *table(
                "Chat templates",
                "The tokens that are trained on, against the tokenised rendering of the whole conversation up to the "
                "token at which generation stops.",
                ("template", "conversations alike"),
                list(template_rows()),
            ),
        ]
    )


if __name__ == "__main__":
    write_text(ROOT / "docs" / "compatibility.md", page())
