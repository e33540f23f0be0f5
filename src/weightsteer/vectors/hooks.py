"""theta + k w in memory: any k at once, one k per row of the batch, every bit restored on leaving.

Nothing is merged where a module's output is linear in the parameter: k times the delta is added to the output,
y + k (x A^T) B^T. So k changes in place, quantised bases work, and bf16's 8 bits do not round the vector away. This
is done where the module's own forward pass is known to be linear, and where nothing else reads its weight. All other
parameters are swapped for theta + k delta in their own dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SteerError
from ..threads import one_thread_if_small
from .delta import Delta, layout_of, read_delta
from .handle import SteeringHandle, noting_the_batch
from .layer_kinds import (
    embedding_scale,
    is_conv1d,
    is_linear,
    is_plain,
    is_plain_linear,
    is_plain_lora,
    parameter_shape,
)
from .layer_use import LayerUse
from .low_rank import ALONE, LowRank
from .steerable import Places, Steerable, claim, model_of
from .swap import swapped

Hook = Callable[..., Tensor | None]


@contextmanager
def steer(target: Steerable, deltas: Mapping[str, Delta], k: float | Tensor) -> Iterator[SteeringHandle]:
    """Add k * deltas to a model until the block is left (see `WeightVector.applied`)."""
    model, handle = model_of(target), SteeringHandle(k, target)
    steered = _Steered(model)
    checked = []
    for name, delta in deltas.items():
        steered.refuse_misfit(name, delta)
        checked.append((name, read_delta(name, delta), layout_of(delta) in ALONE))
    with claim(model), ExitStack() as stack:
        stack.enter_context(noting_the_batch(model, handle))
        for name, held, alone in checked:
            stack.enter_context(steered.attach(name, held, handle, alone=alone))
        yield handle


class _Steered:
    """One model that is to be steered: where each parameter stands, and how it can be changed."""

    def __init__(self, model: nn.Module) -> None:
        self.places, self.use = Places(model), LayerUse(model)
        self._taken: dict[tuple[int, str], str] = {}  # a parameter's place -> the name that changes it

    def refuse_misfit(self, name: str, delta: Delta) -> None:
        """Raise where the model has no such parameter, one of another shape, or one that another name changes too."""
        leaf = name.rpartition(".")[2]
        for module in self.places.modules(name):
            expected = parameter_shape(module, leaf)
            if expected is None:
                raise SteerError(f"{name}: this model's {type(module).__name__} has no such parameter")
            if tuple(delta.shape) != expected and not (_is_turned(module, delta) and delta.shape[::-1] == expected):
                raise SteerError(
                    f"{name}: the vector was made on a base of shape {tuple(delta.shape)}, this model has {expected}; "
                    "use the base model named in the vector's card"
                )
            other = self._taken.setdefault((id(module), leaf), name)
            if other != name:
                raise SteerError(f"{name} and {other} are one parameter of this model; keep one of them in the vector")
            self._refuse_misplaced(module, name, delta)

    def _refuse_misplaced(self, module: nn.Module, name: str, delta: Delta) -> None:
        """Raise where the module is not of the kind that the delta was trained on."""
        layout = layout_of(delta)
        square = len(delta.shape) == 2 and delta.shape[0] == delta.shape[1]
        if isinstance(delta, LowRank) and layout == "linear" and is_conv1d(module) and square:
            raise SteerError(
                f"{name}: is stored (d_in, d_out) in this model, and the adapter's config says fan_in_fan_out=false; "
                "set it to true"
            )

    def attach(
        self, name: str, delta: LowRank | Tensor, handle: SteeringHandle, *, alone: bool
    ) -> AbstractContextManager[None]:
        """Hook the parameter's modules where their output is linear in it, else put theta + k delta in its place.

        `alone`: the delta was trained for one place, and what is tied to it stays as it is.
        """
        leaf = name.rpartition(".")[2]
        modules = self.places.modules(name)
        if isinstance(delta, LowRank) and _is_turned(modules[0], delta):
            delta = LowRank(delta.A.T, delta.B.T)
        shared = [place for module in modules for place in self.places.sharing(module, leaf)]
        if alone:
            shared = [(module, leaf) for module in modules]
        elif is_linear(modules[0]):  # what is trained on a head that is tied to an embedding changes the head alone
            shared = [(module, leaf) for module, leaf in shared if not isinstance(module, nn.Embedding)]
        hooks = [self._hook_of(module, name, delta, handle, only=len(shared) == 1) for module, _ in shared]
        if all(hook is not None for hook in hooks):
            return _hooked([(module, hook) for (module, _), hook in zip(shared, hooks, strict=True) if hook])
        return _all_swapped(name, shared, delta, handle)

    def _hook_of(
        self, module: nn.Module, name: str, delta: LowRank | Tensor, handle: SteeringHandle, *, only: bool
    ) -> Hook | None:
        """What adds the delta to the module's output; None where that would not be the same as theta + k delta."""
        leaf = name.rpartition(".")[2]
        called = self.use.only_called(module) and is_plain_lora(self.places.wrapper_of(module))
        whole = is_plain(module._parameters.get("weight"))
        if isinstance(module, nn.Embedding):
            scale = embedding_scale(module) if called and only and whole else None
            return None if scale is None or not isinstance(delta, LowRank) else _embedding_hook(delta, handle, scale)
        if not is_linear(module) or not called or (whole and not is_plain_linear(module)):
            return None
        if leaf == "bias" and isinstance(delta, Tensor):
            return _bias_hook(delta, handle)
        return _weight_hook(delta, handle, transposed=is_conv1d(module)) if leaf == "weight" else None


