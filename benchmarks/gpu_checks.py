"""Generating and steering on the GPU: continuous batching, hooks in a CUDA graph, nf4, `torch.compile`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from gpu_model import SEVEN, Bench, Verdict, random_vector
from gpu_training import training
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig, StaticCache
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from weightsteer.lm import LM
from weightsteer.training.settings import PAPER

K = 0.5
MOST_OVERHEAD = 0.25  # of a decoding step, that hooks of rank 64 may add
SAME = 5e-2  # nats between two ways to compute in bfloat16


def generation(bench: Bench) -> Iterator[Verdict]:
    """transformers' continuous batching under our hooks, against our own batches of like length."""
    count, new = (8, 8) if bench.tiny else (128, 128)
    lm = bench.model(SEVEN, torch.float32 if bench.tiny else torch.bfloat16)
    prompts = [f"Question {i}: " + "why is that so? " * (i % 7 + 1) for i in range(count)]
    rows = [lm.chat_ids(prompt) for prompt in prompts]
    settings = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=[2], pad_token_id=0)
    with random_vector(lm).applied(lm, K):
        start = time.perf_counter()
        plain = lm.replies(prompts, max_new_tokens=new, batch_size=16)
        bench.wait()
        ours = time.perf_counter() - start
        start = time.perf_counter()
        # by itself it takes all memory that is free, which on a CPU is everybody's
        room = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=256) if bench.tiny else None
        made = lm.model.generate_batch(inputs=rows, generation_config=settings, continuous_batching_config=room)
        bench.wait()
        theirs = time.perf_counter() - start
    texts = [lm.read_reply(made[name].generated_tokens).answer for name in sorted(made, key=_number)]
    same = sum(reply.answer == text for reply, text in zip(plain, texts, strict=True)) / count
    found = f"{count} replies in {theirs:.1f} s, {ours:.1f} s without it; {same:.0%} of the replies are the same"
    # random weights have near ties, which bfloat16 decides either way
    yield Verdict("continuous batching, steered", len(texts) == count and (same == 1 or bench.on_gpu), found)


def _number(name: str) -> int:
    return int("".join(filter(str.isdigit, name)) or 0)


@torch.no_grad()
def graph(bench: Bench) -> Iterator[Verdict]:
    """A decoding step captured in a CUDA graph, with and without hooks, against the same step without a graph."""
    lm = bench.model(SEVEN)
    rows, context = 8, 32 if bench.tiny else 512
    ids = bench.tokens(lm, rows, 1)
    cache = StaticCache(config=lm.model.config, max_cache_len=context)
    where = torch.tensor([[context - 1]], device=bench.device).expand(rows, 1)

    def step() -> Tensor:
        cache.reset()
        return lm.model(ids, position_ids=where, past_key_values=cache, use_cache=True).logits  # type: ignore[no-any-return]

    base, base_seconds, _ = _replayed(bench, step)
    with random_vector(lm).applied(lm, K):
        steered, seconds, difference = _replayed(bench, step)
    moved = float((steered - base).abs().max())
    overhead = seconds / base_seconds - 1
    how = "CUDA graph" if bench.on_gpu else "no graph on a CPU"
    found = (
        f"{1e3 * base_seconds:.2f} ms a step, {1e3 * seconds:.2f} ms steered (+{overhead:.0%}), {how}; logits within "
        f"{difference:.1e} of the step without a graph, moved by {moved:.1e}"
    )
    good = moved > 0 and difference <= SAME and (overhead <= MOST_OVERHEAD or not bench.on_gpu)
    yield Verdict(f"hook of rank 64, batch {rows}", good, found)


def _replayed(bench: Bench, step: Callable[[], Tensor]) -> tuple[Tensor, float, float]:
    """Logits and seconds of a captured step, and how far its logits are from those of the plain step."""
    plain = step().float()
    if not bench.on_gpu:
        return plain, bench.seconds(step, 5), 0.0
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):  # libraries set themselves up in the first calls, which cannot be captured
            step()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        out = step()
    captured.replay()
    bench.wait()
    found = out.float().clone()
    return found, bench.seconds(captured.replay, 50), float((found - plain).abs().max())


