"""One tiny random model for each family of architectures, in the sizes of a test."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 512
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
LEGACY = {  # GPT-2's names
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "n_inner": 64,
}
MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@dataclass(frozen=True)
class Architecture:
    """A family: its model type, what a tiny model of it needs beyond COMMON, and what an adapter goes to."""

    model_type: str
    changes: dict[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    common: tuple[str, ...] | None = None
    """The names of COMMON that this config takes; None: all."""

    @property
    def settings(self) -> dict[str, Any]:
        return {name: COMMON[name] for name in self.common or COMMON} | self.changes

    def config(self, **changes: Any) -> Any:
        return AutoConfig.for_model(self.model_type, **(self.settings | changes))

    def model(self, **changes: Any) -> PreTrainedModel:
        """The random model, in eval mode. Norms, convolutions and states are drawn too, so that nothing is dead."""
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(self.config(**changes)).eval()


LEGACY_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WORDS = ("vocab_size", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id")
DENSE = [
    Architecture("llama"),
    Architecture("mistral", {"sliding_window": 6}),
    Architecture("qwen2"),
    Architecture("qwen3"),
    Architecture("gemma", {}),
    Architecture("gemma2", {"sliding_window": 6, "query_pre_attn_scalar": 8}),
    Architecture("gemma3_text", {"sliding_window": 6, "query_pre_attn_scalar": 8, "num_hidden_layers": 6}),
    Architecture("phi", {}),
    Architecture("phi3", {}, ("qkv_proj", "o_proj")),
    Architecture("gpt2", LEGACY, ("c_attn", "c_proj"), WORDS),
    Architecture("gpt_neox", {}, ("query_key_value", "dense")),
    Architecture("falcon", LEGACY_SIZES, ("query_key_value", "dense"), WORDS),
    Architecture("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    Architecture("bloom", {"n_layer": 2, "n_head": 4, "hidden_size": 32}, ("query_key_value", "dense"), WORDS),
    Architecture("stablelm"),
    Architecture("cohere"),
    Architecture("cohere2", {"sliding_window": 6}),
    Architecture("olmo2"),
    Architecture("glm4"),
    Architecture("smollm3"),
    Architecture("granite"),
]
MIXTURES = [
    Architecture("gpt_oss", EXPERTS | {"sliding_window": 6}),
    Architecture("mixtral", EXPERTS),
    Architecture("qwen3_moe", EXPERTS),
    Architecture("olmoe", EXPERTS),
]
STATES = [
    Architecture("mamba", {"state_size": 8, "hidden_size": 32, "num_hidden_layers": 2}, ("in_proj", "x_proj"), WORDS),
    Architecture(
        "falcon_mamba", {"state_size": 8, "hidden_size": 32, "num_hidden_layers": 2}, ("in_proj", "x_proj"), WORDS
    ),
    Architecture(
        "mamba2",
        {
            "state_size": 8,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
            "chunk_size": 8,
        },
        ("in_proj",),
        WORDS,
    ),
    Architecture(
        "jamba",
        EXPERTS
        | {
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
        },
        ("q_proj", "v_proj", "in_proj", "x_proj"),
    ),
    Architecture("bamba", MAMBA2 | {"attn_layer_indices": [1]}, ("q_proj", "v_proj", "in_proj")),
    Architecture("falcon_h1", MAMBA2 | {"mamba_d_ssm": 64}, ("q_proj", "v_proj", "in_proj")),
    Architecture(
        "zamba2",
        {
            "layers_block_type": ["linear_attention", "linear_attention", "hybrid"],
            "mamba_d_state": 8,
            "mamba_headdim": 8,
            "mamba_ngroups": 1,
            "n_mamba_heads": 8,
            "chunk_size": 8,
            "num_mem_blocks": 1,
            "adapter_rank": 4,
            "num_hidden_layers": 3,
        },
        ("q_proj", "v_proj", "in_proj"),
    ),
    Architecture(
        "granitemoehybrid",
        MAMBA2 | EXPERTS | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 32},
        ("q_proj", "v_proj", "in_proj"),
    ),
    Architecture("nemotron_h", {}, ("q_proj", "v_proj", "in_proj")),
    Architecture(
        "qwen3_next",
        EXPERTS
        | {
            "num_hidden_layers": 4,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "shared_expert_intermediate_size": 16,
        },
        ("q_proj", "v_proj", "in_proj_qkvz", "out_proj"),
    ),
    Architecture(
        "qwen3_5_text",
        {
            "num_hidden_layers": 4,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        ("q_proj", "v_proj", "in_proj_qkv", "out_proj"),
    ),
    Architecture(
        "rwkv",
        {
            "hidden_size": 32,
            "attention_hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "context_length": 256,
        },
        ("key", "value"),
        WORDS,
    ),
    Architecture("recurrent_gemma", {"lru_width": 32, "num_hidden_layers": 3}, ("q_proj", "v_proj", "linear_x")),
]
ALL = DENSE + MIXTURES + STATES
