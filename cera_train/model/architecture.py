"""What transformers offers for an architecture."""

from __future__ import annotations

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING


def attention_for(config: PretrainedConfig, wanted: str) -> str:
    """`model.attn_implementation` as this architecture takes it: eager in place of sdpa where it has no other, since it
    attends in its own way (Bloom, gpt-oss), or not at all (Mamba)."""
    if wanted != "sdpa" or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return wanted
    return "sdpa" if MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_sdpa else "eager"
