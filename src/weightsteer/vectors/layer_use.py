"""Which layers of a model are used by nothing but a call, by the source of the model's classes.

A change that is added to a layer's output reaches the model only through calls of this layer. Some models read a
layer's weight instead: Mamba multiplies by `self.dt_proj.weight`, and its kernels take several weights at once. On
which way a model goes may depend on the device, the cache and the mode, so we do not try it out: we read the source. A
layer counts as only called if every use of its name there is a call, or looks at its dtype, shape or absence. Where the
source cannot be read, no layer counts.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from types import ModuleType

from torch import nn

from ..checkpoints.plain_names import INSERTED, PEFT_LAYERS
from .layer_kinds import is_linear

# Libraries whose classes call the layers that they are given, or wrap them; PEFT's layers are looked at one by one.
TRUSTED = (
    "torch.nn.modules.module.",
    "torch.nn.modules.container.",
    "torch._dynamo.",
    "peft.",
    "accelerate.",
    "transformers.modeling_",
    "transformers.generation.",
    "transformers.pytorch_utils.",
)
# Methods that prepare a model: what they do with a layer is no part of a forward pass.
PREPARING = ("__init__", "_init_", "init_", "_resize_", "resize_", "_tie_", "tie_", "set_")
GETTERS = ("get_input_embeddings", "get_output_embeddings")
VALUES = ("weight", "bias")
FORM = ("dtype", "device", "shape", "ndim", "requires_grad", "is_cuda", "is_meta")  # of a weight, but no value of it
BEHIND = ("forward", "parameters", "named_parameters", "state_dict", "_parameters")  # ways around a layer's call
LOOKING = ("isinstance", "hasattr", "len", "type")
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)  # what stands between an attribute and layers

Use = tuple[str, str]  # the class whose `self` has the attribute ("" if it is anyone's), and the attribute


class LayerUse:
    """Answers for one model which of its layers are only called."""

    def __init__(self, model: nn.Module) -> None:
        self._holders: dict[int, list[tuple[nn.Module, str]]] = {}  # a module -> who has it, under which name
        for parent in model.modules():
            for name, child in parent._modules.items():
                self._holders.setdefault(id(child), []).append((parent, name))
        found = [
            _other_uses(source)
            for source in {s for m in model.modules() if m._modules and not is_linear(m) for s in _sources(m)}
        ]
        self._readable = all(uses is not None for uses in found)
        self._otherwise = frozenset[Use]().union(*(uses for uses in found if uses is not None))

    def only_called(self, module: nn.Module) -> bool:
        """Whether nothing but a call of the module uses its weight or bias."""
        return self._readable and not self._otherwise.intersection(self._known_as(module))

    def _known_as(self, module: nn.Module) -> Iterator[Use]:
        """How the model's source may name a module; one in a list or under a wrapper goes by the list's name."""
        for parent, name in self._holders.get(id(module), []):
            peft_layer = type(parent).__module__.startswith("peft.tuners.")
            if isinstance(parent, CONTAINERS) or peft_layer or name in (*INSERTED, *PEFT_LAYERS):
                yield from self._known_as(parent)
            else:
                yield "", name
                for cls in type(parent).__mro__:
                    yield cls.__qualname__, name


def _sources(module: nn.Module) -> set[str]:
    """Names of the Python modules whose code runs in the forward pass of a module that holds others."""
    names = {cls.__module__ for cls in type(module).__mro__ if issubclass(cls, nn.Module)}
    forward = vars(module).get("forward")  # put on this one object: a patch of the forward pass
    if forward is not None and "_old_forward" not in vars(module):  # accelerate keeps the old one, and calls it
        names.add(getattr(inspect.unwrap(forward), "__module__", "") or "")
    return {name for name in names if not f"{name}.".startswith(TRUSTED)}


@cache
def _other_uses(source: str) -> frozenset[Use] | None:
    """What a Python module uses other than by a call; None if it reads a weight of a layer that it does not name."""
    module = sys.modules.get(source)
    try:
        tree = ast.parse(inspect.getsource(module)) if isinstance(module, ModuleType) else None
    except (OSError, TypeError, SyntaxError):
        tree = None
    if tree is None:
        return None
    uses: set[Use] = set()
    for node, parents, owner in _forward_code(tree, (), ""):
        if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Load) or _is_harmless(node, parents):
            continue
        if node.attr in VALUES and not _names_its_layer(node.value):
            return None
        uses.add((owner if isinstance(node.value, ast.Name) and node.value.id == "self" else "", node.attr))
    return frozenset(uses)


Parents = tuple[ast.AST, ...]


def _forward_code(node: ast.AST, parents: Parents, owner: str) -> Iterator[tuple[ast.AST, Parents, str]]:
    """Every node that may run in a forward pass, the nodes around it with the nearest first, and its class."""
    if isinstance(node, ast.FunctionDef) and (node.name.startswith(PREPARING) or node.name in GETTERS):
        return
    if isinstance(node, ast.ClassDef):
        owner = f"{owner}.{node.name}" if owner else node.name
    yield node, parents, owner
    for child in ast.iter_child_nodes(node):
        yield from _forward_code(child, (node, *parents[:3]), owner)


def _names_its_layer(value: ast.expr) -> bool:
    """Whether `value.weight` says whose weight it is: `self`, an attribute, or one of a list that is an attribute."""
    inner = value.value if isinstance(value, ast.Subscript) else value
    return isinstance(inner, ast.Attribute) or (isinstance(inner, ast.Name) and inner.id in ("self", "cls"))


def _is_harmless(used: ast.AST, parents: Parents) -> bool:
    """Whether this use of a layer, or of its weight, is a call or gives no values of a weight away."""
    if isinstance(used, ast.Attribute) and used.attr in VALUES:
        return _is_only_asked(used, parents[0])
    parent, *around = parents
    if isinstance(parent, ast.Subscript) and parent.value is used and around:  # self.layers[i]
        used, (parent, *around) = parent, around
    if isinstance(parent, ast.Call) and parent.func is used:
        return True
    if isinstance(parent, ast.Attribute):
        if parent.attr in VALUES:
            return bool(around) and _is_only_asked(parent, around[0])
        return parent.attr not in BEHIND
    return _is_only_asked(used, parent)


def _is_only_asked(used: ast.AST, parent: ast.AST) -> bool:
    """Whether an expression is only asked for its kind: its dtype, its class, whether it is None."""
    if isinstance(parent, ast.Attribute):
        return parent.attr in FORM
    if isinstance(parent, ast.Call):
        return isinstance(parent.func, ast.Name) and parent.func.id in LOOKING
    if isinstance(parent, ast.Compare):
        return all(isinstance(op, ast.Is | ast.IsNot) for op in parent.ops)
    if isinstance(parent, ast.If | ast.IfExp):
        return parent.test is used
    return isinstance(parent, ast.UnaryOp) and isinstance(parent.op, ast.Not)
