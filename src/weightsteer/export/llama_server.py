"""The command that serves vectors with llama.cpp, each as a LoRA whose scale a request gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import SteerError
from ..schema import shown
from ..strength_names import is_name

PROGRAM = "llama-server"
HOST, PORT = "127.0.0.1", 8080
SEPARATORS = ',:"'  # with which llama.cpp takes --lora-scaled apart


def llama_command(
    vectors: Mapping[str, str | Path],
    model: str | Path,
    *,
    host: str = HOST,
    port: int = PORT,
    options: Sequence[str] = (),
) -> list[str]:
    """The command line of a llama.cpp server that steers by `lora: [{"id": 0, "scale": -0.7}]` in a request.

    Each vector starts at scale 0, so that a request without `lora` gets the base. `--cache-ram 0` is needed: the cache
    of prompts, which is on by default, continues a prompt that was computed at another scale (see `scale_check`).

    Args:
        vectors: name -> the LoRA file that `export_gguf_lora` wrote; the first has the id 0, the second 1.
        model: the base as a GGUF file.
        options: more of llama-server's own options, which come last.

    Raises:
        SteerError: a file that is not there or is no GGUF, none at all, or a path that llama.cpp would take apart.
    """
    if not vectors:
        raise SteerError(
            "llama.cpp: no vector is given; expected at least one LoRA file (`weightsteer export gguf-lora`)"
        )
    for path in (model, *vectors.values()):
        _require_gguf(Path(path))
    for path in vectors.values():
        if found := next((sign for sign in SEPARATORS if sign in str(path)), ""):
            raise SteerError(f"{path}: llama.cpp takes a path with {found} apart; rename the file or its folder")
    loras = ",".join(f"{path}:0" for path in vectors.values())
    command = [PROGRAM, "--model", str(model), "--lora-scaled", loras, "--cache-ram", "0"]
    return [*command, "--host", host, "--port", str(port), *options]


def named_loras(arguments: Sequence[str]) -> dict[str, Path]:
    """Name -> LoRA file of what a user named, each as FILE, which goes by its name without .gguf, or as NAME=FILE.

    Raises:
        SteerError: a name that cannot stand in `syc@-0.72`, or that comes twice.
    """
    found: dict[str, Path] = {}
    for argument in arguments:
        given, equals, rest = argument.partition("=")
        named = bool(equals) and is_name(given) and not Path(argument).exists()
        file = Path(rest if named else argument)
        name = given if named else file.name.removesuffix(".gguf")
        if not is_name(name):
            raise SteerError(f"{file}: its name, {shown(name)}, cannot stand in syc@-0.72; name it, as NAME=FILE")
        if name in found:
            raise SteerError(f"{name}: is the name of two files; name one of them otherwise, as NAME=FILE")
        found[name] = file
    return found


def request_field(vectors: Mapping[str, str | Path], strengths: Mapping[str, float]) -> list[dict[str, float]]:
    """The field `lora` of a request for these strengths: every vector is named, since what is not has the scale 0.

    Raises:
        SteerError: a strength for a vector that the server was not started with.
    """
    if unknown := next((name for name in strengths if name not in vectors), ""):
        raise SteerError(f"{unknown}: no such vector; the server has {', '.join(vectors)}")
    return [{"id": number, "scale": strengths.get(name, 0.0)} for number, name in enumerate(vectors)]


def _require_gguf(path: Path) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise SteerError(f"{path}: cannot be read ({error.strerror}); expected a GGUF file") from None
    if start != b"GGUF":
        raise SteerError(
            f"{path}: is no GGUF file; of a vector `weightsteer export gguf-lora` makes one, of a base llama.cpp's "
            "convert_hf_to_gguf.py"
        )
