"""The settings of a CeRA adapter, as PEFT stores them in `adapter_config.json`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from peft import PeftConfig, PeftType
from peft.utils.other import get_pattern_key

from .gates import GATES

CHOICES = {
    "activation": tuple(GATES),
    "init": ("kaiming_normal", "kaiming_uniform"),
    "dropout_on": ("hidden", "input"),
    "mix": ("none", "learned"),
    "bias": ("none", "all", "cera_only"),
}
"""The values that a field may have."""


@dataclass
class CeraConfig(PeftConfig):
    """Configuration of y = W0 x + s B drop(gate(A x)), arXiv 2602.22911.

    The variants, each one line of mathematics; z = A x, and m is the mask of dropout:

    - `init`: A ~ N(0, 2 / d_in) for kaiming_normal, the paper's; A ~ U(-1 / sqrt(d_in), 1 /
      sqrt(d_in)) for kaiming_uniform, PEFT's for LoRA; times `init_scale`.
    - `dropout_on`: B (m gate(z)) for hidden, the paper's; B gate(A (m x)) for input, as in PEFT's
      LoRA.
    - `mix=learned`: B drop(z + gamma (gate(z) - z)), one trained scalar gamma a module, which
      starts at 0.
    - `use_rslora`: s = alpha / sqrt(r).

    Raises:
        ValueError: a field is outside its range, or two fields contradict each other.
    """

    r: int = 64
    """Rank: the width of the bottleneck, and the rows of A."""
    alpha: float | None = None
    """The branch is scaled by alpha / r; None means a scale of 1, as in the paper."""
    dropout: float = 0.1
    """Probability of dropping a unit, where dropout_on puts it."""
    activation: str = "silu"
    """The gate: one of `gates.GATES`."""
    target_modules: list[str] | set[str] | str | None = None
    """Module names (matched from the end), a regular expression for the whole name, or all-linear.
    None takes q_proj and v_proj, as in the paper; where a model has none, those that PEFT takes for
    LoRA; beside target_parameters none."""
    target_parameters: list[str] | None = None
    """Experts' 3-D parameters (matched from the end), such as mlp.experts.gate_up_proj: every
    expert gets a branch."""
    expert_r: None = None
    """Always None: cera-train 0.2.0 saved it, and `rank_pattern` has taken its place."""
    exclude_modules: list[str] | str | None = None
    """Modules to leave out again."""
    layers_to_transform: list[int] | int | None = None
    """Only these layer indices."""
    layers_pattern: list[str] | str | None = None
    """Name of the layer list, if it is not a common one such as 'layers' or 'h'."""
    modules_to_save: list[str] | None = None
    """Further modules to train whole and to save with the adapter."""
    init_weights: bool = True
    """Start B at zero, so the adapted model starts as the base. False: for tests."""
    init: str = "kaiming_normal"
    """How A is drawn: kaiming_normal or kaiming_uniform."""
    init_scale: float = 1.0
    """A is drawn so many times as large."""
    dropout_on: str = "hidden"
    """What drops units: hidden or input."""
    mix: str = "none"
    """learned: a trained share gamma of the gate in every module."""
    use_rslora: bool = False
    """Scale the branch by alpha / sqrt(r)."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Name or regular expression of modules -> their rank instead of r."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Name or regular expression of modules -> their alpha."""
    bias: str = "none"
    """The base's biases to train: none, all or cera_only."""
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Tokens whose embeddings are trained, by PEFT's trainable tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("CERA")
        self.rank_pattern = longest_first(self.rank_pattern)
        self.alpha_pattern = longest_first(self.alpha_pattern)
        ranks = {"r": self.r} | _by_place("rank_pattern", self.rank_pattern)
        for name, r in ranks.items():
            if not (isinstance(r, int) and r > 0):
                raise ValueError(f"{name} must be a positive integer, got {r!r}.")
        scales = {"init_scale": self.init_scale}
        scales |= _by_place("alpha_pattern", self.alpha_pattern)
        if self.alpha is not None:
            scales["alpha"] = self.alpha
        for name, scale in scales.items():
            if not (isinstance(scale, (int, float)) and scale > 0):
                raise ValueError(f"{name} must be positive, got {scale!r}.")
        if isinstance(self.target_parameters, str):
            raise ValueError(
                f"target_parameters must be a list of names, got {self.target_parameters!r}."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and less than 1, got {self.dropout!r}.")
        if self.activation == "gated":
            raise ValueError("activation='gated' was last in cera-train 0.2.0: load it there.")
        for name, values in CHOICES.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"{name} must be one of {', '.join(values)}, got {getattr(self, name)!r}."
                )
        if self.expert_r is not None:
            raise ValueError(
                "expert_r was last in cera-train 0.2.0: set it to null, and its value in "
                "rank_pattern={'experts.gate_up_proj': 8, 'experts.down_proj': 8}."
            )
        if self.mix == "learned" and self.activation == "identity":
            raise ValueError(
                "mix='learned' mixes the gate with the identity: activation must not be 'identity'."
            )
        if self.use_rslora and self.alpha is None:
            raise ValueError(
                "use_rslora divides alpha by sqrt(r), and alpha=None is a scale of 1: set alpha."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform: set that too.")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                "layers_to_transform cannot be combined with all-linear or a regular expression "
                "in target_modules: name the layers in an expression."
            )

    def of_module(self, name: str) -> CeraConfig:
        """The settings of one module, or of an experts' parameter: its rank and alpha by the
        patterns."""
        r = self.rank_pattern.get(get_pattern_key(self.rank_pattern, name), self.r)
        alpha = self.alpha_pattern.get(get_pattern_key(self.alpha_pattern, name), self.alpha)
        return replace(self, r=r, alpha=alpha, rank_pattern={}, alpha_pattern={})

    @property
    def scaling(self) -> float:
        """The factor s in front of the branch."""
        if self.alpha is None:
            return 1.0
        return self.alpha / math.sqrt(self.r) if self.use_rslora else self.alpha / self.r

    def to_dict(self) -> dict[str, Any]:
        """The fields, with sets in a fixed order so that a saved config has the same bytes every
        time."""
        return {
            key: sorted(value) if isinstance(value, set) else value
            for key, value in super().to_dict().items()
        }


def longest_first(pattern: dict[str, Any] | None) -> dict[str, Any]:
    """Sorts a pattern by the length of its keys: PEFT takes the first that matches, and saves them
    by name."""
    return dict(
        sorted((pattern or {}).items(), key=lambda item: (-len(str(item[0])), str(item[0])))
    )


def _by_place(field: str, pattern: dict[str, Any]) -> dict[str, Any]:
    """The values of a pattern by field[key]."""
    return {f"{field}[{key!r}]": value for key, value in pattern.items()}
