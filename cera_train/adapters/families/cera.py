"""CeRA: y = W0 x + s B dropout(gate(A x)), arXiv 2602.22911."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cera_train.adapters.families.peft import RankedPeft
from cera_train.adapters.family import ADAPTER, Branch

if TYPE_CHECKING:
    import peft
    from torch import nn


class Cera(RankedPeft):
    name = "CeRA"
    uses = RankedPeft.uses | {"activation", "kernels"}
    b_matrix = "cera_B"

    def peft_config(self, config: Any) -> peft.PeftConfig:
        from cera_train.cera import CeraConfig

        fields = {"r": config.r, "alpha": config.alpha, "dropout": config.dropout, "activation": str(config.activation)}
        return self.make(CeraConfig, config, fields)

    def branch(self, module: nn.Module) -> Branch | None:
        from torch import nn

        from cera_train.cera import CeraLayer

        if not isinstance(module, CeraLayer) or ADAPTER not in module.r:
            return None
        A, B, gate = (part[ADAPTER] for part in (module.cera_A, module.cera_B, module.cera_gate))
        scaling = module.scaling[ADAPTER]
        return Branch(
            module,
            A,
            gate=None if isinstance(gate, nn.Identity) else gate,
            r=module.r[ADAPTER],
            out_features=module.out_features,
            gram=lambda: scaling**2 * B.weight.double().T @ B.weight.double(),
        )


FAMILY = Cera()
