"""The model that is steered: found under its wrappers, its parameters by name, and one thread at a time."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol
from weakref import WeakKeyDictionary

from torch import nn

from ..checkpoints.plain_names import INSERTED, PEFT_LAYERS, plain_name
from ..errors import SteerError


class HasModel(Protocol):
    """Anything with a `model`: our LM, or a user's own wrapper."""

    @property
    def model(self) -> nn.Module: ...


Steerable = HasModel | nn.Module  # an LM, a transformers model or a PeftModel

WRAPPED_AS = ("_orig_mod", "module", "pretrained_model")  # a whole model inside torch.compile's, DDP's, TRL's wrapper


def model_of(target: Steerable) -> nn.Module:
    """The model whose modules are hooked: an LM's own, and of a wrapped model (PEFT, DDP, compiled) what is inside."""
    return unwrapped(target if isinstance(target, nn.Module) else target.model)


def unwrapped(model: nn.Module) -> nn.Module:
    """What is inside the wrappers of a whole model."""
    while (inner := _inside(model)) is not None:
        model = inner
    return model


def _inside(model: nn.Module) -> nn.Module | None:
    base_of = getattr(model, "get_base_model", None)
    if base_of is not None:
        inner = base_of()
        return inner if isinstance(inner, nn.Module) and inner is not model else None
    for name in WRAPPED_AS:
        child = model._modules.get(name)
        if child is not None and (name == "pretrained_model" or len(model._modules) == 1):
            return child
    return None


class Places:
    """Where the parameters of a model stand: by the base's names, whatever wraps its layers."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._modules: dict[str, list[nn.Module]] = {}
        self._wrapper: dict[int, nn.Module] = {}  # a PEFT layer's base layer -> the PEFT layer
        self._sharing: dict[tuple[int, str], list[tuple[nn.Module, str]]] = {}  # a place -> those of its parameter
        adapters = set(getattr(model, "peft_config", None) or {}) | {"default"}
        for path, module in model.named_modules(remove_duplicate=False):  # a shared module has several names
            if not _wraps_another(module):
                name = plain_name(f"{path}.weight" if path else "weight", adapters).rpartition(".")[0]
                self._modules.setdefault(name, []).append(module)
        standing: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for leaf, parameter in module._parameters.items():
                if parameter is not None:  # looked up by place later, when another may stand there
                    self._sharing[id(module), leaf] = standing.setdefault(id(parameter), [])
                    self._sharing[id(module), leaf].append((module, leaf))
            base_layer = module._modules.get("base_layer")
            if base_layer is not None:
                self._wrapper[id(base_layer)] = module

    def modules(self, name: str) -> list[nn.Module]:
        """The modules that hold parameter `name`: more than one where PEFT keeps a copy of a module to train.

        Raises:
            SteerError: the model has no such module.
        """
        found = self._modules.get(name.rpartition(".")[0])
        if not found:
            raise SteerError(
                f"{name}: the vector changes it, but this model ({type(self.model).__name__}) has no such parameter; "
                "use the base model named in the vector's card"
            )
        return found

    def sharing(self, module: nn.Module, leaf: str) -> list[tuple[nn.Module, str]]:
        """Every (module, name in it) that has the same parameter: several where weights are tied."""
        return self._sharing.get((id(module), leaf), [(module, leaf)])

    def wrapper_of(self, module: nn.Module) -> nn.Module | None:
        """The PEFT layer around a module."""
        return self._wrapper.get(id(module))


def _wraps_another(module: nn.Module) -> bool:
    """Whether another module under the same name holds the parameters."""
    return isinstance(module, nn.ModuleDict) or any(name in module._modules for name in (*INSERTED, *PEFT_LAYERS))


_steered: WeakKeyDictionary[nn.Module, list[int]] = WeakKeyDictionary()  # a model -> the threads of its blocks
_lock = threading.Lock()


@contextmanager
def claim(model: nn.Module) -> Iterator[None]:
    """Keep other threads from steering the model until the block is left, and compiled code from missing the hooks.

    Blocks of one thread may be nested, and add up.

    Raises:
        SteerError: another thread steers the model, or FSDP shards it.
    """
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise SteerError("FSDP holds a piece of each weight here; steer the model before FSDP shards it")
    thread = threading.get_ident()
    with _lock:
        threads = _steered.setdefault(model, [])
        if any(other != thread for other in threads):
            raise SteerError(
                "another thread is steering this model, and the two changes would add up; steer in one thread at a "
                "time, with a lock, or give each thread its own copy of the model"
            )
        threads.append(thread)
    _let_compiled_code_see_hooks()
    try:
        yield
    finally:
        _let_compiled_code_see_hooks()  # something may have been compiled for the first time inside
        with _lock:
            threads.remove(thread)


def _let_compiled_code_see_hooks() -> None:
    """Have torch.compile check for hooks, which it leaves out by default; what it compiled without is dropped once."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.config.skip_nnmodule_hook_guards:
        dynamo.config.skip_nnmodule_hook_guards = False
        dynamo.reset()
