from __future__ import annotations

import torch

from conftest import random_vector, tiny_lm
from weightsteer.run_card import RunCard
from weightsteer.steering.several_k import generate_at_strengths
from weightsteer.vectors.weight_vector import WeightVector


def test_a_fan_is_each_strength_alone() -> None:
    lm = tiny_lm(seed=5)
    linear = random_vector(lm)
    norms = WeightVector({"model.norm.weight": torch.linspace(-1, 1, 32)}, RunCard("vector"))
    ks = [-2.0, 0.0, 1.5]
    for vector in (linear, linear + norms):
        alone = []
        for k in ks:
            with vector.applied(lm, k):
                alone += lm.generate(["What is tea?"], max_new_tokens=6)
        assert generate_at_strengths(vector, lm, "What is tea?", ks, max_new_tokens=6) == alone
        assert len(set(alone)) > 1
    assert generate_at_strengths(linear, lm, "Hi", [0.0], max_new_tokens=4) == lm.generate(["Hi"], max_new_tokens=4)
