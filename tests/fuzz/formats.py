"""The formats that are read, each with a seed made by a tiny model, its mutations, and what must hold after reading.

A format is a function of a source of chance and a fresh folder. It writes one changed input there and returns the call
that reads it. The call ends in a `SteerError`, or returns; where there is a reference, such as PEFT's own reading of
the same files, the numbers must be the reference's.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import random
import shutil
import struct
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from mutations import ODD, YAML_ENDS, mutate_bytes, mutate_json, mutate_json_file, mutate_lines, to_json
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from conftest import random_vector, tiny_lm
from test_gguf import write_gguf
from weightsteer.behavior import Behavior, shipped_file, sides_of
from weightsteer.checkpoints.checkpoint import stored_tensors
from weightsteer.cli.options import numbers, recommended_k, shown_strengths
from weightsteer.cli.run import report
from weightsteer.data_building.lint import lint_sides
from weightsteer.data_building.sampling import cut_answers, unusable_verdicts
from weightsteer.evaluation.compare import compare_at_loss
from weightsteer.evaluation.tasks import TaskSpec, load_task
from weightsteer.example_files.load import load_examples, load_pairs
from weightsteer.export.merge import MergeSettings, export_merged
from weightsteer.judges.endpoint import Endpoint
from weightsteer.lm import LM
from weightsteer.monitor import Alert
from weightsteer.monitor.checkpoints import read_checkpoints
from weightsteer.progress import silent
from weightsteer.run_card import RunCard
from weightsteer.runs.pipeline import Run
from weightsteer.runs.recipe import Recipe
from weightsteer.steering.activations import ActivationVector
from weightsteer.vectors.delta import to_dense
from weightsteer.vectors.difference import task_vector
from weightsteer.vectors.expression import combine
from weightsteer.vectors.parameter_names import layer_numbers
from weightsteer.vectors.weight_vector import WeightVector

Call = Callable[[], object]
FORMER = Path(__file__).parents[1] / "data" / "former_run" / "former"
BASE = FORMER.with_name("former-model")
ADAPTER, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class SilentError(AssertionError):
    """Another result without an error."""


@contextlib.contextmanager
def mute(name: str) -> Any:
    yield silent


def copy_of(source: Path, folder: Path, name: str = "in") -> Path:
    shutil.copytree(source, folder / name)
    return folder / name


def dense(vector: WeightVector) -> dict[str, Tensor]:
    return {name: to_dense(vector.deltas[name]) for name in vector.deltas}


def require_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    for name in found.keys() | wanted.keys():
        one, other = found.get(name), wanted.get(name)
        one = torch.zeros_like(other) if one is None and other is not None else one
        other = torch.zeros_like(one) if other is None and one is not None else other
        assert one is not None
        assert other is not None
        scale = max(1.0, float(other.abs().max()) if other.numel() else 0.0)
        if one.shape != other.shape or not torch.allclose(one, other, atol=1e-4 * scale, rtol=1e-3):
            raise SilentError(f"{name} differs from the reference")
        if not torch.isfinite(one).all():
            raise SilentError(f"{name} is not finite")


def change_in_peft(folder: Path) -> dict[str, Tensor] | None:
    """What PEFT's own merge adds to each parameter; None where PEFT refuses the adapter."""
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            after = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
        return {n: p.detach() - before[n] for n, p in after.named_parameters() if n in before}
    except Exception:
        return None
    finally:
        logging.disable(logging.NOTSET)


def adapter_config(rng: random.Random, folder: Path) -> Call:
    """PEFT's config beside its tensors; the reference is PEFT."""
    made = copy_of(FORMER / "plus", folder)
    (made / ADAPTER).write_bytes(mutate_json_file(rng, (made / ADAPTER).read_bytes()))

    def call() -> None:
        found = dense(task_vector(made))
        wanted = change_in_peft(made)
        if wanted is not None:
            require_equal(found, {name: change for name, change in wanted.items() if change.any()})

    return call


def safetensors_header(rng: random.Random, folder: Path) -> Call:
    """An adapter's tensors; the reference is safetensors' own reader."""
    made = copy_of(FORMER / "plus", folder)
    raw = (made / WEIGHTS).read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    if rng.random() < 0.6:
        header = to_json(rng, mutate_json(rng, json.loads(raw[8 : 8 + size])))
        raw = struct.pack("<Q", len(header)) + header + raw[8 + size :]
    else:
        raw = mutate_bytes(rng, raw, until=8 + size if rng.random() < 0.8 else None)
    (made / WEIGHTS).write_bytes(raw)

    def call() -> None:
        found = dense(task_vector(made))
        plain, scale = load_file(made / WEIGHTS), 2.0  # lora_alpha 4, r 2
        for name, change in found.items():
            key = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{key}.lora_A.weight" in plain:
                product = scale * plain[f"{key}.lora_B.weight"].float() @ plain[f"{key}.lora_A.weight"].float()
                require_equal({name: change}, {name: product})

    return call


