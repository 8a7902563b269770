"""Full fine-tuning: every weight of the base, in float32, and no adapter.

The model is saved in transformers' format. A small file beside it, `full_model.json`, marks it as what a run trained:
an adapter_config.json would send transformers looking for an adapter.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from cera_train.adapters.family import Family
from cera_train.common.errors import UserError
from cera_train.settings.adapters import AdapterConfig

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

WEIGHTS = "model.safetensors"


class Full(Family):
    name = "full fine-tuning"
    marker = "full_model.json"
    uses = frozenset()
    needs_targets = False
    trains_base = True

    def build(self, base: PreTrainedModel, config: AdapterConfig, left_out: list[str]) -> nn.Module:
        if getattr(base, "is_quantized", False):
            raise UserError(
                "adapter.kind=full trains every weight, and quantised ones take no gradient: set "
                "model.quantization=none."
            )
        # 16-bit weights would round most updates away; the loop computes in 16 bits by autocast.
        return base.float().requires_grad_(True)

    def why_no_spectrum(self, model: nn.Module) -> str:
        return "full fine-tuning has no hidden units: its update of a projection is a matrix of any rank"

    def made(self, model: nn.Module) -> bool:
        import peft

        return not isinstance(model, peft.PeftModel)

    def keeps_base(self, model: nn.Module) -> bool:
        return False

    def weights_file(self, folder: Path) -> Path:
        if not (folder / WEIGHTS).is_file():
            raise UserError(f"{folder} lacks its weights, {WEIGHTS}: restore the file.")
        return folder / WEIGHTS

    def save(self, model: PreTrainedModel, weights: dict[str, torch.Tensor], folder: Path) -> None:
        model.save_pretrained(str(folder), state_dict=dict(weights), max_shard_size="1TB")  # one file
        marker = {"kind": "full", "base_model_name_or_path": model.name_or_path}
        (folder / self.marker).write_text(json.dumps(marker, indent=2) + "\n")

    def read(self, folder: Path) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(self.weights_file(folder))

    def saved_shapes(self, model: nn.Module) -> dict[str, torch.Size]:
        return {name: parameter.shape for name, parameter in model.named_parameters()}

    def load(self, model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
        model.load_state_dict(weights, strict=False)

    def attach(self, base: PreTrainedModel, folder: Path) -> nn.Module:
        return base


FAMILY = Full()
