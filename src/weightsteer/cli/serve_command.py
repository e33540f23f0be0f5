"""`weightsteer serve-command`: the line that serves vectors with an engine, to paste."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import SteerError
from ..schema import suggestion
from ..shown import note, say
from .options import drop_unset, require_base

if TYPE_CHECKING:
    from ..run_card import RunCard

EngineModel = Annotated[
    str | None, typer.Option("--model", "-m", help="The base as the engine finds it; default: the card's.")
]


def serve_command(
    engine: Annotated[str, typer.Argument(help="vllm, llama.cpp, sglang, lorax, mlx or weightsteer.")],
    vectors: Annotated[
        list[str],
        typer.Argument(help="FOLDER or NAME=FOLDER; for llama.cpp exported files, for sglang, lorax and mlx one set."),
    ],
    model: EngineModel = None,
    max_loras: Annotated[int | None, typer.Option(min=1, help="vLLM: strengths in one batch. Default: 4.")] = None,
) -> None:
    """Print the command that serves vectors with an engine, and what a request says to set k.

    The command goes to stdout, what is good to know to stderr. It refuses what the engine would refuse.

    Example: weightsteer serve-command vllm runs/syc/vector runs/gloomy/vector
    """
    if engine not in ENGINES:
        raise SteerError(f"{engine}: expected one of {', '.join(ENGINES)}{suggestion(engine, ENGINES)}")
    if max_loras is not None and engine != "vllm":
        raise SteerError(f"--max-loras: is vLLM's; {engine} has no such option")
    ENGINES[engine](vectors, model, max_loras)


def pasted(words: Sequence[str], surroundings: Mapping[str, str] | None = None) -> str:
    """A command as one line for a shell, with the variables before it."""
    variables = [f"{name}={shlex.quote(value)}" for name, value in (surroundings or {}).items()]
    return " ".join([*variables, shlex.join(words)])


def vllm(arguments: list[str], model: str | None, max_loras: int | None) -> None:
    from ..named_folders import named_folders
    from ..vllm.command import RankError, takes_sums, vllm_command

    folders = named_folders(arguments)
    try:
        surroundings, words = vllm_command(folders, _base(folders, model), **drop_unset(max_loras=max_loras))
    except RankError as error:
        raise SteerError(f"{error}; {_cut(folders)}") from None
    say(pasted(words, surroundings))
    note(f"a request sets k by its model's name: {example_name(folders)}; the base's name is k = 0")
    if len(folders) > 1 and not takes_sums(folders):
        note("a sum of all these vectors has too high a rank for vLLM; sums of fewer may fit")
    if "lm_head" in words:
        note("a vector changes lm_head: ask for no prompt_logprobs with it, which stop vLLM 0.32")


def llama_cpp(arguments: list[str], model: str | None, max_loras: int | None) -> None:
    from ..export.llama_server import llama_command, named_loras

    if model is None:
        raise SteerError("llama.cpp: give the base's GGUF file with --model")
    files = named_loras(arguments)
    say(pasted(llama_command(files, model)))
    ids = ", ".join(f"{number} is {name}" for number, name in enumerate(files))
    note(f'a request sets k by its field lora: [{{"id": 0, "scale": -0.72}}]; {ids}; without the field k is 0')


def example_name(folders: Mapping[str, Path]) -> str:
    """A name with a strength that means something for the vector."""
    from ..run_card import CARD_FILE, RunCard
    from ..strength_names import strength_name

    name, folder = next(iter(folders.items()))
    strength = RunCard.load(folder).strength if (folder / CARD_FILE).is_file() else None
    found = (strength.negative or strength.recommended) if strength is not None else 0.0
    return strength_name({name: found or 0.5})


def _cut(folders: Mapping[str, Path]) -> str:
    """What to do about the first vector of too high a rank, and what that costs."""
    from ..vectors.difference import task_vector
    from ..vllm.limits import RANKS, allowed_rank, largest_rank

    name, folder = next((n, f) for n, f in folders.items() if allowed_rank(largest_rank(f)) is None)
    most = RANKS[-1]
    error = task_vector(folder).truncate(rank=most).card.measured["truncation_error"]
    out = folder.with_name(f"{folder.name}-{most}")
    words = ["weightsteer", "combine", f"truncate(w, rank={most})", f"w={folder}", "-o", str(out)]
    return f"cut {name} to that, which loses {error:.2%} of it: {shlex.join(words)}"


def weightsteer(arguments: list[str], model: str | None, max_loras: int | None) -> None:
    from ..named_folders import named_folders

    folders = named_folders(arguments)
    named = [f"{name}={folder}" for name, folder in folders.items()]
    say(pasted(["weightsteer", "serve", *named, *(["-m", model] if model else [])]))
    note(f"a request sets k by its model's name: {example_name(folders)}, or by a field k; the base's name is k = 0")


def of_set(engine: str) -> Callable[[list[str], str | None, int | None], None]:
    """The command of an engine that takes a set of adapters."""

    def print_command(arguments: list[str], model: str | None, max_loras: int | None) -> None:
        from ..export.adapter_set import read_adapter_set

        if len(arguments) != 1:
            raise SteerError(f"{engine}: expected one set of adapters, found {len(arguments)} arguments")
        card, adapters = read_adapter_set(Path(arguments[0]))
        base = _whole(model) if model else _base_of(card, Path(arguments[0]))
        say_set_command(engine, base, card, adapters)

    return print_command


def say_set_command(engine: str, model: str, card: RunCard, adapters: Mapping[str, Path]) -> None:
    """Print an engine's command for a set, and how a request names a strength."""
    from ..export.set_commands import set_command

    command = set_command(engine, model, card, adapters)
    say(pasted(command.words))
    note(f"a request sets k by {command.asking}")