def nf4(bench: Bench) -> Iterator[Verdict]:
    """A base in nf4 by bitsandbytes: bytes a weight, QLoRA steps, and the hook at k = 0 and k = 0.5."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        yield Verdict("nf4", None, f"bitsandbytes cannot be used ({error})")
        return
    folder = bench.scratch / "nf4"
    bench.model(SEVEN, num_hidden_layers=2 if bench.tiny else 4).model.save_pretrained(folder)
    packed = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    before = bench.held()
    placed = {"": bench.device}
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=packed, device_map=placed)
    lm = LM.wrap(model, bench.model(SEVEN, num_hidden_layers=1).tokenizer, name="nf4", revision="nf4")
    linear = [module for module in model.modules() if hasattr(getattr(module, "weight", None), "quant_state")]
    weights = sum(module.in_features * module.out_features for module in linear)
    stored = sum(module.weight.numel() * module.weight.element_size() for module in linear)
    found = f"{len(linear)} layers, {stored / weights:.3f} bytes a weight"
    held = f", {(bench.held() - before) / 1e9:.2f} GB held" if bench.on_gpu else ""
    yield Verdict("layers in nf4", bool(linear) and stored / weights < 0.6, found + held)
    ids = bench.tokens(lm, 2, 32 if bench.tiny else 512)
    yield _hooked(lm, ids)
    with training(bench, lm, PAPER, True) as step:
        losses = [step(ids) for _ in range(5)]
    yield Verdict("QLoRA, 5 steps", losses[-1] < losses[0], f"loss {losses[0]:.3f} to {losses[-1]:.3f}")


@torch.no_grad()
def _hooked(lm: LM, ids: Tensor) -> Verdict:
    """k = 0 gives the base bit for bit, and k = 0.5 something else."""
    w = random_vector(lm)
    base = lm.model(ids).logits
    with w.applied(lm, 0.0):
        still = bool(torch.equal(lm.model(ids).logits, base))
    with w.applied(lm, K):
        moved = float((lm.model(ids).logits - base).float().abs().max())
    after = bool(torch.equal(lm.model(ids).logits, base))
    found = f"k = 0 {'is' if still else 'is not'} the base, k = {K} moves logits by {moved:.2g}, then the base: {after}"
    return Verdict("hook over nf4", still and after and moved > 0, found)


def compiled(bench: Bench) -> Iterator[Verdict]:
    """`torch.compile` within `applied`: the logits of the hook without it, and the time of both."""
    lm = bench.model(SEVEN, torch.float32 if bench.tiny else torch.bfloat16, num_hidden_layers=2 if bench.tiny else 8)
    ids = bench.tokens(lm, 2, 32 if bench.tiny else 512)
    backend = "inductor" if bench.on_gpu else "eager"  # a CPU may have no compiler
    with torch.no_grad(), random_vector(lm).applied(lm, K):
        plain = lm.model(ids, use_cache=False).logits.float()
        eager = bench.seconds(lambda: lm.model(ids, use_cache=False), 5)
        fast = torch.compile(lm.model, backend=backend)
        found = fast(ids, use_cache=False).logits.float()
        seconds = bench.seconds(lambda: fast(ids, use_cache=False), 5)
    with torch.no_grad():
        base = lm.model(ids, use_cache=False).logits.float()
    torch.compiler.reset()
    difference, moved = float((found - plain).abs().max()), float((plain - base).abs().max())
    text = (
        f"within {difference:.1e} of the hook, which moves logits by {moved:.1e}; {1e3 * seconds:.1f} ms, "
        f"{1e3 * eager:.1f} ms without ({backend})"
    )
    yield Verdict("compiled within `applied`", moved > 0 and difference <= min(SAME, moved / 2), text)
