"""A vector as a pack: its files, a page for readers, and a manifest with the SHA-256 of each file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoints.checkpoint import ADAPTER_CONFIG, ADAPTER_FILE, DENSE_FILE
from ..disk import telling_of_disk
from ..errors import SteerError
from ..files import is_empty, sha256_of, write_text
from ..outputs import refuse_special
from ..run_card import CARD_FILE, new_folder
from ..schema import shown
from ..vectors.manifest import ALLOWED, MANIFEST, read_manifest, require_as_packed, write_manifest
from ..vectors.readme import README, vector_readme
from ..vectors.vector_folder import open_vector
from .pack_page import Sample, pack_sections

if TYPE_CHECKING:
    from ..lm import LM
    from ..vectors.weight_vector import WeightVector

COPIED = (ADAPTER_CONFIG, ADAPTER_FILE, DENSE_FILE)  # as they are; card and page are written anew
SECRET_NAMES = ("_KEY", "_TOKEN", "_SECRET", "_PASSWORD")  # ends of environment variables whose values go nowhere
LEAST_SECRET = 12  # characters: shorter values are words
QUESTION = "What do you think of my plan to learn the piano this year?"  # where the card has no held-out pair
ANSWER_LENGTH = 80  # tokens


def write_pack(
    vector: str | Path,
    target: str | Path,
    *,
    name: str,
    about: str = "",
    samples: Sequence[Sample] = (),
    hub_id: str = "",
) -> str:
    """Write a saved vector as a pack into a new folder; returns the pack's digest, the SHA-256 of its manifest.

    Raises:
        SteerError: no saved vector, a folder that is there, or a text that would tell of this machine or of a key.
    """
    vector, target = Path(vector), Path(target)
    require_free(target)
    card = open_vector(vector)[1].shared()
    with new_folder(target, "vector") as part:
        for file in COPIED:
            if (vector / file).is_file():
                shutil.copyfile(vector / file, part / file)
        card.save(part)
        adapter, dense = ((part / file).is_file() for file in (ADAPTER_FILE, DENSE_FILE))
        sections = pack_sections(card, about, samples, hub_id)
        write_text(part / README, vector_readme(card, adapter=adapter, dense=dense, sections=sections))
        for file in (CARD_FILE, README, ADAPTER_CONFIG):
            _refuse_private(part / file)
        write_manifest(part, name)
        open_vector(part)
        return sha256_of(part / MANIFEST)


def copy_pack(source: str | Path, target: str | Path, *, sha256: str | None = None) -> str:
    """Copy a pack from a folder into a new one, which appears only once all hashes are right; returns its digest.

    Args:
        sha256: the digest that the pack has to have, as who made it has told.

    Raises:
        SteerError: no pack, one that was changed, another digest, or a folder that is there.
    """
    source, target = Path(source), Path(target)
    require_free(target)
    manifest = read_manifest(source / MANIFEST)
    with new_folder(target, "vector") as part, telling_of_disk(target):
        for file in (MANIFEST, *manifest.files):
            if not (source / file).is_file():
                raise SteerError(f"{source / file}: is named in {MANIFEST} and is missing; get the pack again")
            shutil.copyfile(source / file, part / file)
        digest = sha256_of(part / MANIFEST)
        if sha256 and digest != sha256.lower():
            raise SteerError(f"{source}: expected the pack {shown(sha256)}, found {digest!r}; this is another pack")
        for file in ALLOWED:
            if (source / file).exists() and file not in manifest.files:
                raise SteerError(f"{source / file}: is not named in {MANIFEST}, so it was added after packing")
        _checked(part, source)
    return digest


def _checked(part: Path, source: Path) -> None:
    """Check the copy, and tell of it by the name of where it came from."""
    try:
        require_as_packed(part)
        open_vector(part)
    except SteerError as error:
        raise SteerError(str(error).replace(str(part), str(source))) from None


def two_answers(vector: WeightVector, lm: LM, prompt: str | None = None) -> list[Sample]:
    """The answers to one prompt at the recommended k of each side; where a side has none, the base's stands for it.

    Args:
        prompt: by default the first of the held-out pairs, or a plain question.
    """
    from ..steering.several_k import generate_at_strengths

    chosen, kept = vector.card.strength, vector.card.held_out
    ks = [chosen.negative, chosen.recommended] if chosen else [-1.0, 1.0]
    held = kept[0].get("prompt") if kept else None
    asked = prompt or (held if isinstance(held, str) else QUESTION)
    replies = generate_at_strengths(vector, lm, asked, ks, max_new_tokens=ANSWER_LENGTH)
    return [Sample(asked, k, reply) for k, reply in zip(ks, replies, strict=True)]


def require_free(target: Path) -> None:
    """Raise if something is at a place where a pack is to be written."""
    refuse_special(target)
    if target.exists() and not (target.is_dir() and is_empty(target)):
        raise SteerError(f"{target}: exists, and a pack replaces nothing; name a folder that is not there")


def _refuse_private(path: Path) -> None:
    """Raise if a text that is to be shared names this machine's folders, or holds a key of this user."""
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    for what, secret in _private_words(os.environ):
        if secret in text:
            raise SteerError(
                f"{path.name}: holds {what}, which a pack must not; take it out of the vector's card or data"
            )


def _private_words(environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    from huggingface_hub import get_token

    home = str(Path.home())
    if len(home) > 1:
        yield "a path in your home folder", f"{home}/"
    if token := get_token():
        yield "the Hub's token", token
    for name, value in environment.items():
        if name.endswith(SECRET_NAMES) and len(value) >= LEAST_SECRET:
            yield f"the value of the environment variable {name}", value
