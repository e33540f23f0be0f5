"""theta + k w in memory: any k at once, one k per row of the batch, every bit restored on leaving.

Nothing is merged. A weight's delta is added to its module's output, y + k (x A^T) B^T, so k changes
in place, quantised bases work, and bf16's 8 bits do not round the vector away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .delta import Delta, in_memory, layout_of
from .errors import SteerError
from .lowrank import ALONE, LowRank
from .workers import one_thread_if_small

SWAPPED = "_weightsteer_swapped"  # marks a parameter that is swapped, and what stands in for it


class HasModel(Protocol):
    """Anything with a `model`: our LM, or a user's own wrapper."""

    @property
    def model(self) -> nn.Module: ...


class Dial:
    """The strength of a running `applied` block; set `k` to turn it.

    `k` is a number, or a tensor (batch,) with one k per row of the batch.
    """

    def __init__(self, k: float | Tensor) -> None:
        self.on_turn: list[Callable[[], None]] = []  # called after each change of k
        self.k = k

    @property
    def k(self) -> float | Tensor:
        """Multiples of the vector; 0 is the base model bit for bit."""
        return self._k

    @k.setter
    def k(self, k: float | Tensor) -> None:
        self._k = k if isinstance(k, Tensor) else float(k)
        for follow in self.on_turn:
            follow()

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
    """Shape k (batch,) so that it multiplies output (batch, ...).

    Raises:
        SteerError: the batch has another number of rows than k.
    """
    if k.shape != output.shape[:1]:
        raise SteerError(
            f"k has shape {tuple(k.shape)} and the batch {output.shape[0]} rows; "
            "give one number, or a tensor with one k per row"
        )
    return k.to(output).reshape(-1, *[1] * (output.ndim - 1))


@contextmanager
def steered(model: nn.Module, deltas: Mapping[str, Delta], k: float | Tensor) -> Iterator[Dial]:
    """Add k * deltas to `model` until the block is left (see `WeightVector.applied`)."""
    dial = Dial(k)
    checked = []
    for name, delta in deltas.items():
        module = _owner(model, name, delta)
        _refuse_misplaced(model, module, name, delta)
        checked.append((name, module, in_memory(name, delta)))
    with ExitStack() as stack:
        for name, module, delta in checked:
            stack.enter_context(_attached(model, module, name, delta, dial))
        yield dial


def _owner(model: nn.Module, name: str, delta: Delta) -> nn.Module:
    """The module that holds parameter `name`, after checking that the delta fits it."""
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise SteerError(
            f"{name}: the vector changes it, but this model has no such parameter; "
            "use the base model named in the vector's card"
        ) from None
    expected = _parameter_shape(module, leaf)
    if expected is not None and tuple(delta.shape) != expected:
        raise SteerError(
            f"{name}: the vector was made on a base of shape {tuple(delta.shape)}, this model has {expected}; "
            "use the base model named in the vector's card"
        )
    if expected is None:
        raise SteerError(f"{name}: this model's {type(module).__name__} has no such parameter")
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


@contextmanager
def _attached(model: nn.Module, module: nn.Module, name: str, delta: LowRank | Tensor, dial: Dial) -> Iterator[None]:
    """Hook the module if its output is linear in the parameter, else swap the parameter."""
    if name.endswith(".weight") and is_linear(module):
        hook: Any = _weight_hook(delta, dial, transposed=_is_conv1d(module))
    elif name.endswith(".bias") and is_linear(module) and isinstance(delta, Tensor):
        hook = _bias_hook(delta, dial)
    elif isinstance(module, nn.Embedding) and isinstance(delta, LowRank):
        hook = _embedding_hook(delta, dial)
    elif isinstance(delta, Tensor):
        with _swapped(model, module._parameters[name.rpartition(".")[2]], delta, dial):
            yield
        return
    else:
        raise SteerError(
            f"{name}: a factored delta on {type(module).__name__} cannot be added in memory; "
            "linear layers can, other layers need a dense delta"
        )
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


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


def _weight_hook(delta: LowRank | Tensor, dial: Dial, *, transposed: bool) -> Callable[..., Tensor | None]:
    if isinstance(delta, Tensor):
        return _dense_hook(delta.T if transposed else delta, dial)
    return _low_rank_hook(delta.B, delta.A, dial) if transposed else _low_rank_hook(delta.A.T, delta.B.T, dial)


def _low_rank_hook(into: Tensor, out: Tensor, dial: Dial) -> Callable[..., Tensor | None]:
    """y + k (x into) out, into (d_in, r) and out (r, d_out); they follow the input's device and dtype, cast once."""
    factors = _Follower(into.contiguous(), out.contiguous())

    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if dial.is_zero:
            return None
        first, second = factors.like(output)
        x = args[0].to(output).reshape(-1, first.shape[0])
        with one_thread_if_small(x.shape[0] * first.shape[1] * (x.shape[1] + second.shape[1]), output.device):
            hidden = torch.mm(x, first)  # (rows, r)
            if isinstance(dial.k, Tensor):
                hidden = hidden.view(*output.shape[:-1], -1)
                return output + (per_row(dial.k, hidden) * hidden) @ second
            flat = output.reshape(-1, output.shape[-1])
            if output.requires_grad:
                return torch.addmm(flat, hidden, second, alpha=dial.k).view_as(output)
            return flat.addmm_(hidden, second, alpha=dial.k).view_as(output)  # the module's own fresh output

    return add


def _embedding_hook(delta: LowRank, dial: Dial) -> Callable[..., Tensor | None]:
    """y + k B[tokens] A: only the rows of the tokens are formed."""
    factors = _Follower(delta.B, delta.A)

    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if dial.is_zero:
            return None
        B, A = factors.like(output)
        return dial.add_to(output, nn.functional.embedding(args[0], B) @ A)

    return add


def _dense_hook(delta: Tensor, dial: Dial) -> Callable[..., Tensor | None]:
    weight = _Follower(delta)

    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if dial.is_zero:
            return None
        (D,) = weight.like(output)
        return dial.add_to(output, nn.functional.linear(args[0].to(output), D))

    return add


def _bias_hook(delta: Tensor, dial: Dial) -> Callable[..., Tensor | None]:
    bias = _Follower(delta)

    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if dial.is_zero:
            return None
        (b,) = bias.like(output)
        return dial.add_to(output, b.expand_as(output))

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
def _swapped(model: nn.Module, original: nn.Parameter | None, delta: Tensor, dial: Dial) -> Iterator[None]:
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
        if isinstance(dial.k, Tensor):
            raise SteerError("one k per row is not possible for norms and embeddings; give one number")
        shifted = original
        if not dial.is_zero:
            summed = torch.add(original.detach().float(), moved, alpha=dial.k).to(original.dtype)
            shifted = nn.Parameter(summed, requires_grad=False)
            setattr(shifted, SWAPPED, True)
        for module, leaf in places:
            module._parameters[leaf] = shifted

    follow()
    dial.on_turn.append(follow)
    setattr(original, SWAPPED, True)
    try:
        yield
    finally:
        delattr(original, SWAPPED)
        dial.on_turn.remove(follow)
        for module, leaf in places:
            module._parameters[leaf] = original
