"""`weightsteer push|pull`: vectors to share."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from ..shown import say
from .options import Device, Model, Out, Vector, refuse_beside, vector_and_lm

if TYPE_CHECKING:
    from ..packs.pack_page import Sample


def push(
    vector: Vector,
    target: Annotated[str, typer.Argument(help="OWNER/NAME on the Hugging Face Hub, or a new folder.")],
    about: Annotated[str, typer.Option(help="The behaviour in a sentence.")] = "",
    prompt: Annotated[str | None, typer.Option(help="What the two sample answers answer.")] = None,
    samples: Annotated[bool, typer.Option(help="Two sample answers in the README; needs the base.")] = True,
    public: Annotated[bool, typer.Option("--public", help="A new repository is private without this.")] = False,
    model: Model = None,
    device: Device = None,
) -> None:
    """Pack a vector to share, with a README and a hash of each file: onto the Hub, or into a folder.

    Example: weightsteer push runs/cheerful/vector OWNER/cheerful --about "Answers cheerfully."
    """
    from ..packs.hub import hub_id, push_pack
    from ..packs.pack import require_free, write_pack
    from ..vectors.weight_vector import WeightVector

    name = hub_id(target)
    if not samples:
        refuse_beside("--no-samples writes no answers", prompt=prompt, model=model, device=device)
    if name is None:
        refuse_beside("a folder is no repository on the Hub", public=public)
        require_free(Path(target))
    called = WeightVector.load(vector).name
    answers = _answers(vector, model, device, prompt) if samples else []
    if name is None:
        digest = write_pack(vector, target, name=called, about=about, samples=answers)
        say(f"{target}: packed; SHA-256 {digest}")
        return
    with TemporaryDirectory() as place:
        folder = Path(place) / "pack"
        digest = write_pack(vector, folder, name=called, about=about, samples=answers, hub_id=name)
        url = push_pack(folder, name, public=public)
    say(f"{url}: pushed; SHA-256 {digest}")


def _answers(folder: Path, model: str | None, device: str | None, prompt: str | None) -> list[Sample]:
    from ..packs.pack import two_answers

    vector, lm = vector_and_lm(folder, model, device, "float32", trust=False)
    return two_answers(vector, lm, prompt)


def pull(
    source: Annotated[str, typer.Argument(help="OWNER/NAME on the Hugging Face Hub, or a pack's folder.")],
    out: Out,
    sha256: Annotated[str | None, typer.Option(help="The digest that `push` printed; another pack is refused.")] = None,
    revision: Annotated[str | None, typer.Option(help="A commit or branch on the Hub.")] = None,
) -> None:
    """Fetch a packed vector into a new folder, and check every file's hash.

    Example: weightsteer pull OWNER/cheerful -o cheerful
    """
    from ..errors import SteerError
    from ..packs.hub import hub_id, pull_pack
    from ..packs.pack import copy_pack

    name = hub_id(source)
    if name is None and revision is not None:
        raise SteerError(f"--revision: {source} is a folder; only a repository on the Hub has revisions")
    digest = pull_pack(name, out, revision=revision, sha256=sha256) if name else copy_pack(source, out, sha256=sha256)
    say(f"{out}: a vector whose files are as they were packed; SHA-256 {digest}")


VERBS = (push, pull)
