"""A tiny Llama as a GGUF file in float32, with a vocabulary of bytes: what llama.cpp serves in milliseconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import MODEL_ARCH, GGUFWriter, TokenType, get_tensor_name_map
from torch import Tensor
from transformers import LlamaForCausalLM

SPECIAL = ("<unk>", "<s>", "</s>")
PRINTED = (*range(33, 127), *range(161, 173), *range(174, 256))  # bytes that a byte-level tokenizer writes as they are
BYTES = (*PRINTED, *(byte for byte in range(256) if byte not in PRINTED))  # in the order of our tiny tokenizer


def neighbours(rows: Tensor, heads: int) -> Tensor:
    """Rows of q or k: row i of a head's first half stands beside row i of its second half, as llama.cpp turns pairs."""
    size = rows.shape[0] // heads
    order = [head * size + half * (size // 2) + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return rows[order]


def write_llama(model: LlamaForCausalLM, path: Path) -> Path:
    """Write a model of 259 tokens: three special ones, then all bytes."""
    config, rope = model.config, model.config.rope_parameters
    heads, writer = config.num_key_value_heads, GGUFWriter(path, "llama")
    assert heads is not None
    assert rope is not None
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(float(rope["rope_theta"] or 0))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(0)
    _add_bytes(writer)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        rows = parameter.float()
        if name.endswith("q_proj.weight"):
            rows = neighbours(rows, config.num_attention_heads)
        if name.endswith("k_proj.weight"):
            rows = neighbours(rows, heads)
        placed = names.get_name(name, try_suffixes=(".weight",))
        assert placed is not None, name
        writer.add_tensor(placed, np.ascontiguousarray(rows.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_bytes(writer: GGUFWriter) -> None:
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in BYTES)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_space_prefix(False)
