"""LoRA: y = W0 x + s B A dropout(x), PEFT's. PiSSA and others are settings of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cera_train.adapters.families.peft import RankedPeft
from cera_train.adapters.family import ADAPTER, Branch
from cera_train.settings.adapters import AdapterConfig

if TYPE_CHECKING:
    import peft
    import torch
    from torch import nn


class Lora(RankedPeft):
    name = "LoRA"
    b_matrix = "lora_B"
    alpha_field = "lora_alpha"

    variant: str | None = None
    """The name of PEFT's class that replaces LoRA's forward."""

    def default_alpha(self, r: int) -> float:
        return r

    def lora_fields(self, config: AdapterConfig) -> dict[str, Any]:
        """What makes this kind of LoRA, as fields of PEFT's config."""
        alpha = config.alpha if config.alpha is not None else self.default_alpha(config.r)
        return {"lora_alpha": alpha, "use_rslora": False, "use_dora": False}

    def peft_config(self, config: AdapterConfig) -> peft.PeftConfig:
        import peft

        fields = {"r": config.r, "lora_dropout": config.dropout} | self.lora_fields(config)
        return self.make(peft.LoraConfig, config, fields)

    def branch(self, module: nn.Module) -> Branch | None:
        from peft.tuners.lora import LoraLayer
        from peft.tuners.lora.layer import ParamWrapper
        from torch import nn

        if isinstance(module, ParamWrapper):  # adds to the experts' weights: there are no hidden units
            return None
        if not isinstance(module, LoraLayer) or ADAPTER not in module.lora_A:
            return None
        variant = type(module.lora_variant[ADAPTER]).__name__ if ADAPTER in module.lora_variant else None
        A = module.lora_A[ADAPTER]
        if variant != self.variant or not isinstance(A, nn.Linear):
            return None
        return Branch(
            module,
            A,
            gate=None,
            r=module.r[ADAPTER],
            out_features=module.out_features,
            gram=lambda: module.scaling[ADAPTER] ** 2 * (B := self.B(module)).T @ B,
        )

    def B(self, layer: nn.Module) -> torch.Tensor:
        """B as the layer multiplies by it, [d_out, R], float64."""
        return layer.lora_B[ADAPTER].weight.double()


FAMILY = Lora()
