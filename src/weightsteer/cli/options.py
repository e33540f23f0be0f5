"""What the verbs share: options, and reading what the user named."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import SteerError
from ..places import public_name
from ..schema import parse_json, parse_number
from ..shown import note
from .loading import typed_options

if TYPE_CHECKING:
    from ..behavior import Example
    from ..judges.endpoint import ChatModel
    from ..lm import LM
    from ..run_card import RunCard
    from ..vectors.weight_vector import WeightVector

Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Model: embedded name, Hugging Face id or folder, of a PEFT adapter too."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps, auto; default: the accelerator if any.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto (the checkpoint's own).")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the model carries.")]
TemplateVariables = Annotated[
    str | None,
    typer.Option("--chat-template-kwargs", help="Variables of the chat template: '{\"enable_thinking\": false}'."),
]
JudgeUrl = Annotated[
    str | None, typer.Option(help="OpenAI-compatible server that serves the judge: http://localhost:8000/v1.")
]
KeyEnv = Annotated[
    str | None,
    typer.Option(
        help="Environment variable whose key the judge's server may get; without it, only a provider's own key."
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray", help="Share the work out: local (this machine), auto (the Ray cluster here), or a cluster's address."
    ),
]
GpusPerModel = Annotated[
    float | None,
    typer.Option("--gpus-per-model", help="GPUs of each worker; default 1 where the Ray cluster has any, else 0."),
]
TrustCode = Annotated[
    list[str] | None, typer.Option("--trust-code", help="A task's YAML file whose code may run; once for each file.")
]
UNTESTED_K = 1.0  # w itself: where a talk starts if no k was measured
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Where to write.")]
Base = Annotated[str | None, typer.Option(help="The base model, where a checkpoint or DoRA is among the sources.")]
Vector = Annotated[Path, typer.Argument(help="Folder of a saved weight vector.")]


def default(name: str) -> str:
    """What a training takes where the option is not given, for its help text."""
    from ..training.defaults import DESCRIBED

    return f" Default: {DESCRIBED[name]}."


def numbers(text: str) -> list[float]:
    """Numbers separated by commas."""
    return [number(part) for part in text.split(",")]


def number(text: str, what: str = "k") -> float:
    return parse_number(text, what)


def drop_unset(**options: Any) -> dict[str, Any]:
    """The options that the user set; the rest keep the library's own defaults."""
    return {name: value for name, value in options.items() if value is not None}


def load_lm(
    model: str | None,
    device: str | None,
    dtype: str,
    trust: bool,
    template: str | None = None,
    revision: str | None = None,
) -> LM:
    arguments = lm_arguments(model, device, dtype, trust, template, revision)
    from ..lm import LM

    return LM.load(**arguments)


def lm_arguments(
    model: str | None,
    device: str | None,
    dtype: str,
    trust: bool,
    template: str | None = None,
    revision: str | None = None,
) -> dict[str, Any]:
    """What the options ask of `LM.load`."""
    from ..checkpoints.embedded_model import EMBEDDED_NAME

    return {
        "name": model or EMBEDDED_NAME,
        "device": device,
        "dtype": dtype,
        "revision": revision,
        "trust_remote_code": trust,
        "chat_template_kwargs": template_variables(template),
        "options": typed_options(),
    }


def template_variables(text: str | None) -> dict[str, Any]:
    """A JSON object of variables for the chat template."""
    found = parse_json(text or "{}", "--chat-template-kwargs")
    if not isinstance(found, dict):
        raise SteerError(
            f"--chat-template-kwargs: expected an object such as '{{\"enable_thinking\": false}}', found {text!r}"
        )
    return found


def special_tokens_of(model: str) -> set[str]:
    """The special tokens of a model's tokenizer, which is loaded without its model."""
    from ..checkpoints.adapted import tokenizer_folder
    from ..checkpoints.load_model import load_tokenizer
    from ..example_files.checks import special_tokens

    return special_tokens(load_tokenizer(model, tokenizer_folder(model), trust_remote_code=False))


def vector_and_lm(
    folder: Path, model: str | None, device: str | None, dtype: str, trust: bool, template: str | None = None
) -> tuple[WeightVector, LM]:
    from ..checkpoints.locate import base_of
    from ..vectors.weight_vector import WeightVector

    vector = WeightVector.load(folder)
    if model:
        lm = load_lm(model, device, dtype, trust, template)
        return seen_on(lm, vector, folder), lm
    require_base(vector.card)
    base = base_of(vector.card, folder)
    return vector, load_lm(base, device, dtype, trust, template, vector.card.base_commit)


