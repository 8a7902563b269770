"""The settings of a CeRA adapter, as PEFT stores them in `adapter_config.json`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig, PeftType

ACTIVATIONS = ("silu", "relu", "gelu", "identity")
"""The gates between A and B. `identity` makes the branch linear: LoRA with its dropout moved."""


@dataclass
class CeraConfig(PeftConfig):
    """Configuration of y = W0 x + s B dropout(gate(A x)), arXiv 2602.22911.

    Raises:
        ValueError: a field is outside its range, or two fields contradict each other.
    """

    r: int = field(default=64, metadata={"help": "Rank: the width of the bottleneck, and the rows of A."})
    alpha: float | None = field(
        default=None, metadata={"help": "The branch is scaled by alpha / r; None means a scale of 1, as in the paper."}
    )
    dropout: float = field(default=0.1, metadata={"help": "Probability of dropping a hidden unit, after the gate."})
    activation: str = field(default="silu", metadata={"help": f"The gate: {', '.join(ACTIVATIONS)}."})
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Module names (matched from the end), a regular expression for the whole name, or 'all-linear'. "
            "None takes q_proj and v_proj, as in the paper; or nothing beside target_parameters."
        },
    )
    target_parameters: list[str] | None = field(
        default=None,
        metadata={
            "help": "Experts' 3-D parameters (matched from the end), such as mlp.experts.gate_up_proj: every expert "
            "gets a branch."
        },
    )
    expert_r: int | None = field(default=None, metadata={"help": "Rank of an expert's branch; None means r."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave out again."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Only these layer indices."})
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the layer list, if it is not a common one such as 'layers' or 'h'."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train whole and to save with the adapter."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "Start B at zero, so the adapted model starts as the base. False: for tests."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("CERA")
        if not (isinstance(self.r, int) and self.r > 0):
            raise ValueError(f"r must be a positive integer, got {self.r!r}.")
        if self.expert_r is not None and not (isinstance(self.expert_r, int) and self.expert_r > 0):
            raise ValueError(f"expert_r must be a positive integer, or None for r, got {self.expert_r!r}.")
        if self.expert_r is not None and not self.target_parameters:
            raise ValueError("expert_r has a meaning only with target_parameters: name experts' parameters there.")
        if isinstance(self.target_parameters, str):
            raise ValueError(f"target_parameters must be a list of names, got {self.target_parameters!r}.")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"alpha must be positive, or None for a scale of 1, got {self.alpha!r}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and less than 1, got {self.dropout!r}.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern has a meaning only with layers_to_transform: set that too.")
        is_expression = isinstance(self.target_modules, str) and self.target_modules != "all-linear"
        if is_expression and self.layers_to_transform is not None:
            raise ValueError(
                "layers_to_transform cannot be combined with a regular expression in target_modules: "
                "name the layers in the expression."
            )

    @property
    def scaling(self) -> float:
        """The factor s in front of the branch."""
        return self.scaling_of(self.r)

    @property
    def expert_rank(self) -> int:
        """The rank of an expert's branch."""
        return self.r if self.expert_r is None else self.expert_r

    def scaling_of(self, rank: int) -> float:
        """The factor in front of a branch of this rank."""
        return 1.0 if self.alpha is None else self.alpha / rank

    def to_dict(self) -> dict[str, Any]:
        """The fields, with sets in a fixed order so that a saved config has the same bytes every time."""
        return {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}
