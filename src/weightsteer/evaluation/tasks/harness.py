"""Capability measured broadly: any task of lm-evaluation-harness, run in process on the steered model."""

from __future__ import annotations

import logging
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from functools import cache, partial
from importlib.util import find_spec
from json import dumps
from numbers import Real
from pathlib import Path
from random import Random
from threading import Lock
from typing import Any, ClassVar

from ...chat_template import is_plain
from ...errors import SteerError, first_line
from ...files import digest
from ...language_model import LanguageModel
from ...lm import LM
from ...progress import Progress, silent
from ..results import SPLITS
from ..task_spec import TaskSpec
from .data import task_file
from .task import ItemTask, TaskKind, Values

INSTALL = "pip install 'weightsteer[harness]'"
SHOTS_SEED = 1234  # the harness's own
PART = 32  # batches between two words of progress
# Of a reply's settings, those that mean the same to a server.
GREEDY_SETTINGS = {
    *("until", "do_sample", "temperature"),
    *("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"),
}
REQUESTS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
RENAMED = {"perplexity": "loglikelihood"}  # what the harness keeps of an item under that name

_ONE = Lock()  # the harness keeps requests in its task objects, and what `_quiet` changes is everybody's


@dataclass(frozen=True)
class Document:
    """One document of a task of the harness, by its number there."""

    task: str
    number: int
    sha256: str


@dataclass(frozen=True)
class HarnessTask(ItemTask):
    """Documents of one task of lm-evaluation-harness, or of a group of them.

    Asked in the model's chat template; a model without one gets plain text, as is usual in the
    harness. The few-shot examples, where a task has them, are the same for all documents, so that a
    document is asked alike in every selection. White space at the end of the template counts as the
    answer's first token, as the harness has it. Metrics: those that the harness notes for each
    document as a number (acc, acc_norm, exact_match); their mean is the harness's figure where that
    is a mean. Where a task filters replies in several ways, metrics are named "metric,filter".
    """

    items: tuple[Document, ...]
    tasks: Mapping[str, Any] = field(default_factory=dict)  # the harness's name -> its task object
    settings: str = ""  # hash of the tasks' configurations
    is_recorded: ClassVar[bool] = False  # the harness renders and reads by itself

    @property
    def needs_weights(self) -> bool:
        """See `Task.needs_weights`: only where replies are to be written otherwise than greedily, as by beams."""
        return not all(is_greedy(task) for task in self.tasks.values())

    @property
    def sha256(self) -> str:
        """See `Task.sha256`."""
        return digest([self.name, self.settings, [asdict(item) for item in self.items], self.splits])

    def ask(self, lm: LanguageModel, *, batch_size: int = 8, progress: Progress = silent) -> Values:
        """See `Task.ask`.

        Raises:
            SteerError: the model's template refuses the system prompt, or no metric has a number for each document.
        """
        numbers: dict[str, list[int]] = {}
        for item in sorted(self.items, key=lambda item: item.number):  # the order that the harness counts in
            numbers.setdefault(item.task, []).append(item.number)
        found = _measure(lm, {name: self.tasks[name] for name in numbers}, numbers, batch_size, progress)
        metrics = list(dict.fromkeys(metric for values in found.values() for metric in values))
        if not metrics:
            raise SteerError(f"task {self.name}: no metric is a number for each document; choose another task")
        return {metric: [found[item.task, item.number].get(metric) for item in self.items] for metric in metrics}


def load_harness(spec: TaskSpec) -> HarnessTask:
    """A task of lm-evaluation-harness: its name there, a YAML file of the user's, or None for the shipped facts.

    A YAML file is code: it names functions, and its templates run outside of a sandbox. So it is opened only if the
    user, and not the recipe, trusts it by name (`spec.trust_code`); that is for what it includes in its folder too.
    Data files that a YAML file names are looked for in its folder. In a group the tasks take turns,
    so that a `limit` takes of each, and both splits hold half of each: a document's split hangs on its
    number in its task. tinyMMLU is shipped too, since the harness's needs a package that
    is not to be had from the index; it is the same questions, and the plain mean.

    Raises:
        SteerError: the harness is not installed, a file is not trusted, it knows no such task, or the task's data
            cannot be had.
    """
    if find_spec("lm_eval") is None:
        raise SteerError(f"task harness: needs lm-evaluation-harness: run `{INSTALL}`")
    with _quiet():
        tasks = _load(spec.data, spec.trust_code)
        for name, task in tasks.items():
            _prepare(name, task, spec.max_new_tokens)
        documents = [
            Document(name, number, digest(document))
            for name, task in tasks.items()
            for number, document in enumerate(task.eval_docs)
        ]
        settings = digest({name: _settings(task) for name, task in tasks.items()})
    items = tuple(sorted(documents, key=lambda document: document.number))
    splits = tuple(SPLITS[item.number % 2] for item in items)
    return HarnessTask("harness", items, splits, tasks=tasks, settings=settings)


