"""Full fine-tuning: every weight of the base, in float32, and no adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cera_train.adapters.families.base import Family
from cera_train.common.settings import require
from cera_train.settings.adapters import AdapterConfig

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class Full(Family):
    name = "full fine-tuning"
    uses = frozenset()
    needs_targets = False
    trains_base = True

    def rate_factor(self, config: AdapterConfig) -> float:
        return 0.1

    def build(self, base: PreTrainedModel, config: AdapterConfig, left_out: list[str]) -> nn.Module:
        require(
            not getattr(base, "is_quantized", False),
            "adapter.kind=full trains every weight, and quantised ones take no gradient: set model.quantization=none.",
        )
        # 16-bit weights would round most updates away; the loop computes in 16 bits by autocast.
        return base.float().requires_grad_(True)
