"""CeRA: y = W0 x + s B dropout(gate(A x)), arXiv 2602.22911."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from cera_train.adapters.families.base import ADAPTER, Branch
from cera_train.adapters.families.peft import RankedPeft
from cera_train.common.settings import require
from cera_train.settings.adapters import Activation, AdapterConfig, Mix

if TYPE_CHECKING:
    import peft
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from cera_train.cera.experts import ExpertMatrices


class Cera(RankedPeft):
    name = "CeRA"
    uses = RankedPeft.uses | {"activation", "init", "init_scale", "dropout_on", "mix"}
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
        """What sets these settings apart from the paper's."""
        differs = {
            str(config.activation): config.activation != "silu",
            f"init {config.init}": config.init != "kaiming_normal",
            f"A x {config.init_scale:g}": config.init_scale != 1.0,
            "dropout on input": config.dropout_on == "input",
            "learned mix": config.mix == "learned",
        }
        return [name for name, is_other in differs.items() if is_other]

    def rate_factor(self, config: AdapterConfig) -> float:
        """silu, relu and gelu are z/2 + an even term: the branch starts at half of LoRA's scale, and the control,
        identity, has half the scale too. tanh and the learned mix start like z."""
        starts_like_lora = config.activation == Activation.tanh or config.mix == Mix.learned
        return (1 if starts_like_lora else 2) / math.sqrt(config.b_lr_ratio)

    def peft_config(self, config: AdapterConfig) -> peft.PeftConfig:
        from cera_train.cera import CeraConfig

        shared = {field.name for field in fields(config)} & {field.name for field in fields(CeraConfig)}
        values = {name: getattr(config, name) for name in shared - {"target_modules"}}
        values = {name: str(value) if isinstance(value, StrEnum) else value for name, value in values.items()}
        if config.experts:  # without names until `build` knows the model's
            values["expert_r"] = None
        return self.make(CeraConfig, config, values)

    def build(self, base: PreTrainedModel, config: AdapterConfig, left_out: list[str]) -> nn.Module:
        from cera_train.adapters.targets import expert_names

        if config.experts:
            config = replace(config, experts=False, target_parameters=expert_names(base))
        return super().build(base, config, left_out)

    def branches(self, module: nn.Module) -> dict[str, Branch]:
        from cera_train.cera import CeraExperts, CeraLayer

        if not isinstance(module, CeraLayer) or ADAPTER not in module.r:
            return {}
        parts = (module.cera_A, module.cera_B, module.cera_gate, module.r, module.scaling)
        A, B, gate, r, scaling = (part[ADAPTER] for part in parts)
        if not isinstance(module, CeraExperts):
            return {"": make_branch(Branch, module, A, B, gate, r, scaling, module.out_features)}
        return {
            f".{name}.{expert}": make_branch(
                *(ExpertBranch, A[name], ExpertMatrix(A[name], expert), ExpertMatrix(B[name], expert)),
                *(gate[name], r[name], scaling[name], B[name].weight.shape[1]),
            )
            for name in A
            for expert in range(len(A[name].weight))
        }


def make_branch(
    kind: type[Branch], layer: nn.Module, A: Any, B: Any, gate: nn.Module, r: int, scaling: float, out_features: int
) -> Branch:
    """A branch of these matrices.

    Args:
        A, B: have a weight, [r, d_in] and [d_out, r].
    """
    from torch import nn

    from cera_train.cera.branch import LearnedGate

    def gram() -> torch.Tensor:
        weight = B.weight.double()
        return scaling**2 * weight.T @ weight

    gamma = (lambda: gate.gamma.item()) if isinstance(gate, LearnedGate) else None
    return kind(layer, A, None if isinstance(gate, nn.Identity) else gate, r, out_features, gram, gamma)


@dataclass
class ExpertMatrix:
    """One of the matrices of a layer's experts."""

    matrices: ExpertMatrices
    expert: int

    @property
    def weight(self) -> torch.Tensor:
        return self.matrices.weight[self.expert]


class ExpertBranch(Branch):
    """The branch of one expert: A gets the rows that are routed to it."""

    def rows(self, inputs: tuple, is_token: torch.Tensor | None) -> torch.Tensor:
        x, routing = inputs
        pairs = routing.pairs_of[self.A.expert]
        return x[pairs] if is_token is None else x[pairs][is_token[routing.tokens[pairs]]]
