"""CeRA: y = W0 x + s B dropout(gate(A x)), arXiv 2602.22911."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cera_train.adapters.config import GATE_SETTINGS
from cera_train.adapters.families.peft import RankedPeft
from cera_train.adapters.family import ADAPTER, Branch
from cera_train.common.settings import require

if TYPE_CHECKING:
    import peft
    from torch import nn


class Cera(RankedPeft):
    name = "CeRA"
    uses = RankedPeft.uses | GATE_SETTINGS
    b_matrix = "cera_B"

    def check(self, config: Any) -> None:
        super().check(config)
        steps = config.recurrent_steps
        require(steps >= 0, f"adapter.recurrent_steps={steps} must be 0 or more.")
        require(
            not (config.mix == "learned" and config.activation == "identity"),
            "adapter.mix=learned mixes the gate with the identity, and adapter.activation=identity is none: set "
            "another, or adapter.mix=none.",
        )
        require(
            not (self.has_learned_gate(config) and config.kernels == "triton"),
            f"adapter.kernels=triton computes no gate with parameters, as adapter.mix={config.mix} "
            f"adapter.recurrent_steps={steps} has: set adapter.kernels=auto.",
        )

    def title(self, config: Any) -> str:
        variants = self.variants(config)
        return f"{self.name} ({', '.join(variants)})" if variants else self.name

    def variants(self, settings: Any) -> list[str]:
        """What sets these settings apart from the paper's. A run of an earlier version lacks some: None."""
        return [
            *[str(settings.activation)] * (settings.activation not in (None, "silu")),
            *[f"init {settings.init}"] * (settings.init not in (None, "kaiming_normal")),
            *["dropout on input"] * (settings.dropout_on == "input"),
            *["learned mix"] * (settings.mix == "learned"),
            *[f"{settings.recurrent_steps} recurrent steps"] * bool(settings.recurrent_steps),
        ]

    def formula(self, config: Any) -> str:
        """The branch in a line, for a reader."""
        gate, on_input = config.activation, config.dropout_on == "input"
        z = "A dropout(x)" if on_input else "A x"
        if not self.has_learned_gate(config):
            return f"y = W0 x + s B {f'{gate}({z})' if on_input else f'dropout({gate}({z}))'}"
        hidden = f"(z + gamma ({gate}(z) - z))" if config.mix == "learned" else f"{gate}(z)"
        steps = f" after {config.recurrent_steps} recurrent steps" * bool(config.recurrent_steps)
        return f"y = W0 x + s B {hidden if on_input else f'dropout {hidden}'}, z = {z}{steps}"

    def has_learned_gate(self, config: Any) -> bool:
        """Whether the gate has parameters, so that torch computes it."""
        return config.mix == "learned" or config.recurrent_steps > 0

    def peft_config(self, config: Any) -> peft.PeftConfig:
        from cera_train.cera import CeraConfig

        fields = {name: getattr(config, name) for name in ("r", "alpha", "dropout", "recurrent_steps")}
        fields |= {name: str(getattr(config, name)) for name in ("activation", "init", "dropout_on", "mix")}
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
