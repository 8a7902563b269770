"""A tiny random model of each family of architectures."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

WORDS = {
    "vocab_size": 512,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
USUAL = (
    WORDS
    | SIZES
    | {
        "intermediate_size": 64,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
    }
)
GPT2 = WORDS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_inner": 64}
WINDOW = {"sliding_window": 6}
GEMMA = WINDOW | {"query_pre_attn_scalar": 8}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
SHARED = EXPERTS | {"shared_expert_intermediate_size": 16}
MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
DELTA = {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
JAMBA = {
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
}
ZAMBA2 = {
    "layers_block_type": ["linear_attention", "linear_attention", "hybrid"],
    "num_hidden_layers": 3,
    "mamba_d_state": 8,
    "n_mamba_heads": 8,
    "mamba_ngroups": 1,
    "chunk_size": 8,
    "adapter_rank": 4,
}
NEMOTRON_H = {
    "layers_block_type": ["linear_attention", "full_attention", "mlp"],
    "ssm_state_size": 8,
    "n_groups": 1,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "chunk_size": 8,
}


@dataclass(frozen=True)
class Architecture:
    """A family: a model type of transformers, the settings of a tiny model, and what an adapter
    goes to."""

    model_type: str
    changes: dict[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    usual: dict[str, Any] = field(default_factory=lambda: USUAL)

    def config(self, **changes: Any) -> Any:
        return AutoConfig.for_model(self.model_type, **(self.usual | self.changes | changes))

    def model(self, **changes: Any) -> PreTrainedModel:
        """The random model, frozen and in eval mode. No matrix is zero, as xLSTM's gates are before
        training."""
        torch.manual_seed(0)
        model = (
            AutoModelForCausalLM.from_config(self.config(**changes)).eval().requires_grad_(False)
        )
        for weight in model.parameters():
            if weight.ndim > 1 and not weight.any():
                weight.normal_(std=0.2)
        return model


DENSE = [
    *map(
        Architecture,
        (
            "llama",
            "qwen2",
            "qwen3",
            "gemma",
            "stablelm",
            "cohere",
            "olmo",
            "olmo2",
            "olmo3",
            "glm4",
        ),
    ),
    *map(
        Architecture,
        (
            "smollm3",
            "granite",
            "exaone4",
            "starcoder2",
            "seed_oss",
            "ernie4_5",
            "nemotron",
            "ministral",
        ),
    ),
    Architecture("mistral", WINDOW),
    Architecture("gemma2", GEMMA),
    # The sixth layer attends to everything.
    Architecture("gemma3_text", GEMMA | {"num_hidden_layers": 6}),
    Architecture("cohere2", WINDOW | {"num_hidden_layers": 4}),
    Architecture("phi"),
    Architecture("phi3", {}, ("qkv_proj", "o_proj")),
    Architecture("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    Architecture("gpt_neox", {}, ("query_key_value", "dense")),
    Architecture("gpt2", {}, ("c_attn", "c_proj"), GPT2),
    Architecture("gptj", {"rotary_dim": 8}, ("q_proj", "v_proj"), GPT2),
    Architecture("gpt_bigcode", {}, ("c_attn",), GPT2),
    Architecture("codegen", {"rotary_dim": 8}, ("qkv_proj",), GPT2),
    Architecture("falcon", SIZES, ("query_key_value", "dense"), WORDS),
    Architecture(
        "bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, ("query_key_value", "dense"), WORDS
    ),
    Architecture("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}, ("Wqkv",), WORDS),
]
EXPERT_MODELS = [
    *(Architecture(name, EXPERTS) for name in ("mixtral", "qwen3_moe", "olmoe", "phimoe")),
    Architecture("gpt_oss", EXPERTS | WINDOW),
    Architecture("qwen2_moe", SHARED),
    Architecture("glm4_moe", EXPERTS | {"n_routed_experts": 4}),
    Architecture("llama4_text", EXPERTS),
    Architecture("deepseek_v3", EXPERTS | LATENT, ("q_b_proj", "kv_b_proj")),
]
STATES = [
    Architecture("mamba", SIZES | {"state_size": 8}, ("in_proj",), WORDS),
    Architecture("falcon_mamba", SIZES | {"state_size": 8}, ("in_proj",), WORDS),
    Architecture(
        "mamba2",
        SIZES | {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
        ("in_proj",),
        WORDS,
    ),
    Architecture("jamba", EXPERTS | JAMBA, ("q_proj", "v_proj", "in_proj", "x_proj")),
    Architecture("bamba", MAMBA2 | {"attn_layer_indices": [1]}, ("q_proj", "v_proj", "in_proj")),
    Architecture("falcon_h1", MAMBA2 | {"mamba_d_ssm": 64}, ("q_proj", "v_proj", "in_proj")),
    Architecture("zamba2", ZAMBA2, ("q_proj", "v_proj", "in_proj")),
    Architecture(
        "granitemoehybrid",
        MAMBA2 | EXPERTS | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 32},
        ("q_proj", "v_proj", "in_proj"),
    ),
    Architecture("nemotron_h", NEMOTRON_H, ("q_proj", "v_proj", "in_proj")),
    Architecture("qwen3_next", SHARED | DELTA, ("q_proj", "v_proj", "in_proj_qkvz", "out_proj")),
    Architecture("qwen3_5_text", DELTA, ("q_proj", "v_proj", "in_proj_qkv", "out_proj")),
    Architecture("olmo_hybrid", DELTA, ("q_proj", "v_proj", "g_proj")),
    Architecture(
        "minimax",
        EXPERTS | {"layer_types": ["linear_attention", "full_attention"]},
        ("q_proj", "v_proj", "qkv_proj"),
    ),
    Architecture(
        "lfm2", {"layer_types": ["conv", "full_attention"]}, ("q_proj", "v_proj", "in_proj")
    ),
    Architecture(
        "recurrent_gemma",
        {"lru_width": 32, "num_hidden_layers": 3},
        ("q_proj", "v_proj", "linear_x"),
    ),
    Architecture(
        "rwkv", SIZES | {"attention_hidden_size": 32, "rescale_every": 1}, ("key", "output"), WORDS
    ),
    Architecture("xlstm", {"hidden_size": 32, "num_heads": 4, "num_blocks": 2}, ("q", "v"), WORDS),
]
"""These carry a state, or the tail of a convolution, from token to token."""

ARCHITECTURES = {family.model_type: family for family in (*DENSE, *EXPERT_MODELS, *STATES)}
