"""What steering costs while a model runs: hooks in generation, and shared prompts in scoring."""

from __future__ import annotations

import time

import torch
from measure import Usage, in_turn, table, time_function

from weightsteer.example_files.load import load_pairs
from weightsteer.lm import LM
from weightsteer.run_card import RunCard
from weightsteer.scoring import score_choices
from weightsteer.vectors.low_rank import LowRank
from weightsteer.vectors.weight_vector import WeightVector

BATCH, PROMPT, TOKENS = 8, 60, 64


def vector_for(lm: LM, rank: int) -> WeightVector:
    """A random vector of a trained one's form: every linear layer of the blocks, at the rank of two LoRAs."""
    g = torch.Generator().manual_seed(0)
    deltas = {
        f"{name}.weight": LowRank(
            1e-4 * torch.randn(module.out_features, rank, generator=g),
            torch.randn(rank, module.in_features, generator=g),
        )
        for name, module in lm.model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    return WeightVector(deltas, RunCard("vector"))


def hooks(runs: int) -> str:
    """Time per decoding step with and without the hooks."""
    lm = LM.load(device="cpu", dtype="float32")
    prompts = torch.randint(5, 1000, (BATCH, PROMPT), generator=torch.Generator().manual_seed(0))

    def decode() -> Usage:
        with torch.no_grad():
            cache = lm.model(prompts, use_cache=True, logits_to_keep=1).past_key_values
            start = time.perf_counter()
            for _ in range(TOKENS):
                lm.model(prompts[:, -1:], past_key_values=cache, use_cache=True)
            return Usage((time.perf_counter() - start) / TOKENS)

    w = vector_for(lm, 64)

    def steered() -> Usage:
        with w.applied(lm, 0.5):
            return decode()

    medians = in_turn({"unsteered": decode, "steered, rank 64, k = 0.5": steered}, runs)
    return (
        f"## Steering\n\nTime per decoding step, embedded model, float32, batch {BATCH}, after a prompt of {PROMPT} "
        f"tokens, mean of {TOKENS} steps:\n\n" + table(medians, "unsteered", unit="ms")
    )


def scoring(runs: int) -> str:
    """Two continuations of one prompt: the prompt once, or each from scratch."""
    lm = LM.load(device="cpu", dtype="float32")
    pairs = load_pairs("sycophancy")[:16]
    prompts = [pair.prompt for pair in pairs]

    def shared() -> object:
        return score_choices(lm, prompts, [(pair.positive, pair.negative) for pair in pairs], batch_size=BATCH)

    def from_scratch() -> object:
        return [scored_alone(lm, prompts, [getattr(pair, side) for pair in pairs]) for side in ("positive", "negative")]

    medians = in_turn(
        {"weightsteer": lambda: time_function(shared), "each from scratch": lambda: time_function(from_scratch)}, runs
    )
    return f"Scoring two continuations of each of 16 prompts:\n\n{table(medians, 'weightsteer')}"


def scored_alone(lm: LM, prompts: list[str], answers: list[str]) -> list[float]:
    """Log-probability of answers by a whole forward pass over prompt and answer, as scripts do it."""
    found: list[float] = []
    for start in range(0, len(prompts), BATCH):
        heads = [list(lm.chat_ids(prompt)) for prompt in prompts[start : start + BATCH]]
        tails = [lm.tokenizer(answer, add_special_tokens=False).input_ids for answer in answers[start : start + BATCH]]
        rows = [head + tail for head, tail in zip(heads, tails, strict=True)]
        width = max(len(row) for row in rows)
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        with torch.no_grad():
            logs = lm.model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
        for i, (head, tail) in enumerate(zip(heads, tails, strict=True)):
            places = torch.arange(len(head) - 1, len(head) + len(tail) - 1)
            found.append(float(logs[i, places, torch.tensor(tail)].sum()))
    return found