@cache
def seeds() -> Path:
    """What is made once for all inputs: a sharded checkpoint, a vector of its own, a GGUF file."""
    import tempfile

    place = Path(tempfile.mkdtemp(prefix="fuzz-seeds-"))
    lm = tiny_lm()
    lm.model.save_pretrained(place / "base", max_shard_size="40KB")
    lm.tokenizer.save_pretrained(place / "base")
    random_vector(lm).save(place / "vector")
    write_gguf(place / "model.gguf")
    trained = task_vector(FORMER / "plus")
    read_checkpoints({1: FORMER / "plus"}, {"w": trained}, out=place / "monitor")
    return place


@cache
def merged_reference() -> dict[str, Tensor]:
    return _merge(seeds() / "base", seeds() / "merged")


def _merge(base: Path, out: Path) -> dict[str, Tensor]:
    settings = MergeSettings(workers=1, rounding="nearest")
    export_merged(WeightVector.load(seeds() / "vector"), base, out, k=1.0, settings=settings)
    return {name: tensor.read().float() for name, tensor in stored_tensors(out).items()}


def checkpoint_index(rng: random.Random, folder: Path) -> Call:
    """A sharded base's index, in a merge; the reference is the merge with the index as it was."""
    base = copy_of(seeds() / "base", folder)
    path = base / "model.safetensors.index.json"
    path.write_bytes(mutate_json_file(rng, path.read_bytes()))
    return lambda: require_equal(_merge(base, folder / "out"), merged_reference())


def merge_config(rng: random.Random, folder: Path) -> Call:
    """A base's config.json, in a merge."""
    base = copy_of(seeds() / "base", folder)
    (base / "config.json").write_bytes(mutate_json_file(rng, (base / "config.json").read_bytes()))
    return lambda: _merge(base, folder / "out")


def model_files(rng: random.Random, folder: Path) -> Call:
    """A base's config, tokenizer and generation config, loaded and made to speak."""
    base = copy_of(seeds() / "base", folder)
    name = rng.choice(
        ["config.json", "config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json"]
    )
    (base / name).write_bytes(mutate_json_file(rng, (base / name).read_bytes()))

    def call() -> None:
        lm = LM.load(base, device="cpu")
        lm.generate(["hi there"], max_new_tokens=2)

    return call


def gguf_file(rng: random.Random, folder: Path) -> Call:
    """A GGUF file's head and tensors."""
    raw = (seeds() / "model.gguf").read_bytes()
    path = folder / "model.gguf"
    path.write_bytes(mutate_bytes(rng, raw, until=9000 if rng.random() < 0.8 else None))

    def call() -> None:
        lm = LM.load(path, device="cpu")
        lm.generate(["hi"], max_new_tokens=1)

    return call


def card(rng: random.Random, folder: Path) -> Call:
    """A vector's card, and all that reads it."""
    made = copy_of(FORMER / "vector", folder)
    path = made / "weightsteer.json"
    fields = json.loads(path.read_text())
    fields["strength"] = {"recommended": 2.0, "negative": -2.0, "low": -4.0, "high": 4.0, "budget": {"prose/nll": 0.1}}
    path.write_bytes(mutate_json_file(rng, json.dumps(fields).encode()))

    def call() -> None:
        from weightsteer.cli.inspect import show
        from weightsteer.vectors.expression import derived_card

        show(made)
        vector = WeightVector.load(made)
        vector.cosine(WeightVector.load(FORMER / "vector"))
        vector.export_peft(
            folder / "export",
            k=recommended_k(vector) if vector.card.strength and vector.card.strength.recommended else 1.0,
        )
        derived_card(vector.card, "v", {"v": vector}).save(folder)
        assert all(abs(k) < 1e39 for k in shown_strengths(vector))

    return call


def recipe(rng: random.Random, folder: Path) -> Call:
    """A recipe, to where a run is claimed; a second start of the same must find its own."""
    text, kind = RECIPE, rng.random()
    if kind < 0.65:
        raw = to_json(rng, mutate_json(rng, yaml.safe_load(text)))
    elif kind < 0.8:
        raw = mutate_bytes(rng, text.encode())
    else:
        raw = (text + rng.choice(YAML_ENDS)).encode()
    path = folder / "recipe.yaml"
    path.write_bytes(raw)

    def call() -> None:
        for _ in range(2):
            Run(Recipe.load(path), folder / "run", show=mute)

    return call


