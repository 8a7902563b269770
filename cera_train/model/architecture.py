"""What an architecture offers and needs, by its class in transformers."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from cera_train.cera.coverage import bypassed_projections


def attention_for(config: PretrainedConfig, wanted: str) -> str:
    """`model.attn_implementation` as this architecture takes it: eager in place of sdpa where it has no other, since it
    attends in another way (Bloom, gpt-oss), or not at all (Mamba)."""
    if wanted != "sdpa" or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return wanted
    # sdpa leaves soft caps out; transformers below 5.22 says all the same that Gemma 2 has it
    is_capped = getattr(config, "attn_logit_softcapping", None) is not None
    return "sdpa" if MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_sdpa and not is_capped else "eager"


def left_unquantised(config: PretrainedConfig) -> list[str] | None:
    """The modules that bitsandbytes leaves alone, for a model that reads weights past their modules: packed ones are of
    no use to it. None for any other: transformers' choice, the head."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    with torch.device("meta"):
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    kinds = {name.rpartition(".")[2] for name in bypassed_projections(model)}
    head = model.get_output_embeddings()
    heads = {name for name, module in model.named_modules() if module is head}
    return sorted(kinds | heads) if kinds else None


def mixes_sequences(model: nn.Module) -> bool:
    """Whether sequences that share a row are likely to see each other, by what the layers are made of: a state or a
    convolution goes from token to token. Certain is only a pass: `SupervisedLoss.probe`."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or [])
    is_convolved = any(isinstance(module, nn.Conv1d) for module in model.modules())
    attends = any(hasattr(module, "is_causal") for module in model.modules())
    return is_convolved or not attends or "linear_attention" in kinds