def _is_turned(module: nn.Module, delta: Delta) -> bool:
    """Whether factors were read by a fan_in_fan_out that does not fit the module: PEFT goes by the module."""
    if not isinstance(delta, LowRank) or not is_linear(module):
        return False
    if is_conv1d(module):
        return delta.layout == "linear" and tuple(delta.shape) != parameter_shape(module, "weight")
    return delta.layout == "conv1d"


@contextmanager
def _hooked(hooks: Sequence[tuple[nn.Module, Hook]]) -> Iterator[None]:
    with ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield


@contextmanager
def _all_swapped(
    name: str, places: Sequence[tuple[nn.Module, str]], delta: LowRank | Tensor, handle: SteeringHandle
) -> Iterator[None]:
    """Swap what stands at the places: one tied parameter, or PEFT's copies of a module, each for its own sum."""
    by_parameter: dict[int, list[tuple[nn.Module, str]]] = {}
    for module, leaf in places:
        parameter = module._parameters.get(leaf)
        if not is_plain(parameter):
            raise SteerError(
                f"{name}: can only be changed in its place, and this {type(module).__name__} is quantised, offloaded "
                "or sharded, or has no such parameter; load the model whole, in 16 or 32 bits"
            )
        by_parameter.setdefault(id(parameter), []).append((module, leaf))
    with ExitStack() as stack:
        for group in by_parameter.values():
            stack.enter_context(swapped(name, group, delta, handle))
        yield


def _input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What a layer was called with: its one argument, whether it was named or not."""
    found = args[0] if args else next(iter(kwargs.values()))
    assert isinstance(found, Tensor)
    return found


def _weight_hook(delta: LowRank | Tensor, handle: SteeringHandle, *, transposed: bool) -> Hook:
    if isinstance(delta, Tensor):
        return _dense_hook(delta.T if transposed else delta, handle)
    return _low_rank_hook(delta.B, delta.A, handle) if transposed else _low_rank_hook(delta.A.T, delta.B.T, handle)


def _low_rank_hook(into: Tensor, out: Tensor, handle: SteeringHandle) -> Hook:
    """y + k (x into) out, into (d_in, r) and out (r, d_out); they follow the input's device and dtype, cast once."""
    factors = _Follower(into.contiguous(), out.contiguous())

    def add(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Tensor | None:
        if handle.is_zero:
            return None
        first, second = factors.like(output)
        x = _input(args, kwargs).to(output).reshape(-1, first.shape[0])
        with one_thread_if_small(x.shape[0] * first.shape[1] * (x.shape[1] + second.shape[1]), output.device):
            hidden = torch.mm(x, first)  # (rows, r)
            if isinstance(handle.k, Tensor):
                hidden = hidden.view(*output.shape[:-1], -1)
                return output + (handle.per_row(hidden) * hidden) @ second
            flat = output.reshape(-1, output.shape[-1])
            if output.requires_grad:
                return torch.addmm(flat, hidden, second, alpha=handle.k).view_as(output)
            return flat.addmm_(hidden, second, alpha=handle.k).view_as(output)  # the module's own fresh output

    return add


def _embedding_hook(delta: LowRank, handle: SteeringHandle, scale: float) -> Hook:
    """y + k c B[tokens] A, c the module's own scale: only the rows of the tokens are formed."""
    factors = _Follower(delta.B * scale, delta.A)

    def add(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Tensor | None:
        if handle.is_zero:
            return None
        B, A = factors.like(output)
        return handle.add_to(output, nn.functional.embedding(_input(args, kwargs), B) @ A)

    return add


def _dense_hook(delta: Tensor, handle: SteeringHandle) -> Hook:
    weight = _Follower(delta)

    def add(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Tensor | None:
        if handle.is_zero:
            return None
        (D,) = weight.like(output)
        return handle.add_to(output, nn.functional.linear(_input(args, kwargs).to(output), D))

    return add


def _bias_hook(delta: Tensor, handle: SteeringHandle) -> Hook:
    bias = _Follower(delta)

    def add(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Tensor | None:
        if handle.is_zero:
            return None
        (b,) = bias.like(output)
        return handle.add_to(output, b.expand_as(output))

    return add


class _Follower:
    """Tensors in the device and dtype of the activations they meet, cast from the originals once."""

    def __init__(self, *tensors: Tensor) -> None:
        self.originals = self.tensors = tensors

    def like(self, other: Tensor) -> tuple[Tensor, ...]:
        first = self.tensors[0]
        if first.device != other.device or first.dtype != other.dtype:
            self.tensors = tuple(tensor.to(other) for tensor in self.originals)
        return self.tensors
