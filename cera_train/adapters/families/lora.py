"""LoRA: y = W0 x + s B A dropout(x), PEFT's, with s = alpha / r. PiSSA and others are settings of
it.

rsLoRA: s = alpha / sqrt(r). DoRA: the rows of W0 + s B A rescaled to a learned magnitude m.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from cera_train.adapters.families.base import ADAPTER, Branch, RankedFamily
from cera_train.settings.adapters import AdapterConfig

if TYPE_CHECKING:
    import peft
    import torch
    from torch import nn
    from transformers import PreTrainedModel


class Lora(RankedFamily):
    b_matrix = "lora_B"

    def __init__(self, name: str, use_rslora: bool = False, use_dora: bool = False) -> None:
        self.name = name
        self.use_rslora = use_rslora
        self.use_dora = use_dora

    def rate_factor(self, config: AdapterConfig) -> float:
        """With LoRA+, whose rates are those of A and of B, their geometric mean is LoRA's."""
        return 1 / math.sqrt(config.b_lr_ratio)

    def peft_config(self, config: AdapterConfig) -> peft.PeftConfig:
        import peft

        scale_one = math.sqrt if self.use_rslora else int
        if config.alpha is None and (ranks := config.settings.get("rank_pattern")):
            alphas = {key: scale_one(r) for key, r in ranks.items()} | (
                config.settings.get("alpha_pattern") or {}
            )
            config = replace(config, settings=config.settings | {"alpha_pattern": alphas})
        fields = {
            "r": config.r,
            "lora_alpha": scale_one(config.r) if config.alpha is None else config.alpha,
            "lora_dropout": config.dropout,
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
        }
        return self.make(peft.LoraConfig, config, fields)

    def build(self, base: PreTrainedModel, config: AdapterConfig, left_out: list[str]) -> nn.Module:
        model = super().build(base, config, left_out)
        if getattr(model.peft_config[ADAPTER], "target_modules_to_tie", None):
            tie_again(base)
        return model

    def branch(self, module: nn.Module) -> Branch | None:
        from peft.tuners.lora.layer import LoraLayer, ParamWrapper
        from torch import nn

        if not isinstance(module, LoraLayer) or ADAPTER not in module.lora_A:
            return None
        if isinstance(module, ParamWrapper):  # adds to experts' weights, without hidden units
            return None
        A = module.lora_A[ADAPTER]
        variant = module.lora_variant.get(ADAPTER)
        matrix = {"NoneType": plain_B, "DoraLinearVariant": dora_B}.get(type(variant).__name__)
        if matrix is None or not isinstance(A, nn.Linear):
            return None

        scaling = module.scaling[ADAPTER]
        r = module.r[ADAPTER]
        return Branch(module, A, lambda: matrix(module), scaling, r, module.out_features)


def tie_again(base: PreTrainedModel) -> None:
    """Lets the adapters of tied embeddings share their memory (ensure_weight_tying). PEFT casts
    those of a 16-bit base to float32 one by one, which parts them."""
    embeddings = base.get_input_embeddings()
    head = base.get_output_embeddings()
    head.lora_A[ADAPTER].weight.data = embeddings.lora_embedding_B[ADAPTER].data.T
    head.lora_B[ADAPTER].weight.data = embeddings.lora_embedding_A[ADAPTER].data.T


def plain_B(layer: nn.Module) -> torch.Tensor:
    return layer.lora_B[ADAPTER].weight.double()


def dora_B(layer: nn.Module) -> torch.Tensor:
    """m / |W0 + s B A| B, by which DoRA multiplies A x. The rescaled W0 x is left out: it is of
    full rank whatever the adapter learns, and would drown the branch."""
    from peft.utils.integrations import dequantize_module_weight

    magnitude = layer.lora_magnitude_vector[ADAPTER]
    update = layer.lora_B[ADAPTER].weight @ layer.lora_A[ADAPTER].weight
    weight = dequantize_module_weight(layer.get_base_layer()).to(update.dtype)
    scale = (
        magnitude.weight / magnitude.get_weight_norm(weight, update, layer.scaling[ADAPTER])
    ).double()
    return scale[:, None] * plain_B(layer)
