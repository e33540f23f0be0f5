"""A served model as lm-evaluation-harness takes one: its own rendering and reading, our requests by token ids."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from ..engines.dialects import Scored, Wanted, Written
from ..lm import LM
from ..progress import Progress, silent

BESIDE = 2  # tokens of the context that are left: a request holds the scored token too, and asks for one more

MOST_STOPS = 16  # that our own server takes; a reply is cut at the others here


@runtime_checkable
class ByTokens(Protocol):
    """A model that answers rows of token ids; see `ServedModel`."""

    @property
    def local(self) -> LM: ...
    def written(self, rows: Sequence[tuple[Sequence[int], Wanted]], progress: Progress = silent) -> list[Written]: ...
    def scored(self, rows: Sequence[tuple[Sequence[int], int]], progress: Progress = silent) -> list[Scored]: ...


class _Served(HFLM):  # type: ignore[misc]
    """The harness's model for transformers, which renders, tokenises and cuts; what it would compute is asked for."""

    def __init__(self, asked: ByTokens, progress: Progress) -> None:
        """The tokenizer is a copy, since other threads have the same one."""
        local = asked.local
        super().__init__(
            pretrained=local.model,
            tokenizer=copy.deepcopy(local.tokenizer),
            backend="causal",
            batch_size=1,
            chat_template_args=dict(local.chat_template_kwargs),
        )
        self.asked, self.progress = asked, progress

    @property
    def max_length(self) -> int:
        """The longest context, in tokens."""
        return int(super().max_length) - BESIDE

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """See the harness's `LM`."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """See the harness's `LM`; a text's windows are asked for together."""
        self.batch_size_per_gpu = max(1, len(requests))
        found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = True, override_bs: Any = None
    ) -> list[tuple[float, bool]]:
        """Sums, in nats, and whether the continuation is the likeliest; too long a context is cut from the left."""
        rows = []
        for _, context, continuation in requests:
            ids = [*context, *continuation][-(self.max_length + 1) :]
            rows.append((ids, len(ids) - len(continuation)))
        return [(found.total, found.likeliest) for found in self.asked.scored(rows, self.progress)]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """See the harness's `LM`; greedy, since a task with other settings is not asked of a server."""
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        rows, ends = [], []
        for context, settings in (request.args for request in requests):
            wanted = normalize_gen_kwargs(settings, self.max_gen_toks)
            longest = int(wanted["max_gen_toks"])
            until = [text for text in handle_stop_sequences(wanted.get("until"), eos=eos) if text]
            ids = self.tok_encode(context, left_truncate_len=self.max_length - longest)
            told = [text for text in until if text != eos][:MOST_STOPS]
            rows.append((ids, Wanted(longest, 0.0, 0, self.asked.local.stops, told)))
            ends.append(until)
        written = self.asked.written(rows, self.progress)
        return [
            postprocess_generated_text(self._text(reply), stop=until, think_end_token=None)
            for reply, until in zip(written, ends, strict=True)
        ]

    def _text(self, written: Written) -> str:
        return written.text if written.ids is None else str(self.tok_decode(list(written.ids)))


def served_for_harness(asked: ByTokens, progress: Progress) -> Any:
    """The model as the harness takes it."""
    return _Served(asked, progress)
