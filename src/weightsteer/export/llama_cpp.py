"""Activation steering for llama.cpp: k a_l as its control vector file (GGUF)."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from torch import Tensor

from ..checkpoints.adapted import without_adapters
from ..checkpoints.locate import locate_config
from ..errors import SteerError, first_line
from ..files import write_bytes
from ..outputs import refuse_foreign_file
from ..progress import quiet_transformers
from ..steering.activations import ActivationVector

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ARCHITECTURE = "controlvector"


def export_control(vector: ActivationVector, path: str | Path, *, k: float, model_type: str) -> Path:
    """Write k a_l as a control vector for llama.cpp (`--control-vector FILE`): at its scale 1 it is k.

    llama.cpp counts blocks from 0 as we do and adds `direction.l` to the output of block l, at every
    token, with no other arithmetic, so the file steers as `ActivationVector.applied` does. It has no
    `direction.0`: block 0 cannot be steered there. Blocks that the vector leaves alone are left out.

    Args:
        k: multiples of the vector, folded into the file; 0 is refused, since it would steer nothing.
        model_type: what the file names as its model, such as "llama"; llama.cpp only shows it.

    Raises:
        SteerError: the vector steers block 0, or nothing at all, or has values that are not finite.
    """
    path = Path(path)
    refuse_foreign_file(path, lambda content: content[:4] == b"GGUF" and ARCHITECTURE.encode() in content[:4096])
    directions = _directions(vector, k)
    with TemporaryDirectory() as folder:
        part = Path(folder) / "control.gguf"
        _write(directions, part, model_type)
        write_bytes(path, part.read_bytes())
    return path


def _directions(vector: ActivationVector, k: float) -> dict[int, Tensor]:
    """Block -> k a_l (hidden,) in float32, the blocks that are left alone taken out."""
    scaled = {layer: (k * a.detach().cpu().double()).float() for layer, a in sorted(vector.layers.items())}
    directions = {layer: a for layer, a in scaled.items() if a.count_nonzero()}
    if not directions:
        raise SteerError(f"the vector at k = {k:g} is zero in every layer; there is nothing to write")
    if 0 in directions:
        raise SteerError(
            "layer 0: the vector steers the output of the first block, which llama.cpp's control vectors cannot; "
            "choose another layer (--layer)"
        )
    for layer, a in directions.items():
        if not a.isfinite().all():
            raise SteerError(f"layer {layer}: k a has values that are not finite in float32; choose a smaller k")
    return directions


def _write(directions: dict[int, Tensor], path: Path, model_type: str) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, ARCHITECTURE)
    writer.add_string(f"{ARCHITECTURE}.model_hint", model_type)
    writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(directions))
    for layer, direction in directions.items():
        writer.add_tensor(f"direction.{layer}", direction.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def model_type_of(name: str, *, revision: str | None = None) -> str:
    """A model's type, such as "llama", from its config alone (see `config_of`)."""
    return str(config_of(name, revision=revision).model_type)


def config_of(name: str, *, revision: str | None = None, option: str = "--model") -> PretrainedConfig:
    """A model's config, which is read without its weights; `option` is what an error says to name the model with.

    Raises:
        SteerError: no such model, or its config cannot be read.
    """
    from transformers import AutoConfig

    where = locate_config(without_adapters(name))
    try:
        with quiet_transformers():
            config: PretrainedConfig = AutoConfig.from_pretrained(**where, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise SteerError(
            f"{name}: its config cannot be read ({first_line(error)}); name the model with {option}"
        ) from None
    return config
