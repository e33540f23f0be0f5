"""Packs on the Hugging Face Hub, by huggingface_hub's client: one commit for all files, and one revision for all."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from ..errors import SteerError, first_line
from ..vectors.manifest import ALLOWED, MANIFEST, read_manifest
from .pack import copy_pack

PREFIXES = ("hub:", "hf://")
ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
HUBS_OWN = (".gitattributes", "README.md")  # what a repository may hold before a pack is put into it


def hub_id(text: str) -> str | None:
    """The id that a user's text means, OWNER/NAME with or without `hub:` or `hf://`; None if it means a folder.

    As with models, a folder that is there comes first; so does one whose parent is there.

    Raises:
        SteerError: a prefix before something else than an id.
    """
    prefix = next((prefix for prefix in PREFIXES if text.startswith(prefix)), "")
    name = text.removeprefix(prefix)
    if prefix and not ID.fullmatch(name):
        raise SteerError(f"{text}: expected {prefix}OWNER/NAME, the id of a repository on the Hub")
    if prefix:
        return name
    path = Path(text)
    return name if ID.fullmatch(name) and not path.exists() and not path.parent.exists() else None


def push_pack(folder: str | Path, name: str, *, public: bool = False) -> str:
    """Put a pack into the Hub's repository OWNER/NAME, in one commit; returns its address.

    A repository that is not there is made, private unless `public`. What an earlier pack there had, and this one has
    not, goes away in the same commit. A push that is killed leaves the repository as it was.

    Raises:
        SteerError: the Hub refuses or cannot be reached, or the repository holds something else.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    folder, api = Path(folder), HfApi()
    files = (MANIFEST, *read_manifest(folder / MANIFEST).files)
    with _telling_of_hub(name):
        api.create_repo(name, private=not public, exist_ok=True)
        info = api.model_info(name)
        there = {sibling.rfilename for sibling in info.siblings or []}
        if MANIFEST not in there and (foreign := sorted(there.difference(HUBS_OWN))):
            raise SteerError(
                f"{name}: holds {foreign[0]} and no pack; choose another name, for a repository of its own"
            )
        adds = [CommitOperationAdd(file, folder / file) for file in files]
        gone = [CommitOperationDelete(file) for file in ALLOWED if file in there and file not in files]
        done = api.create_commit(
            name, [*adds, *gone], commit_message="A weight vector, packed by weightsteer", parent_commit=info.sha
        )
    return str(done.repo_url)


def pull_pack(name: str, target: str | Path, *, revision: str | None = None, sha256: str | None = None) -> str:
    """Fetch a pack from the Hub into a new folder (see `copy_pack`); returns its digest.

    Only the files of a pack are fetched, all of one commit.

    Raises:
        SteerError: no such repository, no pack in it, or one that was changed.
    """
    from huggingface_hub import HfApi, hf_hub_download

    with TemporaryDirectory() as place:
        with _telling_of_hub(name):
            info = HfApi().model_info(name, revision=revision)
            there = {sibling.rfilename for sibling in info.siblings or []}
            if MANIFEST not in there:
                raise SteerError(f"{name}: is no pack (no {MANIFEST}); expected what `weightsteer push` made")
            hf_hub_download(name, MANIFEST, revision=info.sha, local_dir=place)
            read_manifest(Path(place) / MANIFEST)
            for file in ALLOWED:
                if file in there:
                    hf_hub_download(name, file, revision=info.sha, local_dir=place)
        try:
            return copy_pack(place, target, sha256=sha256)
        except SteerError as error:
            raise SteerError(str(error).replace(place, name)) from None


@contextmanager
def _telling_of_hub(name: str) -> Iterator[None]:
    """Turn what the Hub's client raises into one line."""
    from huggingface_hub.errors import HfHubHTTPError

    # With the Hub's own error what its HTTP library raises, whichever library that is.
    failures: tuple[type[Exception], ...] = (OSError, ValueError, *HfHubHTTPError.__bases__)
    try:
        yield
    except SteerError:
        raise
    except failures as error:
        raise SteerError(
            f"{name}: the Hub cannot be used for it ({first_line(error)}); check the name and the connection, and log "
            "in with `hf auth login` where it needs that"
        ) from None
