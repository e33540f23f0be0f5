"""The tests' tiny Llama and its vectors as GGUF files, and llama.cpp's real server on them, in a process of its own.

Run as a script with paths of a model and of LoRA files, it prints its address and serves until its input is closed.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from gguf import GGUFWriter, TokenType
from torch import Tensor

from weightsteer.lm import LM
from weightsteer.vectors.low_rank import LowRank
from weightsteer.vectors.weight_vector import WeightVector

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
PRINTED = (*range(33, 127), *range(161, 173), *range(174, 256))  # bytes that a byte-level tokenizer writes as they are
BYTES = (*PRINTED, *(byte for byte in range(256) if byte not in PRINTED))  # in the order of our tiny tokenizer
OUTER = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def _named(parameter: str) -> str:
    if parameter in OUTER:
        return OUTER[parameter]
    parts = parameter.removesuffix(".weight").split(".")
    return f"blk.{parts[2]}.{NAMES['.'.join(parts[3:])]}.weight"


def _reordered(rows: Tensor, parameter: str, lm: LM) -> Tensor:
    """llama.cpp's order of the rows of q and k: pairs of neighbours turn, not two halves of a head."""
    config = lm.model.config
    if "q_proj" not in parameter and "k_proj" not in parameter:
        return rows
    heads = config.num_attention_heads if "q_proj" in parameter else config.num_key_value_heads
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def write_model(lm: LM, path: Path) -> Path:
    """The model in float32 with its byte tokenizer; its output embedding is tied."""
    config, writer = lm.model.config, GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in BYTES)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.BYTE] * 256)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, parameter in lm.model.named_parameters():
        if name != "lm_head.weight":
            writer.add_tensor(_named(name), _reordered(parameter.detach().float(), name, lm).contiguous().numpy())
    _finish(writer)
    return path


def write_lora(vector: WeightVector, lm: LM, path: Path) -> Path:
    """A vector whose scale is k."""
    writer = GGUFWriter(path, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    deltas = {name: delta for name, delta in vector.deltas.items() if isinstance(delta, LowRank)}
    writer.add_float32("adapter.lora.alpha", float(max(delta.rank for delta in deltas.values())))
    for name, delta in deltas.items():
        writer.add_tensor(f"{_named(name)}.lora_a", delta.A.float().contiguous().numpy())
        writer.add_tensor(f"{_named(name)}.lora_b", _reordered(delta.B.float(), name, lm).contiguous().numpy())
    _finish(writer)
    return path


def _finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextmanager
def served(model: Path, loras: Sequence[Path], *, prompt_cache: bool = False) -> Iterator[str]:
    """The server's address; it is stopped when the block is left. `prompt_cache`: llama.cpp's default."""
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("needs the package xllamacpp")
    command = [sys.executable, __file__, str(model), str(int(prompt_cache)), *map(str, loras)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        assert address, f"{command}: ended before it served"
        yield address
    finally:
        process.stdin.close()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _serve(model: str, prompt_cache: bool, loras: Sequence[str]) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.hostnames, params.port = ["127.0.0.1"], 0  # any free port
    params.n_parallel, params.n_ctx = 2, 4096
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.n_gpu_layers = 0
    params.warmup = False
    if not prompt_cache:
        params.cache_ram_mib = 0
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(lora, 0.0) for lora in loras]
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()
    del server


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2] == "1", sys.argv[3:])