def _load(data: str | None, trust_code: Sequence[str]) -> dict[str, Any]:
    """The harness's task objects by name, from a YAML file or by a name that the harness knows."""
    name = data or "harness_facts"
    if Path(name).suffix.lower() in (".yaml", ".yml"):
        _require_trust(Path(name), trust_code)
        return _load_file(Path(name))
    if Path(name).name != name:
        raise SteerError(f"task harness: {name}: expected a task's YAML file, or a name that the harness knows")
    shipped = task_file(f"{name}.yaml", None)
    return _load_file(shipped) if shipped.is_file() else _load_name(name)


def _require_trust(path: Path, trust_code: Sequence[str]) -> None:
    """Raise unless the user trusts this very file."""
    if path.exists() and path.resolve() not in [Path(name).resolve() for name in trust_code]:
        raise SteerError(
            f"task harness: {path}: a task file of lm-evaluation-harness can run any code; read it, and if you trust "
            f"it, say so with --trust-code {path}"
        )


def _load_file(path: Path) -> dict[str, Any]:
    """The task or group of a YAML file; other files of its folder may be parts of it."""
    from lm_eval.tasks import TaskManager

    if not path.is_file():
        raise SteerError(
            f"task harness: {path}: no such file; expected a task's YAML, or a name that the harness knows"
        )
    try:
        with chdir(path.resolve().parent):  # where the data files that it names are looked for
            manager = TaskManager(include_path=".", include_defaults=False)
            index = manager.task_index.items()
            name = next((name for name, entry in index if entry.yaml_path == Path(path.name)), path.name)
            return dict(manager.load([name])["tasks"])  # by its name: a path to a group is too much for the harness
    except Exception as error:  # a task's own code and the readers of its data raise whatever they like
        raise SteerError(
            f"task harness: {path}: cannot be loaded ({type(error).__name__}: {first_line(error)}); "
            "check the file and the data that it names "
            "(on the Hugging Face hub: the network and HF_HUB_OFFLINE)"
        ) from None


def _load_name(name: str) -> dict[str, Any]:
    """A task or group that comes with the harness; its data are fetched."""
    manager = known_tasks()
    if name not in manager.all_tasks:
        near = ", ".join(get_close_matches(name, manager.all_tasks)) or "none"
        raise SteerError(f"task harness: unknown task {name!r}; similar names: {near}; or name a task's YAML file")
    try:
        return dict(manager.load([name])["tasks"])
    except Exception as error:  # as above
        raise SteerError(
            f"task harness: {name}: cannot be loaded ({type(error).__name__}: {first_line(error)}); "
            "its data come from the Hugging Face hub: "
            "check the network and HF_HUB_OFFLINE, or name a task's YAML file with local data"
        ) from None


@cache
def known_tasks() -> Any:
    """The harness's own tasks; its thousands of files are read once."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _prepare(name: str, task: Any, max_new_tokens: int | None) -> None:
    """Set what the harness's command line would set, and what measuring in selections needs."""
    if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
        raise SteerError(
            f"task harness: {name}: runs code that the model writes, or needs images or sound; not supported"
        )
    if task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", 0)
    if max_new_tokens is not None and task.get_config("output_type") == "generate_until":
        task.set_config("generation_kwargs", {"max_gen_toks": max_new_tokens}, update=True)
    task.fewshot_rnd = _SameDraw(SHOTS_SEED)
    if hasattr(task, "sampler"):
        task.sampler.rnd = task.fewshot_rnd
    # Its totals are not used, and some need all documents, or packages of their own.
    task.aggregation = lambda: defaultdict(lambda: len)


class _SameDraw(Random):
    """Draws the same sample each time: a document's few-shot examples do not hang on the documents before it."""

    def sample(self, population: Sequence[Any], k: int, *, counts: Any = None) -> list[Any]:
        return Random(SHOTS_SEED).sample(population, k, counts=counts)


