"""DoRA: the rows of W0 + s B A rescaled to a learned magnitude m, PEFT's.

Its branch is s B A x times m / |W0 + s B A|. The rescaled W0 x is left out: it is of full rank whatever the adapter
learns, and would drown the branch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cera_train.adapters.families.lora import Lora
from cera_train.adapters.family import ADAPTER
from cera_train.settings.adapters import AdapterConfig

if TYPE_CHECKING:
    import torch
    from torch import nn


class Dora(Lora):
    name = "DoRA"
    variant = "DoraLinearVariant"

    def lora_fields(self, config: AdapterConfig) -> dict[str, Any]:
        return super().lora_fields(config) | {"use_dora": True}

    def B(self, layer: nn.Module) -> torch.Tensor:
        from peft.utils.integrations import dequantize_module_weight

        magnitude = layer.lora_magnitude_vector[ADAPTER]
        update = layer.lora_B[ADAPTER].weight @ layer.lora_A[ADAPTER].weight
        weight = dequantize_module_weight(layer.get_base_layer()).to(update.dtype)
        scale = (magnitude.weight / magnitude.get_weight_norm(weight, update, layer.scaling[ADAPTER])).double()
        return scale[:, None] * super().B(layer)


FAMILY = Dora()
