"""Whether two artifacts were made on one base: by content where that is known, by name as a hint where it is not."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from ..checkpoints.checkpoint import fingerprint
from ..checkpoints.embedded_model import EMBEDDED_HUB_ID, EMBEDDED_NAME
from ..checkpoints.locate import local_folder
from ..errors import SteerError
from ..places import HUB_CACHE, expanded, is_private
from ..run_card import RunCard

COMMIT, FINGERPRINT = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")
QUANTISED = re.compile(r"(?:-unsloth)?-(?:bnb-)?(?:4bit|8bit)$|-(?:gptq|awq)(?:-int[48])?$")
OWNER = EMBEDDED_HUB_ID.partition("/")[0].lower()  # the embedded model is a copy of the one on the hub
UNKNOWN, HERE = "", "."  # owners: of a name without one, and of a folder that is here
MIRRORS = ("unsloth",)  # owners that publish other people's models under the same names


def require_same_base(first: RunCard, second: RunCard) -> None:
    """Raise unless both artifacts were made on the same base model.

    Two hashes of weights, or two commits, decide. Where they cannot be compared the names do: two spellings of one
    path or id are one base, and so is a model and its 4-bit copy.
    """
    if is_same_base(first, second):
        return
    raise SteerError(
        f"the vectors have different bases: {_described(first)} and {_described(second)}; only vectors of one base "
        "can be combined. If these are one model, say so with --base MODEL"
    )


def is_same_base(first: RunCard, second: RunCard) -> bool:
    """Whether both artifacts were made on the same base model, as far as can be known (see `require_same_base`)."""
    ours, theirs = (card.base_revision for card in (first, second))
    if ours and theirs and _kind(ours) == _kind(theirs):
        return ours == theirs
    if not first.base_model or not second.base_model:
        return True
    if _same_name(first.base_model, second.base_model):
        return True
    ours, theirs = _content(first), _content(second)
    return ours == theirs if ours and theirs else _named_like_folder(first.base_model, second.base_model)


def on_base(card: RunCard, base: str | Path | None) -> RunCard:
    """The card, of the base that the user says: names in cards and configs are overruled."""
    if base is None:
        return card
    folder = local_folder(str(base))
    weights = fingerprint(folder) if folder else ""
    if weights and FINGERPRINT.fullmatch(card.base_revision) and weights != card.base_revision:
        warnings.warn(
            f"{base}: is not the base that was trained on, {_described(card)}, and is taken for it", stacklevel=2
        )
    return replace(card, base_model=str(base), base_revision=weights)


def on_named_base(card: RunCard) -> RunCard:
    """The card, with the hash of its base's weights where it names a folder that is here and no revision of it.

    An adapter from elsewhere names its base by a path alone, which another folder may have on another day.
    """
    here = card.base_model and not card.base_revision and expanded(card.base_model).is_dir()
    try:
        return on_base(card, card.base_model) if here else card
    except SteerError:  # what lies there cannot be read, and is not needed
        return card


def _kind(revision: str) -> int:
    """Commits and hashes of weights tell nothing about each other."""
    return next((number for number, kind in enumerate((COMMIT, FINGERPRINT)) if kind.fullmatch(revision)), -1)


def _same_name(first: str, second: str) -> bool:
    """Whether two names mean one model: no trailing slash, no case, no quantised copy's ending counts.

    Of the copies of a mirror only the model's name counts, since their owner is not the base's, and so it is with a
    folder of another machine, and with a bare name.
    """
    (owner, model), (other_owner, other_model) = _name_parts(first), _name_parts(second)
    return model == other_model and (owner == other_owner or bool({owner, other_owner} & {UNKNOWN, *MIRRORS}))


def _named_like_folder(first: str, second: str) -> bool:
    """Whether one name is that of a folder that is here, and the other, of which no weights are, ends like it."""
    (owner, model), (other_owner, other_model) = sorted(
        (_name_parts(first), _name_parts(second)), key=lambda parts: parts[0] != HERE
    )
    return owner == HERE != other_owner and _name_parts(Path(model).name)[1] == other_model


def _name_parts(name: str) -> tuple[str, str]:
    path = expanded(name)
    cached = HUB_CACHE.search(str(path))
    if cached:
        name = f"{cached['owner']}/{cached['model']}"
    elif path.exists():
        return HERE, str(path.resolve())
    elif is_private(name):
        name = path.name
    owner, _, model = name.strip().rstrip("/").lower().rpartition("/")
    model = QUANTISED.sub("", model)
    return (OWNER if model == EMBEDDED_NAME and not owner else owner or UNKNOWN), model


def _described(card: RunCard) -> str:
    return f"{card.base_model or 'not named'} ({card.base_revision[:12] or 'revision not recorded'})"


def _content(card: RunCard) -> str:
    """A hash of the base's weights: the card's own, or that of the folder that it names; "" if neither is there."""
    if FINGERPRINT.fullmatch(card.base_revision):
        return card.base_revision
    return _content_of(card.base_model)


@lru_cache(maxsize=64)
def _content_of(name: str) -> str:
    folder = local_folder(name)
    return fingerprint(folder) if folder else ""
