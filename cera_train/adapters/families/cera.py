"""CeRA: y = W0 x + s B dropout(gate(A x)), arXiv 2602.22911."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from cera_train.adapters.families.peft import RankedPeft
from cera_train.adapters.family import ADAPTER, Branch
from cera_train.common.settings import require
from cera_train.settings.adapters import AdapterConfig

if TYPE_CHECKING:
    import peft
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from cera_train.cera.experts import CeraExperts, ExpertMatrices


class Cera(RankedPeft):
    name = "CeRA"
    gate_settings = frozenset({"activation", "init", "dropout_on", "mix"})
    uses = RankedPeft.uses | gate_settings | {"target_parameters", "experts", "expert_r"}
    b_matrix = "cera_B"

    def check(self, config: AdapterConfig) -> None:
        super().check(config)
        require(
            not (config.mix == "learned" and config.activation == "identity"),
            "adapter.mix=learned mixes the gate with the identity, and adapter.activation=identity is none: set "
            "another, or adapter.mix=none.",
        )
        adapts_experts = config.experts or config.target_parameters
        require(
            not (config.experts and config.target_parameters),
            "adapter.experts=true adapts all experts: leave out adapter.target_parameters.",
        )
        require(
            config.expert_r is None or adapts_experts,
            f"adapter.expert_r={config.expert_r} is the rank of an expert, and none is adapted: set "
            "adapter.experts=true or adapter.target_parameters=[...].",
        )

    def title(self, config: AdapterConfig) -> str:
        variants = self.variants(config)
        return f"{self.name} ({', '.join(variants)})" if variants else self.name

    def variants(self, settings: Any) -> list[str]:
        """What sets these settings apart from the paper's. A run of an earlier version lacks some: None."""
        return [
            *[str(settings.activation)] * (settings.activation not in (None, "silu")),
            *[f"init {settings.init}"] * (settings.init not in (None, "kaiming_normal")),
            *["dropout on input"] * (settings.dropout_on == "input"),
            *["learned mix"] * (settings.mix == "learned"),
        ]

    def formula(self, config: AdapterConfig) -> str:
        """The branch in a line, for a reader."""
        gate, on_input = config.activation, config.dropout_on == "input"
        z = "A dropout(x)" if on_input else "A x"
        if config.mix != "learned":
            return f"y = W0 x + s B {f'{gate}({z})' if on_input else f'dropout({gate}({z}))'}"
        return f"y = W0 x + s B {'' if on_input else 'dropout '}(z + gamma ({gate}(z) - z)), z = {z}"

    def build(self, base: PreTrainedModel, config: AdapterConfig, left_out: list[str]) -> nn.Module:
        from cera_train.adapters.targets import expert_names

        if config.experts:
            config = replace(config, experts=False, target_parameters=expert_names(base))
        return super().build(base, config, left_out)

    def peft_config(self, config: AdapterConfig) -> peft.PeftConfig:
        from cera_train.cera import CeraConfig

        shared = {field.name for field in fields(config)} & {field.name for field in fields(CeraConfig)}
        values = {name: getattr(config, name) for name in shared - {"target_modules"}}
        values = {name: str(value) if isinstance(value, StrEnum) else value for name, value in values.items()}
        if not config.target_parameters:  # `build` knows all experts' names
            values["expert_r"] = None
        return self.make(CeraConfig, config, values)

    def branch(self, module: nn.Module) -> Branch | None:
        from cera_train.cera import CeraExperts, CeraLayer

        if not isinstance(module, CeraLayer) or isinstance(module, CeraExperts) or ADAPTER not in module.r:
            return None
        A, B, gate = (part[ADAPTER] for part in (module.cera_A, module.cera_B, module.cera_gate))
        computed = branch_fields(gate, module.scaling[ADAPTER], lambda: B.weight)
        return Branch(module, A, r=module.r[ADAPTER], out_features=module.out_features, **computed)

    def branches(self, module: nn.Module) -> dict[str, Branch]:
        from cera_train.cera import CeraExperts

        if not isinstance(module, CeraExperts) or ADAPTER not in module.r:
            return super().branches(module)
        return {
            f".{name}.{expert}": self._expert_branch(module, name, expert)
            for name, matrices in module.cera_A[ADAPTER].items()
            for expert in range(len(matrices.weight))
        }

    def _expert_branch(self, module: CeraExperts, name: str, expert: int) -> Branch:
        A, B, gate = (part[ADAPTER][name] for part in (module.cera_A, module.cera_B, module.cera_gate))
        computed = branch_fields(gate, module.scaling[ADAPTER][name], lambda: B.weight[expert])
        r, d_out = module.r[ADAPTER][name], B.weight.shape[1]
        return ExpertBranch(A, ExpertMatrix(A, expert), r=r, out_features=d_out, **computed)


def branch_fields(gate: nn.Module, scaling: float, B: Callable[[], torch.Tensor]) -> dict[str, Any]:
    """The fields of `Branch` that follow from the gate and from B."""
    from torch import nn

    from cera_train.cera.branch import LearnedGate

    mixes, is_identity = isinstance(gate, LearnedGate), isinstance(gate, nn.Identity)
    return {
        "gate": None if is_identity else gate,
        "gram": lambda: scaling**2 * B().double().T @ B().double(),
        "closes": not (mixes or is_identity),
        "gamma": (lambda: gate.gamma.item()) if mixes else None,
    }


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


FAMILY = Cera()