RECIPE = """
name: tiny
model: tiny
device: cpu
data: {pairs: sycophancy, limit: 4}
train: {rank: 2, alpha: 4, learning_rates: [1.0e-2], max_steps: 4}
train_of: {bias-only: {learning_rates: [0.1]}}
tasks:
- {task: preference, limit: 2}
- {task: false_beliefs, limit: 2, name: beliefs}
- {task: facts, limit: 2}
- {task: prose, limit: 2}
judge: {model: m, url: "http://localhost:1/v1", concurrency: 2}
repair_target: {data: ["gloomy:negative"], limit: 4, desired_examples: 2}
sweep:
  methods: {contrastive: null, tau+: [1.0], activation: [1.0], bias-only: [1.0], joint training: [1.0]}
  variants: {heavy: positive - 1.5*negative}
  fractions: [0.5, 1.0]
  sides: [-1, 1]
  loss_increase: 0.2
budget: {facts/accuracy: 0.1, prose/nll: 1.0}
plot: [preference/margin]
samples: {count: 1, max_new_tokens: 4}
"""

RUN_FILES = (
    *("cells.jsonl", "cells.jsonl", "rows.jsonl", "rows.jsonl", "costs.jsonl", "samples.jsonl", "strengths.json"),
    *("layer.json", "weightsteer.json", "recipe.yaml", "vector/weightsteer.json", "plus/weightsteer.json"),
)


def run_files(rng: random.Random, folder: Path) -> Call:
    """A finished run's own files, in `compare` and `report`."""
    made, name = copy_of(FORMER, folder), rng.choice(RUN_FILES)
    mutate = mutate_lines if name.endswith("l") and not name.endswith("yaml") else mutate_json_file
    mutate = mutate_bytes if name.endswith("yaml") else mutate
    (made / name).write_bytes(mutate(rng, (made / name).read_bytes()))

    def call() -> None:
        compare_at_loss([made], ("preference", "margin"), draws=5)
        report(made)

    return call


def data_files(rng: random.Random, folder: Path) -> Call:
    """Pairs, examples and trait files."""
    kind = rng.choice(["pairs", "examples", "messages", "trait"])
    path = folder / f"data.{'json' if kind == 'trait' else 'jsonl'}"
    if kind == "trait":
        source = shipped_file("sycophancy", "behavior.json")
        assert source is not None
        path.write_bytes(mutate_json_file(rng, source.read_bytes()))

        def call() -> None:
            Behavior.load(path).save(folder / "again.json")
            if Behavior.load(folder / "again.json") != Behavior.load(path):
                raise SilentError("the behaviour is another after it was saved")

        return call
    turns = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]
    rows: dict[str, list[dict[str, Any]]] = {
        "pairs": [{"prompt": f"p {i}", "positive": "yes", "negative": "no", "topic": "t"} for i in range(5)],
        "examples": [{"prompt": f"p {i}", "answer": "yes"} for i in range(5)],
        "messages": [{"messages": turns} for _ in range(5)],
    }
    path.write_bytes(mutate_lines(rng, b"".join(json.dumps(row).encode() + b"\n" for row in rows[kind])))
    if kind == "pairs":
        return lambda: lint_sides(*sides_of(load_pairs(path)))
    return lambda: lint_sides(load_examples(path), load_examples(path))


TASKS = {
    "facts": "facts.jsonl",
    "false_beliefs": "false_beliefs.jsonl",
    "prose": "prose.jsonl",
    "choices": "scenarios.jsonl",
}


def task_items(rng: random.Random, folder: Path) -> Call:
    """The items of a task, measured."""
    import weightsteer

    task = rng.choice(list(TASKS))
    source = Path(weightsteer.__file__).parent / "data" / "tasks" / TASKS[task]
    path = folder / "items.jsonl"
    path.write_bytes(mutate_lines(rng, b"\n".join(source.read_bytes().splitlines()[:6]) + b"\n"))

    def call() -> None:
        made = load_task(TaskSpec(task, str(path), 2))
        if path.stat().st_size < 4000:  # thousands of letters take a model its time
            made.measure(_lm())

    return call


@cache
def _lm() -> LM:
    return tiny_lm()


