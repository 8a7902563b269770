"""rsLoRA: LoRA scaled by alpha / sqrt(r), PEFT's."""

from __future__ import annotations

import math
from typing import Any

from cera_train.adapters.families.lora import Lora
from cera_train.settings.adapters import AdapterConfig


class RsLora(Lora):
    name = "rsLoRA"

    def default_alpha(self, r: int) -> float:
        return math.sqrt(r)

    def lora_fields(self, config: AdapterConfig) -> dict[str, Any]:
        return super().lora_fields(config) | {"use_rslora": True}


FAMILY = RsLora()
