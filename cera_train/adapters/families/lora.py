"""LoRA: y = W0 x + s B A dropout(x), PEFT's. PiSSA and others are settings of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cera_train.adapters.families.peft import RankedPeft
from cera_train.adapters.family import ADAPTER, Branch

if TYPE_CHECKING:
    import peft
    import torch
    from torch import nn


class Lora(RankedPeft):
    name = "LoRA"
    joins = True
    b_matrix = "lora_B"

    variant: str | None = None
    """The name of PEFT's class that replaces LoRA's forward."""

    def lora_fields(self, config: Any) -> dict[str, Any]:
        """What makes this kind of LoRA, as fields of PEFT's config."""
        alpha = config.alpha if config.alpha is not None else config.r
        return {"lora_alpha": alpha, "use_rslora": False, "use_dora": False}

    def peft_config(self, config: Any) -> peft.PeftConfig:
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

    def add_branch(self, layer: nn.Module, output: torch.Tensor, x: torch.Tensor, seed: int) -> torch.Tensor:
        from cera_train.cera.branch import seeded_dropout

        A, B, dropout = (part[ADAPTER] for part in (layer.lora_A, layer.lora_B, layer.lora_dropout))
        x = layer._cast_input_dtype(x, A.weight.dtype)
        p = getattr(dropout, "p", 0.0)  # without dropout PEFT has an identity there
        if p and dropout.training:
            x = seeded_dropout(x, p, seed)
        return (output + layer.scaling[ADAPTER] * B(A(x))).to(output.dtype)

    def B(self, layer: nn.Module) -> torch.Tensor:
        """B as the layer multiplies by it, [d_out, R], float64."""
        return layer.lora_B[ADAPTER].weight.double()


FAMILY = Lora()
