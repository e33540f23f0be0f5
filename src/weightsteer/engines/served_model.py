"""`ServedModel`: a model behind a server, steered by the strengths that a request names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any

from ..chat_template import PromptLike, turns_of
from ..errors import SteerError
from ..judges.keys import NO_KEY, Key
from ..language_model import LanguageModel
from ..lm import LM
from ..progress import Progress, silent
from ..scale_check import refuse_blind_server
from ..scoring import Score, candidates_of, text_ids
from ..thinking import Reply, opens_thinking, split_thinking
from .check import Reference, require_base
from .connection import Ask, Connection, Job
from .dialects import Dialect, Scored, Wanted, Written, dialect_of
from .kinds import KEYS, Kind

HEARTBEAT = 1  # texts that are compared again after each call


@dataclass
class Session:
    """What is known of the server by now, shared by all that ask it."""

    base: dict[str, Any]  # the model that it serves, as it names it
    worst: float = 0.0  # largest difference of its base to the one here, nats per token
    followed: int = 0  # how many lost connections a comparison with all texts has followed
    rendering: Lock = field(default_factory=Lock)  # one thread at a time has the tokenizer, which keeps settings


@dataclass(frozen=True)
class ServedModel(LanguageModel):
    """A `LanguageModel` behind a server.

    Prompts are rendered and tokenised here, by `local`, and sent as token ids, so that our chat template is the only
    one; `local` needs no weights (see `tokens_of`). After every call the server is asked once more what it serves, and
    one text is compared; after a lost connection, or if it names another model, all are. What it gave before that
    is dropped with an error unless it still serves the same model: nothing is mixed.
    """

    connection: Connection
    dialect: Dialect
    kind: Kind
    local: LM
    session: Session
    reference: Reference | None = None  # what the base has to give; None: nothing is compared
    strengths: Mapping[str, float] = field(default_factory=dict, hash=False)
    looks: bool = True  # whether it asks again what is served; not while it does

    @classmethod
    def connect(
        cls,
        url: str,
        kind: Kind,
        local: LM,
        *,
        reference: Reference | None = None,
        concurrency: int = 64,
        key_env: str | None = None,
        retries: int = 12,
        timeout: float = 300.0,
    ) -> ServedModel:
        """Find out what the server serves, and compare it with the model here.

        Args:
            local: the model that it is said to serve, with or without its weights.
            reference: the log-probabilities to be found at k = 0 (see `Reference.of`); None: they are not compared.

        Raises:
            SteerError: it cannot be reached, is of another kind, serves another model, or confuses strengths.
        """
        connection = Connection(url, concurrency, key_env or KEYS.get(kind, ""), retries, timeout)
        letter = local.tokenizer("a", add_special_tokens=False)["input_ids"][-1]
        base = dialect_of(kind, "", letter).base(connection)
        dialect = dialect_of(kind, base["id"], letter)
        known = dialect.vectors(connection)
        if kind == "llama.cpp":
            key = Key.read(connection.key_env).value
            for number in range(len(known or ())):
                refuse_blind_server(connection.root, adapter=number, api_key=None if key == NO_KEY else key)
        served = cls(connection, dialect, kind, local, Session(base), reference)
        served.compare()
        return served

    @property
    def name(self) -> str:
        """The model's name here."""
        return self.local.name

    @property
    def revision(self) -> str:
        """Which state of the model it is said to be."""
        return self.local.revision

    @property
    def template_identity(self) -> dict[str, str]:
        """See `LM.template_identity`."""
        return self.local.template_identity

    @property
    def address(self) -> str:
        """The server's."""
        return self.connection.root

    def vectors(self) -> list[str] | None:
        """The vectors that the server knows; None where it looks for a name only when it is asked for it."""
        return self.dialect.vectors(self.connection)

    def steered(self, strengths: Mapping[str, float]) -> ServedModel:
        """The same model at these strengths of vectors, by the names that the server knows; {} is the base."""
        return replace(self, strengths={name: k for name, k in strengths.items() if k})

    def with_system_prompt(self, text: str | None) -> ServedModel:
        """See `LanguageModel`."""
        return replace(self, local=self.local.with_system_prompt(text))

    def chat_ids(self, prompt: PromptLike) -> list[int]:
        """See `LanguageModel`."""
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
        """See `LanguageModel`. Prompt i is sampled by `seed` + i; batches are the server's, `concurrency` at once.

        Raises:
            SteerError: a prompt that the template refuses, a server that is down, or one that serves another model now.
        """
        template, system = self.local.chat_template, self.local.system_prompt
        with self.session.rendering:
            texts = [template.prompt_text(turns_of(prompt, system)) for prompt in prompts]
            rows = [self.local.require_fitting(template.ids_of(text)) for text in texts]
        stops, stop_text = self.local.stops, template.stop_text

        ends = (stop_text,) if stop_text else ()
        asked = [
            (row, Wanted(max_new_tokens, temperature, seed + number, stops, ends)) for number, row in enumerate(rows)
        ]
        written = self.written(asked, progress)
        with self.session.rendering:
            return [self._reply(one, opens_thinking(text)) for one, text in zip(written, texts, strict=True)]

    def _reply(self, written: Written, opened: bool) -> Reply:
        """What the server wrote, without control tokens and what ends it."""
        if written.ids is not None:
            found = self.local.read_reply(written.ids, opened=opened)
            return replace(found, ended=found.ended or written.ended)
        thinking, answer = split_thinking(written.text, opened=opened)
        return Reply(answer, thinking, written.ended)

    def score_choices(
        self,
        prompts: Sequence[PromptLike],
        choices: Sequence[Sequence[str]],
        *,
        batch_size: int = 8,
        progress: Progress = silent,
    ) -> list[list[Score]]:
        """See `LanguageModel`.

        Raises:
            SteerError: as `scoring.score_choices`; a server that is down, or one that serves another model now.
        """
        if len(prompts) != len(choices):
            raise SteerError(f"score_choices: {len(prompts)} prompts but {len(choices)} lists of choices")
        with self.session.rendering:
            asked = [
                part
                for number, texts in enumerate(choices)
                for part in candidates_of(self.local, number, prompts[number], texts)
            ]
        rows = [(part, place, tail) for part in asked for place, tail in zip(part.places, part.tails, strict=True)]
        totals = self.totals([([*part.head, *tail], len(part.head)) for part, _, tail in rows], progress)
        scores = [[Score(0.0, 1)] * len(texts) for texts in choices]
        for (part, place, tail), total in zip(rows, totals, strict=True):
            scores[part.prompt][place] = Score(total, len(tail))
        return scores

    def score_texts(self, texts: Sequence[str], *, batch_size: int = 8) -> list[Score]:
        """See `LanguageModel`."""
        with self.session.rendering:
            rows = text_ids(self.local, texts)
        totals = self.totals([(row, 1) for row in rows])
        return [Score(total, len(row) - 1) for row, total in zip(rows, totals, strict=True)]

    def written(self, rows: Sequence[tuple[Sequence[int], Wanted]], progress: Progress = silent) -> list[Written]:
        """What follows each row of token ids, written as is wanted of it."""

        def job(ids: Sequence[int], wanted: Wanted) -> Job[Written]:
            async def one(ask: Ask) -> Written:
                return await self.dialect.write(ask, ids, self.strengths, wanted)

            return one

        return self._asked([job(ids, wanted) for ids, wanted in rows], progress)

    def totals(self, rows: Sequence[tuple[Sequence[int], int]], progress: Progress = silent) -> list[float]:
        """Summed log-probability of each row's ids from a place on, in nats."""
        return [found.total for found in self.scored(rows, progress, rank=False)]

    def scored(
        self, rows: Sequence[tuple[Sequence[int], int]], progress: Progress = silent, *, rank: bool = True
    ) -> list[Scored]:
        """As `totals`, and with `rank` whether the ids are the likeliest ones."""

        def job(ids: Sequence[int], start: int) -> Job[Scored]:
            async def one(ask: Ask) -> Scored:
                return await self.dialect.score(ask, ids, start, self.strengths, rank=rank)

            return one

        return self._asked([job(ids, start) for ids, start in rows], progress)

    def _asked(self, jobs: Sequence[Job[Any]], progress: Progress) -> list[Any]:
        """What the jobs give, if the server serves the same model after them as before."""
        base, followed = self.session.base, self.session.followed
        found = self.connection.all_of(jobs, check=not self.looks, progress=progress)
        if jobs and self.looks:
            try:
                self._look_again(base, followed)
            except SteerError as error:
                self.connection.give_up(error)
                raise
        return found

    def _look_again(self, before: Mapping[str, Any], followed: int) -> None:
        """Compare what is served with what was `before`; others may have looked meanwhile, and may ask at once."""
        base = self.dialect.base(self.connection)
        if base != before or len(self.connection.lost) > followed:
            if self.reference is None and base != before:
                raise SteerError(
                    f"engine at {self.address}: serves {base['id']} now and served {before['id']} before; "
                    "what it gave last is dropped; serve the first again"
                )
            self.dialect.vectors(self.connection)
            self.compare()
            self.session.base = base
        else:
            self.compare(HEARTBEAT)

    def compare(self, count: int | None = None) -> None:
        """Compare the served base with the one here, by `count` texts or all.

        Raises:
            SteerError: it is another one.
        """
        if self.reference is None:
            return
        lost = len(self.connection.lost)
        found = require_base(replace(self, strengths={}, looks=False), self.reference, count)
        self.session.worst = max(self.session.worst, found)
        if count is None:
            self.session.followed = max(self.session.followed, lost)
