"""CeRA: y = W0 x + s B dropout(gate(A x)), arXiv 2602.22911."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cera_train.adapters.families.peft import Peft
from cera_train.adapters.family import ADAPTER, Branch

if TYPE_CHECKING:
    import peft
    from torch import nn


class Cera(Peft):
    name = "CeRA"
    uses = frozenset(
        {"r", "alpha", "dropout", "activation", "target_modules", "layers", "settings", "b_lr_ratio", "kernels"}
    )
    needs_targets = True
    b_matrix = "cera_B"

    def check(self, config: Any) -> None:
        self.require_rank(config)

    def peft_config(self, config: Any) -> peft.PeftConfig:
        from cera_train.cera import CeraConfig

        fields = {"r": config.r, "alpha": config.alpha, "dropout": config.dropout, "activation": str(config.activation)}
        return self.make(CeraConfig, config, fields)

    def branch(self, module: nn.Module) -> Branch | None:
        from torch import nn

        from cera_train.cera import CeraLayer
        from cera_train.cera.gate import LearnedGate

        if not isinstance(module, CeraLayer) or ADAPTER not in module.r:
            return None
        A, B, gate = (part[ADAPTER] for part in (module.cera_A, module.cera_B, module.cera_gate))
        scaling = module.scaling[ADAPTER]
        mixes = isinstance(gate, LearnedGate) and gate.gamma is not None
        activation = gate.gate if isinstance(gate, LearnedGate) else gate
        return Branch(
            module,
            A,
            gate=None if isinstance(gate, nn.Identity) else gate,
            r=module.r[ADAPTER],
            out_features=module.out_features,
            gram=lambda: scaling**2 * B.weight.double().T @ B.weight.double(),
            closes=not (mixes or isinstance(activation, nn.Identity)),
            gamma=(lambda: gate.gamma.item()) if mixes else None,
        )


FAMILY = Cera()
