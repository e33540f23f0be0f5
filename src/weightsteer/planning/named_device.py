"""A device by its name; of this CPU also how near a model's own step comes to the rates that were measured."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ..errors import SteerError
from ..runs.tiny_model import byte_tokenizer
from ..schema import suggestion
from .devices import CPU, DEVICES, Device, measured_cpu, seconds_of_call
from .passes import Passes, Step
from .shaped_model import ShapedModel

ROWS, LENGTH = 2, 128  # of the step that is tried


def device_named(name: str) -> Device:
    """A device of the table, or this machine's CPU, which is measured for a few seconds.

    Raises:
        SteerError: no such device in the table.
    """
    if name == CPU:
        return calibrated(measured_cpu())
    if name not in DEVICES:
        known = [*DEVICES, CPU]
        raise SteerError(f"--device: expected one of {', '.join(known)}, found {name!r}{suggestion(name, known)}")
    return DEVICES[name]


def calibrated(device: Device) -> Device:
    """The CPU with the time that a small random model's training step takes over the one that is planned for it."""
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    model = LlamaForCausalLM(config)
    ids, mask = torch.zeros(ROWS, LENGTH, dtype=torch.long), torch.ones(ROWS, 1, LENGTH, LENGTH, dtype=torch.bool)

    def step() -> None:
        model.zero_grad()
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids.flatten(), reduction="sum").backward()

    made = Step(ROWS, LENGTH, ROWS * LENGTH, kind="full")
    planned = Passes(ShapedModel("small", config, torch.float32), byte_tokenizer(), device).cost(made).trace
    return replace(device, slowness=seconds_of_call(step, tries=3) / planned.seconds(device))
