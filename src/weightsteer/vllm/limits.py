"""What vLLM takes as an adapter: which ranks, and which parts of a vector it refuses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from ..adapter_files import ADAPTER_CONFIG, ADAPTER_FILE, DENSE_FILE
from ..errors import SteerError, first_line
from ..files import read_json
from ..run_card import require_files
from ..vectors.adapter_config import read_adapter_config

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be (vllm.config.lora)
FACTOR_ENDINGS = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}  # of A and of B
REFUSED = {"use_dora": "DoRA", "lora_bias": "biases in its LoRA", "modules_to_save": "whole modules (modules_to_save)"}
MERGE = "merge it instead (`weightsteer export merged`)"


def require_servable(folder: Path) -> None:
    """Check that an engine which takes plain LoRA alone would serve all of a vector.

    Raises:
        SteerError: it has parts that are no factors of a matrix, or fields that vLLM refuses, or it lost a file.
    """
    require_files(folder)
    if (folder / DENSE_FILE).is_file():
        raise SteerError(f"{folder}: has dense parts ({DENSE_FILE}), which an engine's adapter cannot hold; {MERGE}")
    read_adapter_config(folder)
    fields = read_json(folder / ADAPTER_CONFIG)
    for name, described in REFUSED.items():
        if fields.get(name):
            raise SteerError(f"{folder}: has {described}, which vLLM refuses; {MERGE}")
    if fields.get("bias", "none") != "none":
        raise SteerError(f"{folder}: has trained biases (bias={fields['bias']!r}), which vLLM refuses; {MERGE}")
    factor_modules(shapes_in(folder))


def largest_rank(folder: Path) -> int:
    """The rank of the module that has the most."""
    return max(shape[0] for name, shape in shapes_in(folder).items() if name.endswith(tuple(FACTOR_ENDINGS)))


def allowed_rank(rank: int) -> int | None:
    """The smallest --max-lora-rank that takes a rank; None above them all."""
    return next((allowed for allowed in RANKS if allowed >= rank), None)


def leaf_modules(folder: Path) -> set[str]:
    """The last parts of the names of the modules that an adapter changes: q_proj, down_proj."""
    return {module.rpartition(".")[2] for module, _ in factor_modules(shapes_in(folder))}


def factor_modules(keys: Iterable[str]) -> set[tuple[str, str]]:
    """(module, ending of its A) of each LoRA of an adapter's file.

    Raises:
        SteerError: a tensor that is no factor, or half of a pair.
    """
    names = set(keys)
    found = {(key.removesuffix(end), end) for key in names for end in FACTOR_ENDINGS if key.endswith(end)}
    expected = {module + part for module, end in found for part in (end, FACTOR_ENDINGS[end])}
    if odd := sorted(names ^ expected):
        raise SteerError(
            f"{odd[0]}: is no part of a plain LoRA, or lacks its other factor, which vLLM refuses; {MERGE}"
        )
    if not found:
        raise SteerError("the adapter holds no LoRA; expected lora_A and lora_B of at least one module")
    return found


def shapes_in(folder: Path) -> Mapping[str, tuple[int, ...]]:
    """Name -> shape of every tensor of an adapter's file, of which the numbers are not read.

    Raises:
        SteerError: no such file, or a damaged one.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / ADAPTER_FILE
    try:
        with safe_open(path, "np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise SteerError(f"{path}: cannot be read ({first_line(error)}); make the vector again") from None
