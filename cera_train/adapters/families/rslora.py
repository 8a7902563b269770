"""rsLoRA: LoRA scaled by alpha / sqrt(r), PEFT's."""

from __future__ import annotations

import math
from typing import Any

from cera_train.adapters.families.lora import Lora


class RsLora(Lora):
    name = "rsLoRA"

    def lora_fields(self, config: Any) -> dict[str, Any]:
        alpha = config.alpha if config.alpha is not None else math.sqrt(config.r)
        return {"lora_alpha": alpha, "use_rslora": True, "use_dora": False}


FAMILY = RsLora()
