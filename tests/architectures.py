"""Tiny random models of many architectures, each made by transformers in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

IDS = torch.tensor([[5, 6, 7, 8, 9, 11, 3], [9, 3, 5, 6, 7, 8, 4]])
VOCAB = 96
TOKENS: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
HIDDEN: dict[str, Any] = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 2}
COMMON: dict[str, Any] = {
    **HIDDEN,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT: dict[str, Any] = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
HEADS: dict[str, Any] = {**COMMON, "head_dim": 8}
WINDOW: dict[str, Any] = {**HEADS, "sliding_window": 16}
MLA: dict[str, Any] = {
    **COMMON,
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
FOUR: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED: dict[str, Any] = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DELTANET: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
SSM: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
TEXT_MIX = ["sliding_attention", "full_attention"]

# family -> (the model's class without ForCausalLM, the config's without Config, the config's options)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "Llama", COMMON),
    "qwen2-tied": ("Qwen2", "Qwen2", {**COMMON, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", "Qwen3", HEADS),
    "gemma": ("Gemma", "Gemma", HEADS),
    "gemma-untied": ("Gemma", "Gemma", {**HEADS, "tie_word_embeddings": False}),
    "gemma2": ("Gemma2", "Gemma2", WINDOW),
    "gemma3": ("Gemma3", "Gemma3Text", WINDOW),
    "phi": ("Phi", "Phi", {**COMMON, "num_key_value_heads": 4}),
    "phi3": ("Phi3", "Phi3", COMMON),
    "mistral": ("Mistral", "Mistral", HEADS),
    "olmo2": ("Olmo2", "Olmo2", COMMON),
    "starcoder2": ("Starcoder2", "Starcoder2", COMMON),
    "cohere": ("Cohere", "Cohere", COMMON),
    "cohere2": ("Cohere2", "Cohere2", WINDOW),
    "granite": ("Granite", "Granite", {**COMMON, "embedding_multiplier": 3.0, "logits_scaling": 2.0}),
    "nemotron": ("Nemotron", "Nemotron", COMMON),
    "exaone4": ("Exaone4", "Exaone4", {**COMMON, "sliding_window": 16, "layer_types": TEXT_MIX}),
    "stablelm": ("StableLm", "StableLm", COMMON),
    "smollm3": ("SmolLM3", "SmolLM3", COMMON),
    "glm4": ("Glm4", "Glm4", HEADS),
    "apertus": ("Apertus", "Apertus", COMMON),
    "seed-oss": ("SeedOss", "SeedOss", HEADS),
    "gpt2": ("GPT2LMHead", "GPT2", GPT),
    "gptj": ("GPTJ", "GPTJ", {**GPT, "rotary_dim": 4}),
    "codegen": ("CodeGen", "CodeGen", {**GPT, "rotary_dim": 4}),
    "gpt-bigcode": ("GPTBigCode", "GPTBigCode", GPT),
    "gpt-neox": ("GPTNeoX", "GPTNeoX", COMMON),
    "falcon": ("Falcon", "Falcon", {**HIDDEN, "num_attention_heads": 4}),
    "bloom": ("Bloom", "Bloom", {**TOKENS, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": ("Mpt", "Mpt", {"vocab_size": VOCAB, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
    "opt": ("OPT", "OPT", {**HIDDEN, "ffn_dim": 48, "num_attention_heads": 4, "word_embed_proj_dim": 32}),
    "mixtral": ("Mixtral", "Mixtral", {**COMMON, **LOCAL}),
    "qwen2-moe": ("Qwen2Moe", "Qwen2Moe", {**COMMON, **FOUR, "moe_intermediate_size": 24}),
    "qwen3-moe": ("Qwen3Moe", "Qwen3Moe", {**HEADS, **FOUR, "moe_intermediate_size": 24}),
    "olmoe": ("Olmoe", "Olmoe", {**COMMON, **FOUR}),
    "deepseek-v2": ("DeepseekV2", "DeepseekV2", {**MLA, **ROUTED, "q_lora_rank": None}),
    "deepseek-v3": ("DeepseekV3", "DeepseekV3", {**MLA, **ROUTED, "q_lora_rank": 8}),
    "glm4-moe": ("Glm4Moe", "Glm4Moe", {**HEADS, **ROUTED, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}),
    "gpt-oss": ("GptOss", "GptOss", {**WINDOW, **LOCAL}),
    "phimoe": ("Phimoe", "Phimoe", {**COMMON, **LOCAL}),
    "llama4": ("Llama4", "Llama4Text", {**HEADS, **LOCAL, "num_experts_per_tok": 1, "intermediate_size_mlp": 48}),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        "GraniteMoeHybrid",
        {**COMMON, **LOCAL, **SSM, "shared_intermediate_size": 32, "layer_types": ["mamba", "attention"]},
    ),
    "qwen3-next": ("Qwen3Next", "Qwen3Next", {**HEADS, **FOUR, **DELTANET, "moe_intermediate_size": 16}),
    "qwen3.5": ("Qwen3_5", "Qwen3_5Text", {**HEADS, **DELTANET}),
    "lfm2": ("Lfm2", "Lfm2", {**COMMON, "layer_types": ["conv", "full_attention"]}),
    "falcon-h1": ("FalconH1", "FalconH1", {**HEADS, **SSM, "mamba_d_ssm": 64}),
    "mamba": ("Mamba", "Mamba", {**HIDDEN, "state_size": 8}),
    "mamba2": ("Mamba2", "Mamba2", {**HIDDEN, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1}),
    "falcon-mamba": ("FalconMamba", "FalconMamba", {**HIDDEN, "state_size": 8}),
    "jamba": (
        "Jamba",
        "Jamba",
        {
            **COMMON,
            **{"num_experts": 2, "num_experts_per_tok": 1, "use_mamba_kernels": False, "mamba_dt_rank": 4},
            **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
        },
    ),
    "recurrent-gemma": (
        "RecurrentGemma",
        "RecurrentGemma",
        {**HEADS, "num_hidden_layers": 3, "attention_window_size": 16, "lru_width": 32},
    ),
    "rwkv": ("Rwkv", "Rwkv", {**HIDDEN, "attention_hidden_size": 32}),
}

EXPERTS = ("mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "deepseek-v3", "glm4-moe", "gpt-oss", "phimoe", "llama4")


def _vision(**sizes: Any) -> dict[str, Any]:
    return {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, **sizes}


def _multimodal(family: str) -> PreTrainedModel:
    """A tiny model with a vision tower, whose names changed in transformers 4.52."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    clip = _vision(num_attention_heads=2, image_size=28, patch_size=14)
    qwen = {"depth": 2, "num_heads": 2, "patch_size": 14, "hidden_size": 32}
    if family == "gemma3-vision":
        text = transformers.Gemma3TextConfig(**WINDOW)
        return transformers.Gemma3ForConditionalGeneration(
            transformers.Gemma3Config(text_config=text.to_dict(), vision_config=clip, mm_tokens_per_image=4)
        )
    if family == "llava":
        return transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(
                text_config=transformers.LlamaConfig(**COMMON).to_dict(),
                vision_config=transformers.CLIPVisionConfig(**clip, projection_dim=16).to_dict(),
                image_token_index=VOCAB - 1,
            )
        )
    if family == "qwen2-vl":
        return transformers.Qwen2VLForConditionalGeneration(
            transformers.Qwen2VLConfig(
                text_config={**COMMON, "rope_parameters": rope},
                vision_config={**qwen, "embed_dim": 32, "mlp_ratio": 2},
                tie_word_embeddings=True,
            )
        )
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config={**COMMON, "rope_parameters": rope},
            vision_config={**qwen, "out_hidden_size": 32, "intermediate_size": 32, "fullatt_block_indexes": [1]},
        )
    )


VISION = ("gemma3-vision", "llava", "qwen2-vl", "qwen2.5-vl")


def tiny(family: str, seed: int = 0) -> PreTrainedModel:
    """A random model of the family in float32, the same for the same seed."""
    torch.manual_seed(seed)
    if family in VISION:
        return _multimodal(family).float().eval()
    model, config, options = FAMILIES[family]
    made: Callable[[Any], PreTrainedModel] = getattr(
        transformers, f"{model}Model" if model.endswith("LMHead") else f"{model}ForCausalLM"
    )
    return made(getattr(transformers, f"{config}Config")(**options)).float().eval()
