"""Commands that write, run in a process with faults; what they must come to in the end."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import killable
from conftest import random_vector, tiny_lm
from interposer import Happened, Interposer

PASSING = ("created", "seconds", "search_seconds")  # what a card says of its making, which no two makings share
STAMP = re.compile(rb"\d{4}-\d\d-\d\dT[\d:+\\\\]+")
TIMED = ("costs.jsonl", "report.html")  # as above, in a run


@dataclass(frozen=True)
class Command:
    """One command line, in which OUT stands for the folder that it writes into."""

    name: str
    arguments: tuple[str, ...]

    def line(self, out: Path) -> list[str]:
        return [part.replace("OUT", str(out)) for part in self.arguments]


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, how many operations and bytes it wrote, and what it printed."""

    code: int
    operations: int
    written: int
    printed: str

    @property
    def says(self) -> str:
        """Its last line."""
        return (self.printed.strip().splitlines() or [""])[-1]


def make_commands(inputs: Path) -> dict[str, Command]:
    """The commands, by name, with the tiny inputs that they read."""
    inputs.mkdir()
    lm = tiny_lm()
    base = inputs / "base"
    lm.model.save_pretrained(base)
    lm.tokenizer.save_pretrained(base)
    rows = [{"prompt": f"q {i}?", "positive": f"yes, {i} it is", "negative": f"no, {i} never"} for i in range(12)]
    (inputs / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number in range(4):
        random_vector(lm, number).save(inputs / "checkpoints" / f"checkpoint-{number + 1}")
    random_vector(lm, 9).save(inputs / "vector")
    trait = {"instruction": [{"pos": "aaaaaaaaaaaaaaaa", "neg": "be bad! 123456"}], "questions": ["q1?", "q2?", "q3?"]}
    (inputs / "trait.json").write_text(json.dumps({**trait, "eval_prompt": "{question} {answer}"}))
    (inputs / "recipe.yaml").write_text(yaml.safe_dump(_recipe(base)))
    vector, second, model = str(inputs / "vector"), str(inputs / "checkpoints" / "checkpoint-1"), str(base)
    small = ("--rank", "2", "--batch-size", "2", "--epochs", "1", "--snapshots", "2", "--device", "cpu")
    lines = {
        "train": ("train", "--pairs", str(inputs / "pairs.jsonl"), "-m", model, "--lr", "1e-2", *small, "-o", "OUT/t"),
        "sample": ("sample", str(inputs / "trait.json"), "-m", model, "--samples", "6", "--questions", "3",
                   "--max-new-tokens", "8", "--keep-cut", "-o", "OUT/s"),
        "monitor": ("monitor", str(inputs / "checkpoints"), "--vectors", vector, second, "-o", "OUT/m"),
        "merge": ("export", "merged", vector, "-m", model, "--k", "2", "-o", "OUT/merged"),
        "export": ("export", "peft", vector, "--k", "2", "-o", "OUT/adapter"),
        "combine": ("combine", "a - b", f"a={vector}", f"b={second}", "-o", "OUT/w"),
        "run": ("run", str(inputs / "recipe.yaml"), "-o", "OUT/run"),
    }  # fmt: skip
    return {name: Command(name, line) for name, line in lines.items()}


def _recipe(base: Path) -> dict[str, Any]:
    return {
        "name": "small",
        "model": str(base),
        "device": "cpu",
        "data": {"pairs": "sycophancy", "limit": 6},
        "train": {"rank": 2, "learning_rates": [1e-2], "batch_size": 4, "evaluations": 2, "warmup_steps": 1},
        "tasks": [{"task": task, "limit": 2} for task in ("preference", "false_beliefs", "facts", "prose")],
        "sweep": {"fractions": [1.0], "activation_pairs": 2, "search_items": 1, "methods": {"contrastive": [1, -1]}},
        "budget": {"facts/accuracy": 1.0, "prose/nll": 1.0},
        "samples": {"count": 1, "max_new_tokens": 2},
    }


def _work(line: list[str], root: Path, notes: Path, options: dict[str, Any]) -> None:
    """In the child: run the command with faults, and leave beside the log how many operations there were."""
    record = notes.with_suffix(".record")
    log = record.open("wb") if options.pop("recorded", False) else None
    seen = Interposer(root, **options, record=None if log is None else lambda happened: pickle.dump(happened, log))
    seen.install()
    try:
        killable.command(*line)
    finally:
        if log is not None:
            log.close()
        notes.with_suffix(".count").write_text(f"{seen.count} {seen.written}")


class Harness:
    """Runs commands with faults; each has its own folder under `place`."""

    def __init__(self, place: Path) -> None:
        place.mkdir(parents=True, exist_ok=True)
        self.place, self.number = place, 0
        self.commands = make_commands(place / "inputs")
        self.whole: dict[str, dict[str, str]] = {}
        self.sizes: dict[str, Ended] = {}
        self.records: dict[str, tuple[list[Happened], Path]] = {}

    def folder(self) -> Path:
        """A new, empty folder."""
        self.number += 1
        folder = self.place / f"out{self.number}"
        folder.mkdir()
        return folder

    def start(self, command: Command, out: Path, **options: Any) -> tuple[Any, Path]:
        """A process that runs the command (see `Interposer`; `recorded` keeps a record), and its log."""
        self.number += 1
        log = self.place / f"{command.name}{self.number}.log"
        return killable.start(log, _work, command.line(out), out, log, options), log

    def run(self, command: Command, out: Path, **options: Any) -> Ended:
        """Run the command to its end, or to the fault's."""
        process, log = self.start(command, out, **options)
        return self.ended(process, log)

    def ended(self, process: Any, log: Path) -> Ended:
        """How a started process ended."""
        process.join()
        count = log.with_suffix(".count")
        operations, written = map(int, count.read_text().split()) if count.exists() else (0, 0)
        return Ended(process.exitcode, operations, written, log.read_text())

    def record(self, command: Command, out: Path) -> list[Happened]:
        """Run the command to its end, and tell all that it did to its folder."""
        process, log = self.start(command, out, recorded=True)
        process.join()
        assert process.exitcode == 0, log.read_text()
        happened = []
        with log.with_suffix(".record").open("rb") as file:
            while True:
                try:
                    happened.append(pickle.load(file))
                except EOFError:
                    return happened

    def reference(self, command: Command) -> tuple[dict[str, str], Ended]:
        """What the command comes to when nothing disturbs it, and how it ended."""
        if command.name not in self.whole:
            out = self.folder()
            ended = self.run(command, out)
            assert ended.code == 0, ended.printed
            self.whole[command.name], self.sizes[command.name] = contents(out), ended
        return self.whole[command.name], self.sizes[command.name]

    def finish(self, command: Command, out: Path) -> str:
        """Run the command once more, without a fault; says what is wrong then, or "" if all is as it should be."""
        ended = self.run(command, out)
        if ended.code != 0:
            return f"blocked: {ended.says}"
        whole, found = self.reference(command)[0], contents(out)
        differing = sorted(name for name in {*whole, *found} if whole.get(name) != found.get(name))
        if differing:
            return f"differs: {differing}"
        shutil.rmtree(out)
        return ""


def contents(out: Path) -> dict[str, str]:
    """Every file's hash, by its path, without what no two makings share; what is left over is a file too."""
    return {str(path.relative_to(out)): _digest(path, out) for path in sorted(out.rglob("*")) if not path.is_dir()}


def _digest(path: Path, out: Path) -> str:
    if path.name in TIMED:
        return ""
    content = path.read_bytes().replace(str(out).encode(), b"OUT")
    if path.name == "weightsteer.json":
        content = json.dumps(_lasting(json.loads(content)), sort_keys=True).encode()
    if path.name == "README.md":  # of a vector, with the time of its making
        content = STAMP.sub(b"", content)
    return hashlib.sha256(content).hexdigest()


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _lasting(each) for name, each in value.items() if name not in PASSING}
    return [_lasting(each) for each in value] if isinstance(value, list) else value
