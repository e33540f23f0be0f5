"""theta + k w in memory: any k at once, one k per row of the batch, every bit restored on leaving.

Nothing is merged where a module's output is linear in the parameter: k times the delta is added to the output,
y + k (x A^T) B^T. So k changes in place, quantised bases work, and bf16's 8 bits do not round the vector away.
Norms, and dense changes of embeddings, are swapped for theta + k delta in their own dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..batches import values_of_rows
from ..errors import SteerError
from ..threads import one_thread_if_small
from .delta import Delta, layout_of, read_delta
from .low_rank import ALONE, LowRank

SWAPPED = "_weightsteer_swapped"  # marks a parameter that is swapped, and what stands in for it


class HasModel(Protocol):
    """Anything with a `model`: our LM, or a user's own wrapper."""

    @property
    def model(self) -> nn.Module: ...


Steerable = HasModel | nn.Module  # an LM, a transformers model or a PeftModel


class SteeringHandle:
    """The handle of a running `applied` block; set `k` to change the strength.

    `k` is a number, or a tensor (batch,) with one k per row of the batch. `lm` is what to generate with: what was
    given to `applied`, or for a system prompt the same under that prompt.
    """

    def __init__(self, k: float | Tensor, lm: Any = None) -> None:
        self.lm = lm
        self.on_change: list[Callable[[], None]] = []  # called after each change of k
        self.k = k

    @property
    def k(self) -> float | Tensor:
        """Multiples of the vector; 0 is the base model bit for bit."""
        return self._k

    @k.setter
    def k(self, k: float | Tensor) -> None:
        before = getattr(self, "_k", k)
        self._k = k if isinstance(k, Tensor) else float(k)
        try:
            for follow in self.on_change:
                follow()
        except SteerError:  # one of them refuses it: all go back
            self._k = before
            for follow in self.on_change:
                with suppress(SteerError):
                    follow()
            raise

    def add_to(self, output: Tensor, delta: Tensor) -> Tensor:
        """output + k * delta, with k spread over rows where it is a tensor."""
        if isinstance(self._k, float):
            return torch.add(output, delta, alpha=self._k)
        return output + per_row(self._k, output) * delta

    @property
    def is_zero(self) -> bool:
        """True when nothing is to be added, so that outputs stay bit-identical."""
        return isinstance(self._k, float) and self._k == 0.0


def per_row(k: Tensor, output: Tensor) -> Tensor:
    """Shape k (batch,) so that it multiplies output (batch, ...); inside `rows_of_batch`, k has one entry a prompt.

    Raises:
        SteerError: the batch has another number of rows than k.
    """
    k = values_of_rows(k)
    if k.shape != output.shape[:1]:
        raise SteerError(
            f"k has shape {tuple(k.shape)} and the batch {output.shape[0]} rows; "
            "give one number, or a tensor with one k per row"
        )
    return k.to(output).reshape(-1, *[1] * (output.ndim - 1))


def model_of(target: Steerable) -> nn.Module:
    """The model whose modules are hooked: an LM's own, and of a PeftModel the one that its adapters sit in."""
    model = target if isinstance(target, nn.Module) else target.model
    inner = getattr(model, "get_base_model", None)
    return inner() if inner else model


@contextmanager
def steer(target: Steerable, deltas: Mapping[str, Delta], k: float | Tensor) -> Iterator[SteeringHandle]:
    """Add k * deltas to a model until the block is left (see `WeightVector.applied`)."""
    model, handle = model_of(target), SteeringHandle(k, target)
    checked = []
    for name, delta in deltas.items():
        module = _owner(model, name, delta)
        _refuse_misplaced(model, module, name, delta)
        checked.append((name, module, read_delta(name, delta)))
    with ExitStack() as stack:
        for name, module, delta in checked:
            stack.enter_context(_attach(model, module, name, delta, handle))
        yield handle


def _owner(model: nn.Module, name: str, delta: Delta) -> nn.Module:
    """The module that holds parameter `name`, after checking that the delta fits it; inside a PEFT layer, its base."""
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise SteerError(
            f"{name}: the vector changes it, but this model ({type(model).__name__}) has no such parameter; "
            "use the base model named in the vector's card"
        ) from None
    base_layer = getattr(module, "base_layer", None)
    module = base_layer if isinstance(base_layer, nn.Module) else module
    expected = _parameter_shape(module, leaf)
    if expected is None:
        raise SteerError(f"{name}: this model's {type(module).__name__} has no such parameter")
    if tuple(delta.shape) != expected:
        raise SteerError(
            f"{name}: the vector was made on a base of shape {tuple(delta.shape)}, this model has {expected}; "
            "use the base model named in the vector's card"
        )
    return module


def _parameter_shape(module: nn.Module, leaf: str) -> tuple[int, ...] | None:
    """Logical shape of a parameter: quantised modules store it packed, but know their features."""
    if leaf == "weight" and hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    parameter = getattr(module, leaf, None)
    if isinstance(parameter, Tensor):
        return tuple(parameter.shape)
    if leaf == "bias" and hasattr(module, "out_features"):
        return (int(module.out_features),)  # type: ignore[arg-type]  # a bias that the base lacks can be added
    return None


def _attach(
    model: nn.Module, module: nn.Module, name: str, delta: LowRank | Tensor, handle: SteeringHandle
) -> AbstractContextManager[None]:
    """Hook the module where its output is linear in the parameter, else put theta + k delta in its place."""
    hook = _hook_of(module, name, delta, handle)
    if hook is not None:
        return _hooked(module, hook)
    if isinstance(delta, Tensor):
        return _swap(model, module._parameters[name.rpartition(".")[2]], delta, handle)
    raise SteerError(
        f"{name}: a factored delta on {type(module).__name__} cannot be added in memory; "
        "linear layers can, other layers need a dense delta"
    )


