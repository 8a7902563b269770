"""CeRA whose gate is annealed away, as AFA-LoRA's (arXiv 2512.22455): in training the hidden units
are z / 2 + gamma (gate(z) - z / 2), z = A x, and gamma falls from 1 to 0 over the first share
`adapter.anneal` of the updates. Outside training the branch is s / 2 B A x: evaluated, and saved,
as a LoRA of PEFT, which merges."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from cera_train.adapters.families.base import ADAPTER, RankedFamily
from cera_train.adapters.families.lora import Lora
from cera_train.common.settings import require
from cera_train.settings.adapters import HALF_LINEAR_GATES, AdapterConfig

if TYPE_CHECKING:
    import peft
    from torch import nn
    from transformers import PreTrainedModel


class Anneal(Lora):
    uses = RankedFamily.uses - {"start_from"} | {"activation", "anneal"}

    def check(self, config: AdapterConfig) -> None:
        super().check(config)
        require(
            config.anneal is not None,
            "adapter.anneal=null: give the share of the updates over which the gate goes, such as "
            "adapter.anneal=0.8.",
        )
        require(
            config.activation in HALF_LINEAR_GATES,
            f"adapter.activation={config.activation}: only gates z / 2 + an even term are annealed "
            f"to z / 2: choose one of {', '.join(HALF_LINEAR_GATES)}.",
        )
        require(
            "init_lora_weights" not in config.settings,
            "adapter.settings.init_lora_weights: adapter.kind=anneal draws A itself, as CeRA does. "
            "Leave it out.",
        )

    def variants(self, config: AdapterConfig) -> list[str]:
        return [f"annealed until {config.anneal:.0%}"]

    def rate_factor(self, config: AdapterConfig) -> float:
        """As CeRA's: the branch starts at half of LoRA's scale."""
        return 2 * super().rate_factor(config)

    def peft_config(self, config: AdapterConfig) -> peft.PeftConfig:
        """Of the LoRA that is left."""
        lora = super().peft_config(replace(config, dropout=0.0))
        lora.lora_alpha /= 2
        lora.alpha_pattern = {key: alpha / 2 for key, alpha in lora.alpha_pattern.items()}
        return lora

    def build(self, base: PreTrainedModel, config: AdapterConfig, left_out: list[str]) -> nn.Module:
        from peft.tuners.lora import LoraLayer
        from torch import nn

        from cera_train.cera.gates import GATES, AnnealedGate

        model = super().build(base, config, left_out)
        # One gate for all branches, without parameters: PEFT saves nothing of it.
        gate = AnnealedGate(GATES[config.activation](), config.dropout)
        model.annealed_gate = gate.to(base.device)
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer):
                require(
                    self.branch(module) is not None,
                    f"adapter.kind=anneal: {name.removeprefix('base_model.model.')} has no linear "
                    "A whose output could take a gate: adapt projections alone.",
                )
                A = module.lora_A[ADAPTER]
                nn.init.kaiming_normal_(A.weight, nonlinearity="relu")
                A.register_forward_hook(model.annealed_gate.in_training)
        return model

    def begin_update(self, model: nn.Module, config: AdapterConfig, share: float) -> None:
        model.annealed_gate.gamma.fill_(max(0.0, 1 - share / config.anneal))
