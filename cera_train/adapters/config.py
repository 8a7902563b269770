"""Settings of the adapter."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from cera_train.common.settings import require, require_positive, setting


class AdapterKind(StrEnum):
    cera = "cera"
    lora = "lora"
    rslora = "rslora"
    dora = "dora"


class Activation(StrEnum):
    silu = "silu"
    relu = "relu"
    gelu = "gelu"
    identity = "identity"


@dataclass
class AdapterConfig:
    kind: AdapterKind = setting(AdapterKind.cera, "result", binds_checkpoint=True)
    r: int = setting(64, "result", binds_checkpoint=True)
    """Rank."""
    alpha: float | None = setting(None, "result", binds_checkpoint=True)
    """The branch is scaled by alpha / r (rslora: alpha / sqrt(r)). null: a scale of 1."""
    dropout: float = setting(0.1, "result", binds_checkpoint=True)
    """cera: on the hidden units, after the gate. The others: PEFT's, on the input of A."""
    activation: Activation = setting(Activation.silu, "result", binds_checkpoint=True)
    """The gate of cera."""
    target_modules: Any = setting(lambda: ["q_proj", "v_proj"], "result", binds_checkpoint=True)
    """Module names, one regular expression for the whole name, or `all-linear`."""
    layers: list[int] | None = setting(None, "result", binds_checkpoint=True)
    """Only these layers. null: every layer."""

    def __post_init__(self) -> None:
        require_positive("adapter", self, "r", "alpha")
        require(0 <= self.dropout < 1, f"adapter.dropout={self.dropout} must be at least 0 and less than 1.")
        is_list = isinstance(self.target_modules, list) and all(isinstance(name, str) for name in self.target_modules)
        require(
            bool(self.target_modules) and (is_list or isinstance(self.target_modules, str)),
            f"adapter.target_modules={self.target_modules!r} must be a list of module names, a regular expression or "
            "all-linear.",
        )
        require(self.layers != [], "adapter.layers=[] adapts nothing: name layers, or leave it null for all.")
        require(
            self.kind == AdapterKind.cera or self.activation == Activation.silu,
            f"adapter.activation={self.activation} is the gate of cera; adapter.kind={self.kind} has none: leave it.",
        )
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            self._check_expression(self.target_modules)

    def _check_expression(self, expression: str) -> None:
        try:
            re.compile(expression)
        except re.error as error:
            require(False, f"adapter.target_modules={expression!r} is not a regular expression: {error}.")
        require(
            self.layers is None,
            f"adapter.layers={self.layers} cannot be combined with a regular expression in adapter.target_modules: "
            "name the layers in the expression.",
        )

    @property
    def scaled_alpha(self) -> float:
        """The alpha that PEFT's LoRA needs for the scale this config asks for."""
        if self.alpha is not None:
            return self.alpha
        return math.sqrt(self.r) if self.kind == AdapterKind.rslora else self.r
