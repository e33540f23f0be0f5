"""What a recipe's tasks, judges and trainings ask of a model, counted: passes, tokens, calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..batches import batches_by_length
from ..chat_template import PromptLike
from ..continuations import common_prefix
from ..evaluation.task_spec import TaskFields
from ..language_model import LanguageModel
from ..lm import LM
from ..progress import Progress, silent
from ..scoring import Score, candidates_of, text_ids
from ..thinking import Reply
from .assumed import HARNESS, UNKNOWN_HARNESS
from .passes import Reading, Step


@dataclass
class Work:
    """Passes with how often they are made, and what they come to. A pass of 0 times counts for the memory alone."""

    passes: dict[Reading | Step, float] = field(default_factory=dict)
    trained: float = 0.0  # tokens, padding not counted
    generated: float = 0.0  # at most
    scored: float = 0.0  # tokens whose log-probability is taken
    judged: float = 0.0  # calls of the judge

    def make(self, made: Reading | Step, times: float = 1) -> None:
        """So many passes more."""
        self.passes[made] = self.passes.get(made, 0.0) + times

    def add(self, other: Work, times: float = 1, *, rank: int = 0) -> None:
        """So many times the work of another, steered by a vector of that rank."""
        for made, count in other.passes.items():
            self.make(replace(made, rank=rank) if isinstance(made, Reading) else made, times * count)
        for name in ("trained", "generated", "scored", "judged"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))


@dataclass(frozen=True)
class CountingModel(LanguageModel):
    """A `LanguageModel` that notes the passes that the one in memory would make, and says nothing."""

    local: LM
    work: Work = field(default_factory=Work)

    @property
    def name(self) -> str:
        return self.local.name

    @property
    def revision(self) -> str:
        return self.local.revision

    def with_system_prompt(self, text: str | None) -> CountingModel:
        return replace(self, local=self.local.with_system_prompt(text))

    def chat_ids(self, prompt: PromptLike) -> list[int]:
        return self.local.chat_ids(prompt)

    def replies(
        self,
        prompts: Sequence[PromptLike],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 8,
        progress: Progress = silent,
    ) -> list[Reply]:
        lengths = [len(self.chat_ids(prompt)) for prompt in prompts]
        for batch in batches_by_length(lengths, batch_size):
            rows, width = len(batch), max(lengths[i] for i in batch)
            self.work.make(Reading(rows, width, 0, rows, cached=True))
            self.work.make(Reading(rows, 1, width + max_new_tokens // 2, rows), max_new_tokens - 1)
            self.work.make(Reading(rows, 1, width + max_new_tokens, rows), 0)
        self.work.generated += len(prompts) * max_new_tokens
        return [Reply("")] * len(prompts)

    def score_choices(
        self,
        prompts: Sequence[PromptLike],
        choices: Sequence[Sequence[str]],
        *,
        batch_size: int = 8,
        progress: Progress = silent,
    ) -> list[list[Score]]:
        numbered = enumerate(zip(prompts, choices, strict=True))
        asked = [
            part for number, (prompt, texts) in numbered for part in candidates_of(self.local, number, prompt, texts)
        ]
        shared = common_prefix([part.head for part in asked])
        if shared:
            self.work.make(Reading(1, shared, cached=True))
        for batch in batches_by_length([len(part.head) for part in asked], batch_size):
            parts = [asked[i] for i in batch]
            self._score([len(part.head) for part in parts], [len(t) for part in parts for t in part.tails], shared)
        return [[Score(0.0, 1)] * len(texts) for texts in choices]

    def _score(self, heads: Sequence[int], tails: Sequence[int], shared: int) -> None:
        longest = max(heads)
        self.work.make(Reading(len(heads), longest - shared, shared, len(heads), cached=True))
        if max(tails) > 1:
            self.work.make(Reading(len(tails), max(tails) - 1, longest, sum(tails) - len(tails), cached=True))
        self.work.scored += sum(tails)

    def score_texts(self, texts: Sequence[str], *, batch_size: int = 8) -> list[Score]:
        lengths = [len(ids) for ids in text_ids(self.local, texts)]
        for batch in batches_by_length(lengths, batch_size):
            scored = sum(lengths[i] - 1 for i in batch)
            self.work.make(Reading(len(batch), max(lengths[i] for i in batch), 0, scored))
            self.work.scored += scored
        return [Score(0.0, 1)] * len(texts)


@dataclass
class CountingJudge:
    """A `ChatModel` that counts its calls; `local` notes the passes of one in memory."""

    local: CountingModel | None = None
    calls: int = 0

    @property
    def name(self) -> str:
        """See `ChatModel.name`."""
        return "the plan's judge"

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int = 16, progress: Progress = silent) -> list[str]:
        """See `ChatModel.generate`."""
        self.calls += len(prompts)
        if self.local is not None:
            self.local.replies(prompts, max_new_tokens=max_new_tokens)
        return ["0"] * len(prompts)


def training_work(
    rows: Mapping[str, Sequence[Sequence[int]]],
    batches: Sequence[Sequence[int]],
    *,
    form: Step,
    evaluations: int,
    batch_size: int,
) -> Work:
    """One training run: its steps over rows of ("train", "validation"), each row (length, answer tokens).

    Args:
        batches: the places of the training rows in each pass of the trainer.
        form: what the steps have in common.
    """
    work, train = Work(), rows["train"]
    for batch in batches:
        length, answers = max(train[i][0] for i in batch), sum(train[i][1] for i in batch)
        work.make(replace(form, rows=len(batch), length=length, answers=answers))
        work.trained += sum(train[i][0] for i in batch)
    held = rows["validation"]
    for start in range(0, len(held), batch_size):
        part = held[start : start + batch_size]
        scored = sum(answers for _, answers in part)
        # the adapter is computed beside each layer here too
        width = max(length for length, _ in part)
        work.make(Reading(len(part), width, 0, scored, form.rank if form.kind == "lora" else 0), evaluations)
    return work


def harness_work(spec: TaskFields, batch_size: int) -> Work:
    """What a task of lm-evaluation-harness asks, by its known or assumed sizes."""
    known, work = HARNESS.get(spec.data or "", UNKNOWN_HARNESS), Work()
    documents = min(known.documents, spec.limit or known.documents)
    batches = documents / batch_size
    if known.reply:
        reply = spec.max_new_tokens or known.reply
        work.make(Reading(batch_size, known.prompt, 0, batch_size, cached=True), batches)
        work.make(Reading(batch_size, 1, known.prompt + reply // 2, batch_size), batches * (reply - 1))
        work.make(Reading(batch_size, 1, known.prompt + reply, batch_size), 0)
        work.generated += documents * reply
    else:
        width = known.prompt + known.candidate
        scored = known.candidates * known.candidate
        work.make(Reading(batch_size, width, 0, batch_size * known.candidate), batches * known.candidates)
        work.scored += documents * scored
    return work