Hook = Callable[..., Tensor | None]


def _hook_of(module: nn.Module, name: str, delta: LowRank | Tensor, handle: SteeringHandle) -> Hook | None:
    """What adds the delta to the module's output; None where the output is not linear in the parameter."""
    if is_linear(module) and name.endswith(".weight"):
        return _weight_hook(delta, handle, transposed=_is_conv1d(module))
    if is_linear(module) and name.endswith(".bias") and isinstance(delta, Tensor):
        return _bias_hook(delta, handle)
    if isinstance(module, nn.Embedding) and isinstance(delta, LowRank):
        return _embedding_hook(delta, handle)
    return None


@contextmanager
def _hooked(module: nn.Module, hook: Hook) -> Iterator[None]:
    registered = module.register_forward_hook(hook)
    try:
        yield
    finally:
        registered.remove()


def is_linear(module: nn.Module) -> bool:
    """Whether the module's output is linear in its weight and bias: Linear, its quantised kin, and Conv1D."""
    return hasattr(module, "out_features") or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight is stored (d_in, d_out)."""
    return hasattr(module, "nx") and hasattr(module, "nf")


def _refuse_misplaced(model: nn.Module, module: nn.Module, name: str, delta: Delta) -> None:
    """Raise where the module is not of the kind that the delta was trained on."""
    layout = layout_of(delta)
    if isinstance(delta, LowRank) and layout == "linear" and _is_conv1d(module):
        raise SteerError(
            f"{name}: is stored (d_in, d_out) in this model, and the adapter's config says fan_in_fan_out=false; "
            "set it to true"
        )
    if layout not in ALONE or not isinstance(module, nn.Embedding):
        return
    if sum(parameter is module.weight for m in model.modules() for parameter in m._parameters.values()) > 1:
        raise SteerError(
            f"{name}: was trained on the input embedding alone, and this model ties it to the output; "
            "retrain without the embedding, or on a model that is not tied"
        )


def _weight_hook(delta: LowRank | Tensor, handle: SteeringHandle, *, transposed: bool) -> Hook:
    if isinstance(delta, Tensor):
        return _dense_hook(delta.T if transposed else delta, handle)
    return _low_rank_hook(delta.B, delta.A, handle) if transposed else _low_rank_hook(delta.A.T, delta.B.T, handle)


def _low_rank_hook(into: Tensor, out: Tensor, handle: SteeringHandle) -> Hook:
    """y + k (x into) out, into (d_in, r) and out (r, d_out); they follow the input's device and dtype, cast once."""
    factors = _Follower(into.contiguous(), out.contiguous())

    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if handle.is_zero:
            return None
        first, second = factors.like(output)
        x = args[0].to(output).reshape(-1, first.shape[0])
        with one_thread_if_small(x.shape[0] * first.shape[1] * (x.shape[1] + second.shape[1]), output.device):
            hidden = torch.mm(x, first)  # (rows, r)
            if isinstance(handle.k, Tensor):
                hidden = hidden.view(*output.shape[:-1], -1)
                return output + (per_row(handle.k, hidden) * hidden) @ second
            flat = output.reshape(-1, output.shape[-1])
            if output.requires_grad:
                return torch.addmm(flat, hidden, second, alpha=handle.k).view_as(output)
            return flat.addmm_(hidden, second, alpha=handle.k).view_as(output)  # the module's own fresh output

    return add


def _embedding_hook(delta: LowRank, handle: SteeringHandle) -> Hook:
    """y + k B[tokens] A: only the rows of the tokens are formed."""
    factors = _Follower(delta.B, delta.A)

    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if handle.is_zero:
            return None
        B, A = factors.like(output)
        return handle.add_to(output, nn.functional.embedding(args[0], B) @ A)

    return add


def _dense_hook(delta: Tensor, handle: SteeringHandle) -> Hook:
    weight = _Follower(delta)

    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if handle.is_zero:
            return None
        (D,) = weight.like(output)
        return handle.add_to(output, nn.functional.linear(args[0].to(output), D))

    return add


def _bias_hook(delta: Tensor, handle: SteeringHandle) -> Hook:
    bias = _Follower(delta)

    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
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


@contextmanager
def _swap(model: nn.Module, original: nn.Parameter | None, delta: Tensor, handle: SteeringHandle) -> Iterator[None]:
    """Put parameter + k * delta wherever the parameter stands (tied weights too), the original on leaving."""
    assert original is not None
    if getattr(original, SWAPPED, False):
        raise SteerError("another vector is changing the same norm or embedding; add the vectors and apply the sum")
    places = [
        (module, leaf)
        for module in model.modules()
        for leaf, parameter in module._parameters.items()
        if parameter is original
    ]
    moved = delta.to(device=original.device, dtype=torch.float32)

    def follow() -> None:
        if isinstance(handle.k, Tensor):
            raise SteerError("one k per row is not possible for norms and embeddings; give one number")
        shifted = original
        if not handle.is_zero:
            summed = torch.add(original.detach().float(), moved, alpha=handle.k).to(original.dtype)
            shifted = nn.Parameter(summed, requires_grad=False)
            setattr(shifted, SWAPPED, True)
        for module, leaf in places:
            module._parameters[leaf] = shifted

    follow()
    handle.on_change.append(follow)
    setattr(original, SWAPPED, True)
    try:
        yield
    finally:
        delattr(original, SWAPPED)
        handle.on_change.remove(follow)
        for module, leaf in places:
            module._parameters[leaf] = original