def _settings(task: Any) -> str:
    """A task's configuration and few-shot examples as text, without paths and memory addresses."""
    kept = {key: value for key, value in task.dump_config().items() if key not in ("metadata", "dataset_kwargs")}
    shots = task.get_config("num_fewshot")
    kept["shots"] = task.sampler.sample(shots) if shots and hasattr(task, "sampler") else []
    return re.sub(r" at 0x[0-9a-f]+", "", dumps(kept, default=str, sort_keys=True))


def is_greedy(task: Any) -> bool:
    """Whether a task's replies, if it asks for any, are to be the likeliest tokens."""
    settings: Mapping[str, Any] = task.get_config("generation_kwargs") or {}
    sampled = bool(settings.get("do_sample")) and bool(settings.get("temperature", 1.0))
    return task.get_config("output_type") != "generate_until" or (settings.keys() <= GREEDY_SETTINGS and not sampled)


def _measure(
    asked: LanguageModel,
    tasks: Mapping[str, Any],
    numbers: Mapping[str, list[int]],
    batch_size: int,
    progress: Progress,
) -> dict[tuple[str, int], dict[str, float]]:
    """(task, document) -> metric -> value, of just the documents that are named."""
    from lm_eval.evaluator import evaluate

    from ..served_harness import ByTokens, served_for_harness

    assert isinstance(asked, LM | ByTokens)
    lm = asked if isinstance(asked, LM) else asked.local
    in_template = not is_plain(lm.tokenizer)
    if in_template and lm.system_prompt is not None:
        _require_system_prompt(lm)
    with _ONE, _quiet():
        found = evaluate(
            lm=_wrap(asked, batch_size, progress) if isinstance(asked, LM) else served_for_harness(asked, progress),
            task_dict={"tasks": dict(tasks)},
            samples=dict(numbers),
            bootstrap_iters=0,
            system_instruction=lm.system_prompt,
            apply_chat_template=in_template,
            fewshot_as_multiturn=in_template,
        )
    values: dict[tuple[str, int], dict[str, float]] = defaultdict(dict)
    for name, entries in found["samples"].items():
        filters = {entry["filter"] for entry in entries}
        for entry in entries:
            suffix = f",{entry['filter']}" if len(filters) > 1 else ""
            values[name, entry["doc_id"]] |= {f"{key}{suffix}": value for key, value in _numbers(entry).items()}
    return values


def _numbers(entry: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of one document that are numbers."""
    found = {RENAMED.get(metric, metric): entry[metric] for metric in entry["metrics"]}
    return {metric: float(value) for metric, value in found.items() if isinstance(value, Real) and math.isfinite(value)}


def _require_system_prompt(lm: LM) -> None:
    """Raise where the harness would leave the system prompt out without a word."""
    if not lm.system_prompt:
        raise SteerError("task harness: the harness cannot ask for an empty system prompt; give one, or none")
    if not lm.chat_template.has_system_role:
        raise SteerError(
            f"task harness: {lm.name}'s chat template has no system role, and the harness does not put a system prompt "
            "elsewhere; give none"
        )


def _wrap(lm: LM, batch_size: int, progress: Progress) -> Any:
    """The model as the harness takes it; vectors that are applied to it stay applied."""
    from lm_eval.models.huggingface import HFLM

    model = HFLM(
        pretrained=lm.model,
        tokenizer=lm.tokenizer,
        backend="causal",
        batch_size=batch_size,
        chat_template_args=dict(lm.chat_template_kwargs),
    )
    for kind in REQUESTS:
        setattr(model, kind, _in_parts(partial(getattr(model, kind), disable_tqdm=True), PART * batch_size, progress))
    return model


def _in_parts(answer: Callable[..., list[Any]], size: int, progress: Progress) -> Callable[[Sequence[Any]], list[Any]]:
    """Answer requests part by part, so that we hear how far it has come."""

    def answered(requests: Sequence[Any]) -> list[Any]:
        replies: list[Any] = []
        for start in range(0, len(requests), size):
            replies += answer(list(requests[start : start + size]))
            progress(len(replies), len(requests))
        return replies

    return answered


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's log and its bars out of ours; for the bar over prompts it has no switch."""
    import datasets
    from lm_eval.api import task as prompts

    log, bar, bars = logging.getLogger("lm_eval"), prompts.tqdm, datasets.are_progress_bars_disabled()
    level = log.level
    log.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    prompts.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        log.setLevel(level)
        prompts.tqdm = bar
        if not bars:
            datasets.enable_progress_bars()


TASKS = {"harness": TaskKind(load_harness, (), generates=True)}