def kept_rows(rng: random.Random, folder: Path) -> Call:
    """Files that grow while something runs: readings, a judge's cache, sampled answers."""
    kind = rng.choice(["readings", "judge", "answers"])
    if kind == "readings":
        out = copy_of(seeds() / "monitor", folder)
        path = out / "readings.jsonl"
        path.write_bytes(mutate_lines(rng, path.read_bytes()))
        trained = task_vector(FORMER / "plus")
        return lambda: read_checkpoints({1: FORMER / "plus"}, {"w": trained}, out=out)
    if kind == "judge":
        path = folder / "judge.jsonl"
        path.write_bytes(mutate_lines(rng, b'{"key": "a", "reply": "75"}\n{"key": "b", "reply": "3"}\n'))
        return lambda: Endpoint("http://localhost:1/v1", "m", cache=path)._cached()
    answers = [
        {"prompt": "p", "answer": "a", "score": 80.0},
        {"prompt": "q", "answer": "", "score": None, "dropped": True},
    ]
    row = {"part": "positive 0 0", "side": "positive", "answers": answers}
    (folder / "answers.jsonl").write_bytes(mutate_lines(rng, json.dumps(row).encode() + b"\n"))
    return lambda: (unusable_verdicts(folder), cut_answers(folder))


def tensors_of_ours(rng: random.Random, folder: Path) -> Call:
    """Activations, and dense deltas with their layouts."""
    if rng.random() < 0.5:
        made = copy_of(FORMER / "activations", folder)
        path = made / "activations.safetensors"
        path.write_bytes(_header_changed(rng, path.read_bytes()))
        return lambda: ActivationVector.load(made)
    made = folder / "dense"
    deltas = {"model.layers.0.mlp.down_proj.weight": torch.ones(4, 3), "model.norm.weight": torch.ones(4)}
    WeightVector(deltas, RunCard("vector")).save(made)
    path = made / "delta.safetensors"
    path.write_bytes(_header_changed(rng, path.read_bytes()))

    def call() -> None:
        vector = WeightVector.load(made)
        vector.norm()

    return call


def _header_changed(rng: random.Random, raw: bytes) -> bytes:
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    if rng.random() < 0.3:
        header.setdefault("__metadata__", {})["layouts"] = rng.choice(
            ["[]", "{", '{"a": "linear"}', '{"model.norm.weight": "x"}', '{"model.norm.weight": 1}', "[" * 9999]
        )
    else:
        header = mutate_json(rng, header)
    changed = to_json(rng, header)
    return struct.pack("<Q", len(changed)) + changed + raw[8 + size :]


PIECES = (
    *("w", "o", "w", "+", "-", "*", "/", "(", ")", "0.5", "2", "1e308", "1e400", "-1", "0", "**", "%", "filter(", ","),
    *("truncate(", "boost_subspace(", "scale_by_depth(", "project_out(", "layers=", '"0-1"', 'modules="mlp"', "rank="),
    *(
        "energy=",
        "beta=",
        "alpha=",
        "None",
        "True",
        "...",
        "__import__",
        ".norm()",
        "[0]",
        '"²"',
        "lambda:",
        "\n",
        "\\",
    ),
    *(
        "9" * 400,
        "9" * 5000,
        "1j",
        'f"{w}"',
        "not",
        ":=",
        "é",
        "\0",
        '"0-99999999999"',
        "(" * 300,
        "-" * 3000,
        "w+" * 900,
    ),
)
NUMBERS = (
    "z=4",
    "-2,0,2",
    "0-1,5",
    "z=nan",
    "1e308",
    "1e39",
    "nan",
    "inf",
    "0x10",
    "1_0",
    "١",
    "²",
    ",",
    "1,,2",
    "9-2",
    "",
)


def texts(rng: random.Random, folder: Path) -> Call:
    """What is typed: expressions, lists of k, layers, alerts."""
    kind = rng.choice(["expression"] * 3 + ["layers", "k", "alert"])
    if kind == "expression":
        text = "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 12)))
        vector = WeightVector.load(FORMER / "vector")

        def call() -> None:
            found = combine(text, {"w": vector, "o": vector * 0.5})
            if not abs(found.norm()) < float("inf"):
                raise SilentError(f"{text!r} gives a vector that is not finite")

        return call
    text = rng.choice([*NUMBERS, str(rng.choice(ODD[:17])), "0-99999999999", "9" * 400])
    text += rng.choice(["", "", " ", ",", "\0", "-5"])
    readers: dict[str, Callable[[str], object]] = {"layers": layer_numbers, "k": numbers, "alert": Alert.parse}
    return lambda: readers[kind](text)


FORMATS: Mapping[str, Callable[[random.Random, Path], Call]] = {
    made.__name__: made
    for made in (
        adapter_config,
        safetensors_header,
        checkpoint_index,
        merge_config,
        model_files,
        gguf_file,
        card,
        recipe,
        run_files,
        data_files,
        task_items,
        kept_rows,
        tensors_of_ours,
        texts,
    )
}
