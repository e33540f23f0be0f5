"""The plugin itself: vLLM asks it for a model's name that it does not know, and gets an adapter folder."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from ..errors import SteerError
from ..strength_names import parse_strengths
from .adapters import AdapterCache, hash_of, split_pin, stamp
from .settings import PLUGIN, VECTORS, adapters_folder, served_vectors

log = logging.getLogger(f"vllm.{PLUGIN}")  # below vLLM's own logger, which has the handlers


@dataclass(frozen=True)
class Given:
    """An adapter that vLLM was given, and the vectors that it was made from as they were then."""

    adapter: Path
    stamps: dict[Path, tuple[object, ...]]


@dataclass
class SteeringResolver(LoRAResolver):  # type: ignore[misc]  # vLLM is not installed where mypy runs
    """Any strength of any vector by name: `syc@-0.72`, `syc`, `syc@-0.7+gloomy@0.3`."""

    vectors: str  # what $WEIGHTSTEER_VECTORS says
    cache: AdapterCache
    given: dict[str, Given] = field(default_factory=dict)  # by the name that was asked for

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The adapter of this name; None, with the reason in the log, for what is no strength of a vector here.

        vLLM tells adapters apart by the request's name, in its prefix cache and within a batch. So this name has the
        hash of the content, and of two ways to write one strength each has its own.
        """
        try:
            found = self.given[lora_name] = await asyncio.to_thread(self._make, lora_name)
        except SteerError as error:
            log.warning("weightsteer: %s", error)
            return None
        called = f"{lora_name}-{hash_of(found.adapter)}"
        return LoRARequest(lora_name=called, lora_int_id=1, lora_path=str(found.adapter))  # vLLM sets the number

    def _make(self, text: str) -> Given:
        vectors = served_vectors(self.vectors)
        used = [vectors[name] for name in parse_strengths(split_pin(text)[0], vectors)]
        stamps = {folder: stamp(folder) for folder in used}  # before it is read: what changes meanwhile is seen later
        return Given(self.cache.adapter(text, vectors), stamps)

    def replaced(self, names: Collection[str]) -> list[str]:
        """Those of the names that mean another adapter now than the one that vLLM was given for them.

        Vectors are read only where a file was touched. One that is gone, or cannot be read, counts as unchanged.
        """
        now = {folder: _stamp(folder) for name in names if name in self.given for folder in self.given[name].stamps}
        return [name for name in names if name in self.given and self._is_replaced(name, now)]

    def _is_replaced(self, text: str, now: Mapping[Path, tuple[object, ...]]) -> bool:
        given = self.given[text]
        stamps = {folder: now[folder] or was for folder, was in given.stamps.items()}
        if stamps == given.stamps:
            return False
        try:
            target = self.cache.plan(text, served_vectors(self.vectors)).target
        except SteerError as error:
            log.warning("weightsteer: %s; vLLM keeps what it has", error)
            target = given.adapter
        self.given[text] = Given(given.adapter, stamps)  # looked at: it is not read again until the next change
        return target != given.adapter


def _stamp(folder: Path) -> tuple[object, ...]:
    """A vector's stamp; () while it is not there, as between the two renames that replace a folder."""
    try:
        return stamp(folder)
    except (OSError, SteerError):
        return ()


def register() -> None:
    """What vLLM calls at its start, in each of its processes."""
    if text := os.environ.get(VECTORS):
        LoRAResolverRegistry.register_resolver(PLUGIN, SteeringResolver(text, AdapterCache(adapters_folder())))
