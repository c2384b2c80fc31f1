"""Tiny configurations of the architectures whose parity with transformers is tested, and the paths each takes.

Windows are shorter than the longest test sequence.
"""

from typing import Any, NamedTuple

from prefopt.model.logprobs import Path

VOCABULARY = 97

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
_BARE = {k: COMMON[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
_FULL_HEADS = {k: v for k, v in COMMON.items() if k != "num_key_value_heads"}
_HEAD_8 = {**COMMON, "head_dim": 8}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_LATENT = {
    **COMMON,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}


class Architecture(NamedTuple):
    """A configuration class of transformers, its arguments, and the paths that serve it, the best first."""

    config: str
    arguments: dict[str, Any]
    paths: tuple[Path, ...] = ("shared", "packed", "padded")


ARCHITECTURES: dict[str, Architecture] = {
    "Apertus": Architecture("ApertusConfig", COMMON),
    "Arcee": Architecture("ArceeConfig", COMMON),
    "BLOOM": Architecture(
        "BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}, ("padded",)
    ),
    "CodeGen": Architecture("CodeGenConfig", {**_GPT2, "rotary_dim": 4}, ("packed", "padded")),
    "Cohere": Architecture("CohereConfig", {**COMMON, "logit_scale": 0.25}),
    "Cohere 2": Architecture("Cohere2Config", {**COMMON, "logit_scale": 0.25, "sliding_window": 6}),
    "DeepSeek-V2": Architecture("DeepseekV2Config", _LATENT),
    "DeepSeek-V3": Architecture("DeepseekV3Config", _LATENT),
    "ERNIE 4.5": Architecture("Ernie4_5Config", _HEAD_8),
    "EXAONE 4": Architecture("Exaone4Config", {**COMMON, "sliding_window": 6, "sliding_window_pattern": 2}),
    "Falcon": Architecture("FalconConfig", _BARE, ("padded",)),
    "Falcon with ALiBi": Architecture("FalconConfig", {**_BARE, "alibi": True}, ("padded",)),
    "Falcon-H1": Architecture(
        "FalconH1Config",
        {
            **COMMON,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_chunk_size": 16,
            "lm_head_multiplier": 0.5,
        },
        ("padded",),
    ),
    "Gemma": Architecture("GemmaConfig", _HEAD_8),
    "Gemma 2": Architecture("Gemma2Config", {**_HEAD_8, "sliding_window": 6, "query_pre_attn_scalar": 8}),
    "Gemma 3": Architecture("Gemma3TextConfig", {**_HEAD_8, "sliding_window": 6, "query_pre_attn_scalar": 8}),
    "GLM": Architecture("GlmConfig", _HEAD_8),
    "GLM-4": Architecture("Glm4Config", _HEAD_8),
    "GPT-2": Architecture("GPT2Config", _GPT2),
    "GPT-BigCode": Architecture("GPTBigCodeConfig", _GPT2),
    "GPT-J": Architecture("GPTJConfig", {**_GPT2, "rotary_dim": 4}, ("packed", "padded")),
    "GPT-Neo": Architecture(
        "GPTNeoConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 6,
            "max_position_embeddings": 128,
        },
        ("packed", "padded"),
    ),
    "GPT-NeoX": Architecture("GPTNeoXConfig", _FULL_HEADS),
    "GPT-OSS": Architecture(
        "GptOssConfig",
        {**_HEAD_8, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 6},
        ("shared", "padded"),
    ),
    "Granite": Architecture("GraniteConfig", {**COMMON, "logits_scaling": 3.0, "attention_multiplier": 0.3}),
    "Granite-MoE": Architecture(
        "GraniteMoeConfig", {**COMMON, "logits_scaling": 3.0, "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "Helium": Architecture("HeliumConfig", _HEAD_8),
    "Hunyuan": Architecture("HunYuanDenseV1Config", _HEAD_8),
    "HyperCLOVA X": Architecture("HyperCLOVAXConfig", {**COMMON, "logits_scaling": 0.5}),
    "Llama": Architecture("LlamaConfig", COMMON),
    "Llama 4": Architecture(
        "Llama4TextConfig",
        {**_HEAD_8, "num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 48},
        ("padded",),
    ),
    "Mamba": Architecture(
        "MambaConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        ("padded",),
    ),
    "Mistral": Architecture("MistralConfig", {**COMMON, "sliding_window": None}),
    "Mistral with windows": Architecture("MistralConfig", {**COMMON, "sliding_window": 6}),
    "Mixtral": Architecture("MixtralConfig", {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "MPT": Architecture(
        "MptConfig",
        {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
        ("padded",),
    ),
    "Nemotron": Architecture("NemotronConfig", COMMON, ("packed", "padded")),
    "OLMo": Architecture("OlmoConfig", COMMON),
    "OLMo-2": Architecture("Olmo2Config", COMMON),
    "OLMo-3": Architecture("Olmo3Config", {**COMMON, "sliding_window": 6}),
    "OLMoE": Architecture("OlmoeConfig", {**COMMON, **_EXPERTS}),
    "OPT": Architecture(
        "OPTConfig",
        {**_BARE, "ffn_dim": 48, "max_position_embeddings": 128, "word_embed_proj_dim": 32},
        ("shared", "padded"),
    ),
    "Persimmon": Architecture("PersimmonConfig", _FULL_HEADS),
    "Phi": Architecture("PhiConfig", COMMON),
    "Phi-3": Architecture("Phi3Config", COMMON),
    "Qwen2": Architecture("Qwen2Config", COMMON),
    "Qwen2 with windows": Architecture(
        "Qwen2Config", {**COMMON, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
    ),
    "Qwen2-MoE": Architecture(
        "Qwen2MoeConfig",
        {**COMMON, **_EXPERTS, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
    "Qwen3": Architecture("Qwen3Config", _HEAD_8),
    "Qwen3-MoE": Architecture("Qwen3MoeConfig", {**_HEAD_8, **_EXPERTS, "moe_intermediate_size": 16}),
    "RecurrentGemma": Architecture(
        "RecurrentGemmaConfig", {**COMMON, "num_hidden_layers": 3, "attention_window_size": 6}, ("padded",)
    ),
    "Seed-OSS": Architecture("SeedOssConfig", _HEAD_8),
    "SmolLM3": Architecture("SmolLM3Config", COMMON),
    "StableLM": Architecture("StableLmConfig", COMMON, ("packed", "padded")),
    "StarCoder2": Architecture("Starcoder2Config", {**COMMON, "sliding_window": 6}),
}
