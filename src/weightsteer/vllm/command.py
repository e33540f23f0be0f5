"""The command that serves vectors with vLLM, with the options that it needs for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import SteerError
from .limits import RANKS, allowed_rank, largest_rank, leaf_modules, require_servable
from .settings import PLUGIN, VECTORS, environment

HOST = "127.0.0.1"  # vLLM's own default is every address; who may load adapters may read what lies on the disk
MOST_AT_ONCE = 4  # strengths in one batch; each takes the memory of one adapter on the accelerator
MOST_KEPT = 16  # adapters in the machine's own memory


class RankError(SteerError):
    """A vector of a rank that vLLM has no room for; a cut of it would do."""


def vllm_command(
    vectors: Mapping[str, Path], model: str, *, max_loras: int = MOST_AT_ONCE, options: Sequence[str] = ()
) -> tuple[dict[str, str], list[str]]:
    """The environment and the words of the command.

    Raises:
        SteerError: no vector, one that vLLM cannot take, or (`RankError`) one of too high a rank.
    """
    if not vectors:
        raise SteerError("vllm: expected at least one vector")
    from ..vectors.manifest import require_as_packed  # with torch

    for name, folder in vectors.items():
        require_servable(folder)
        require_as_packed(folder)
        if allowed_rank(largest_rank(folder)) is None:
            raise RankError(f"{name}: its rank is {largest_rank(folder)}, and vLLM takes {RANKS[-1]} at most")
    modules = sorted(set().union(*(leaf_modules(folder) for folder in vectors.values())))
    surroundings = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_PLUGINS": PLUGIN,
        VECTORS: environment(vectors),
    }
    words = ["vllm", "serve", model, "--host", HOST, "--enable-lora", "--max-lora-rank", str(rank_for(vectors))]
    words += ["--max-loras", str(max_loras), "--max-cpu-loras", str(max(MOST_KEPT, max_loras))]
    return surroundings, [*words, "--lora-target-modules", *modules, *options]


def rank_for(vectors: Mapping[str, Path]) -> int:
    """The --max-lora-rank that takes the sum of all vectors, whose ranks add up; where none does, each by itself."""
    ranks = [largest_rank(folder) for folder in vectors.values()]
    found = allowed_rank(sum(ranks)) or allowed_rank(max(ranks))
    assert found is not None
    return found


def takes_sums(vectors: Mapping[str, Path]) -> bool:
    """Whether the sum of all these vectors fits into the rank that the command gives."""
    return allowed_rank(sum(largest_rank(folder) for folder in vectors.values())) is not None
