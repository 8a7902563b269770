"""CeRA: y = W0 x + s B dropout(gate(A x)), arXiv 2602.22911."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from cera_train.adapters.families.base import ADAPTER, Branch, RankedFamily
from cera_train.common.settings import require
from cera_train.settings.adapters import Activation, AdapterConfig, Mix

if TYPE_CHECKING:
    import peft
    from torch import nn
    from transformers import PreTrainedModel


class Cera(RankedFamily):
    name = "CeRA"
    uses = RankedFamily.uses | {"activation", "init", "init_scale", "dropout_on", "mix"}
    uses |= {"target_parameters", "experts", "expert_r"}
    b_matrix = "cera_B"

    def check(self, config: AdapterConfig) -> None:
        super().check(config)
        require(
            not (config.experts and config.target_parameters),
            "adapter.experts=true adapts all experts: leave out adapter.target_parameters.",
        )

    def title(self, config: AdapterConfig) -> str:
        variants = self.variants(config)
        return f"{self.name} ({', '.join(variants)})" if variants else self.name

    def variants(self, config: AdapterConfig) -> list[str]:
        """How these settings differ from the paper's."""
        differs = {
            str(config.activation): config.activation != "silu",
            f"init {config.init}": config.init != "kaiming_normal",
            f"A x {config.init_scale:g}": config.init_scale != 1.0,
            "dropout on input": config.dropout_on == "input",
            "learned mix": config.mix == "learned",
        }
        return [name for name, is_other in differs.items() if is_other]

    def rate_factor(self, config: AdapterConfig) -> float:
        """silu, relu and gelu are z/2 + an even term: the branch starts at half of LoRA's scale,
        and the control, identity, has half the scale too. tanh and the learned mix start like z."""
        starts_like_lora = config.activation == Activation.tanh or config.mix == Mix.learned
        return (1 if starts_like_lora else 2) / math.sqrt(config.b_lr_ratio)

    def peft_config(self, config: AdapterConfig) -> peft.PeftConfig:
        from cera_train.cera import CeraConfig

        shared = {field.name for field in fields(config)} & {
            field.name for field in fields(CeraConfig)
        }
        values = {}
        for name in shared - {"target_modules"}:
            value = getattr(config, name)
            values[name] = str(value) if isinstance(value, StrEnum) else value
        if config.experts:  # without names until `build` knows the model's
            values["expert_r"] = None
        return self.make(CeraConfig, config, values)

    def build(self, base: PreTrainedModel, config: AdapterConfig, left_out: list[str]) -> nn.Module:
        from cera_train.cera.experts import expert_names

        if config.experts:
            config = replace(config, experts=False, target_parameters=expert_names(base))
        return super().build(base, config, left_out)

    def branch(self, module: nn.Module) -> Branch | None:
        from torch import nn

        from cera_train.cera import CeraLinear

        if not isinstance(module, CeraLinear) or ADAPTER not in module.r:
            return None
        A, B, gate, *_ = module.parts(ADAPTER)
        return Branch(
            layer=module,
            A=A,
            B=lambda: B.weight,
            scaling=module.scaling[ADAPTER],
            r=module.r[ADAPTER],
            out_features=module.out_features,
            gate=None if isinstance(gate, nn.Identity) else gate,
        )
