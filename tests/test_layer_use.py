from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from architectures import tiny
from weightsteer.run_card import RunCard
from weightsteer.vectors.delta import Delta
from weightsteer.vectors.layer_use import LayerUse
from weightsteer.vectors.low_rank import LowRank
from weightsteer.vectors.parameter_names import module_of
from weightsteer.vectors.weight_vector import WeightVector


class Reads(nn.Module):
    """Layers that are used in all the ways that go around a call, beside some that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.passed, self.local = (nn.Linear(6, 6) for _ in range(4))
        self.behind, self.asked, self.biased = (nn.Linear(6, 6) for _ in range(3))
        self.each = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
        self.indexed = nn.ModuleList([nn.Linear(6, 6)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.called(x) + x @ self.read.weight.T + product(self.passed, x)
        same = self.local
        x = x + nn.functional.linear(x, same.weight) + self.behind.forward(x) + self.biased(x) - self.biased.bias
        for layer in self.each:
            x = nn.functional.linear(x, layer.weight)
        asked = self.asked(x.to(self.asked.weight.dtype)) if self.asked.bias is not None else x
        return asked + self.indexed[0](input=x)


def product(layer: nn.Linear, x: Tensor) -> Tensor:
    return x @ layer.state_dict()["weight"].T


class Tuple(nn.Linear):
    """A router: scores and their order."""

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        scores = nn.functional.linear(input, self.weight, self.bias)
        return scores.softmax(-1), scores.argsort(-1)


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.attention = Tuple(6, 4), nn.MultiheadAttention(6, 2, batch_first=True)
        self.scaled = Scaled(10, 6)
        self.norms = nn.Embedding(10, 6, max_norm=1.0)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.scaled(tokens) + self.norms(tokens)
        return self.router(self.attention(x, x, x)[0])[0]


class Scaled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * torch.tensor(6**0.5, dtype=self.weight.dtype)


def changes(model: nn.Module, seed: int = 1) -> dict[str, Delta]:
    g = torch.Generator().manual_seed(seed)
    return {
        name: LowRank(torch.randn(p.shape[0], 2, generator=g), torch.randn(2, p.shape[1], generator=g))
        for name, p in model.named_parameters()
        if p.ndim == 2
    }


def twin_shifted(model: nn.Module, twin: nn.Module, deltas: dict[str, Delta], k: float) -> nn.Module:
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, delta in deltas.items():
            assert isinstance(delta, LowRank)
            twin.get_parameter(name).add_(k * delta.dense())
    return twin


@pytest.mark.parametrize(("kind", "x"), [(Reads, torch.randn(2, 3, 6)), (Routed, torch.tensor([[1, 2, 9], [0, 3, 3]]))])
@torch.no_grad()
def test_layers_that_are_read_are_steered_like_those_that_are_called(kind: type[nn.Module], x: Tensor) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    model(x)  # an embedding with max_norm changes its own weight when it is called
    before = {name: p.clone() for name, p in model.named_parameters()}
    for name, delta in changes(model).items():
        expected = twin_shifted(model, kind().eval(), {name: delta}, 0.5)(x)
        with WeightVector({name: delta}, RunCard("vector")).applied(model, 0.5):
            torch.testing.assert_close(model(x), expected, msg=name)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])


OTHERWISE = {
    "llama": set(),
    "mixtral": set(),  # its experts' down_proj is read, its other layers are called
    "bloom": {"self_attention.dense", "mlp.dense_4h_to_h"},  # in slices, if its config says so
    "jamba": {"mamba.dt_proj"},
    "mamba": {"mixer.dt_proj", "mixer.x_proj", "mixer.out_proj"},  # the last two by its kernels
}


@pytest.mark.parametrize("family", OTHERWISE)
def test_only_calls_and_looks_count(family: str) -> None:
    model = tiny(family)
    use = LayerUse(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)}
    otherwise = {module_of(f"{name}.weight") for name, module in layers.items() if not use.only_called(module)}
    assert otherwise == OTHERWISE[family]


def test_code_without_source_proves_nothing() -> None:
    made: dict[str, type[nn.Module]] = {}
    exec("from torch import nn\nclass Hidden(nn.Module): pass", made)
    model = made["Hidden"]()
    model.layer = nn.Linear(2, 2)
    assert not LayerUse(model).only_called(model.layer)


@torch.no_grad()
def test_a_dora_adapter_sees_the_steered_weight() -> None:
    """DoRA divides by the norm of the weight that it wraps, so the change has to be in the weight."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), torch.randn(2, 6)
    deltas = changes(model)
    other = twin_shifted(model, nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), deltas, 0.5)
    config = LoraConfig(target_modules=["0"], use_dora=True, r=2, init_lora_weights=False)
    adapted, expected = get_peft_model(model, config), get_peft_model(other, config)
    expected.load_state_dict({n: t for n, t in adapted.state_dict().items() if "lora_" in n}, strict=False)
    plain = adapted(x)
    with WeightVector(deltas, RunCard("vector")).applied(adapted, 0.5):
        torch.testing.assert_close(adapted(x), expected(x))
    assert torch.equal(adapted(x), plain)