def seen_on(lm: LM, vector: WeightVector, folder: Path) -> WeightVector:
    """The vector with the range of k that was measured on this model; a note where that is another model's."""
    card = vector.card
    if card.strength is not None and not card.is_base(lm.revision) and lm.revision not in card.strengths:
        command = shlex.join(["weightsteer", "calibrate", str(folder), "-m", lm.name])
        note(f"the card's k was measured on {public_name(card.base_model)}; `{command}` finds it for this model")
    return replace(vector, card=card.as_on(lm.revision))


def require_base(card: RunCard, option: str = "--model") -> None:
    """Raise if a card does not say on which model its vector was made."""
    if not card.base_model:
        raise SteerError(f"the vector's card names no base model; give one with {option}")


def refuse_same(positive: str, negative: str) -> None:
    """Raise where one fine-tune is named as both."""
    if positive == negative or Path(positive).resolve() == Path(negative).resolve():
        raise SteerError(f"{positive}: is named as both fine-tunes, between which there is no direction")


def data_files(pairs: str | None, *files: Path | None) -> list[Path]:
    """The user's own files among the data; a shipped behaviour is none."""
    from ..behavior import SHIPPED

    return [Path(name) for name in (pairs, *files) if name and name not in SHIPPED]


def read_sides(pairs: str | None, positive: Path | None, negative: Path | None) -> tuple[list[Example], list[Example]]:
    from ..behavior import sides_of
    from ..example_files.load import load_examples, load_pairs

    if pairs and not (positive or negative):
        return sides_of(load_pairs(pairs))
    if positive and negative and not pairs:
        return load_examples(positive), load_examples(negative)
    raise SteerError("data: expected --pairs, or both --positive (D+) and --negative (D-)")


def judge_model(
    judge: str | None, url: str | None, cache: Path | None, load: Callable[[str], LM], key_env: str | None = None
) -> ChatModel | None:
    """Who judges: a served model, whose replies are kept in the file `cache`, or a local one."""
    from ..judges.endpoint import Endpoint
    from ..judges.judge import LocalChatModel

    if judge is None:
        if url is not None:
            raise SteerError("--judge-url: name the model that the server is to judge with, by --judge")
        return None
    return Endpoint(url, judge, cache=cache, **drop_unset(key_env=key_env)) if url else LocalChatModel(load(judge))


def recommended_k(vector: WeightVector) -> float:
    """The card's k for more of the behaviour."""
    if vector.card.strength is None or not vector.card.strength.recommended:
        raise SteerError("the vector's card has no recommended k (see `weightsteer show`); give one with --k")
    return vector.card.strength.recommended


def starting_k(vector: WeightVector) -> float:
    """The card's k for more of the behaviour, or 1 with a word about it."""
    strength = vector.card.strength
    if strength is not None and strength.recommended:
        return strength.recommended
    note(f"the vector's card has no recommended k; starting at k = {UNTESTED_K:g}, the vector as it was made")
    return UNTESTED_K


def shown_strengths(vector: WeightVector) -> list[float]:
    """The card's strengths, or -1 to 1 with a word about it."""
    if vector.card.strength is None:
        note("the vector's card has no measured range of k; taking -1 to 1")
        return [-1.0, -0.5, 0.0, 0.5, 1.0]
    return vector.card.strength.shown


def warn_unseen(vector: WeightVector, ks: Sequence[float] = (-1.0, 1.0)) -> None:
    """Say in one line that a vector is too small to see at these k, if it is."""
    from ..vectors.visibility import why_unseen

    if reason := why_unseen(vector, ks):
        note(reason)


def pasteable(command: str) -> str:
    """A command that begins with `weightsteer`, as it can be pasted where that is not on the path."""
    if shutil.which("weightsteer"):
        return command
    program = Path(sys.argv[0]).absolute()
    if program.name != "weightsteer":
        return command
    near = program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else program
    return shlex.quote(str(near)) + command.removeprefix("weightsteer")


def refuse_beside(reason: str, **options: object) -> None:
    """Raise where one of these options is given and would do nothing, for the reason that is named."""
    for name, value in options.items():
        if value:
            raise SteerError(f"--{name.replace('_', '-')}: {reason}; leave it out")


def refuse_without_ray(gpus: float | None) -> None:
    """Raise for an option that means nothing where there are no workers."""
    if gpus is not None:
        raise SteerError("--gpus-per-model: is about the workers of --ray; give --ray too, or leave it out")
