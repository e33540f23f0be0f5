"""Whether an artifact that is there can be used."""

from __future__ import annotations

import warnings
from pathlib import Path

from ..errors import SteerError
from ..files import read_json
from ..run_card import CARD_FILE, require_files
from .safetensors_file import SafeFile


def is_whole(folder: Path) -> bool:
    """Whether an artifact of ours is there, with weights and JSON that can be read; a warning says if only a part is.

    A power cut may have emptied or cut the files of one that was not brought to the disk.
    """
    if not folder.exists():
        return False
    try:
        for path in sorted(folder.glob("*.safetensors")):
            SafeFile(path)
        for path in sorted(folder.glob("*.json")):
            read_json(path)
        if not any(folder.glob("*.safetensors")) or not (folder / CARD_FILE).exists():
            raise SteerError(f"{folder}: its weights or its card are gone")
        require_files(folder)
    except SteerError as error:
        warnings.warn(f"{' '.join(str(error).split())}; it is made again", stacklevel=2)
        return False
    return True