def set_line(engine: str, model: str | None, card: RunCard, adapters: Mapping[str, Path], folder: Path) -> str:
    """An engine's command for a set; where the base is not found here, the verb that asks for it."""
    from ..export.set_commands import set_command

    try:
        return pasted(set_command(engine, model or _base_of(card, folder), card, adapters).words)
    except SteerError:
        return pasted(["weightsteer", "serve-command", engine, str(folder), "-m", "BASE"])


def _base(folders: Mapping[str, Path], model: str | None) -> str:
    """The base of all vectors, as an engine on this machine finds it."""
    from ..run_card import CARD_FILE, RunCard
    from ..vectors.base_identity import require_same_base

    cards = {folder: RunCard.load(folder) for folder in folders.values() if (folder / CARD_FILE).is_file()}
    first = next(iter(cards.values()), None)
    for card in cards.values():
        require_same_base(next(iter(cards.values())), card)
    if model is not None:
        return _whole(model)
    if first is None:
        raise SteerError("no card says on which base the vectors were made; give it with --model")
    return _base_of(first, next(iter(cards)))


def _base_of(card: RunCard, folder: Path) -> str:
    from ..checkpoints.embedded_model import EMBEDDED_NAME, embedded_model
    from ..checkpoints.locate import base_of

    require_base(card)
    found = base_of(card, folder)
    return str(embedded_model()) if found.lower() == EMBEDDED_NAME else _whole(found)


def _whole(model: str) -> str:
    """The model, which an engine can serve.

    Raises:
        SteerError: a folder with an adapter, which an engine takes beside its model, as it takes the vector.
    """
    from ..checkpoints.adapted import is_adapter

    if Path(model).is_dir() and is_adapter(model):
        merge = shlex.join(["weightsteer", "export", "merged", model, "--k=1", "-o", "MERGED"])
        raise SteerError(f"{model}: is an adapter, and no engine serves it as a model; {merge}, and give -m MERGED")
    return model


ENGINES: Mapping[str, Callable[[list[str], str | None, int | None], None]] = {
    "vllm": vllm,
    "llama.cpp": llama_cpp,
    "sglang": of_set("sglang"),
    "lorax": of_set("lorax"),
    "mlx": of_set("mlx"),
    "weightsteer": weightsteer,
}
