"""rsLoRA: LoRA scaled by alpha / sqrt(r), PEFT's."""

from __future__ import annotations

import math
from typing import Any

from cera_train.adapters.families.lora import Lora


class RsLora(Lora):
    name = "rsLoRA"

    def default_alpha(self, r: int) -> float:
        return math.sqrt(r)

    def lora_fields(self, config: Any) -> dict[str, Any]:
        return super().lora_fields(config) | {"use_rslora": True}


FAMILY = RsLora()
