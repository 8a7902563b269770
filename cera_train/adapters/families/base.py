"""What a kind of adapter has: settings to check, a model to build, branches whose spectra are taken.

Commands check settings before they load anything: the files of this folder import torch and peft inside functions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cera_train.settings.adapters import AdapterConfig

if TYPE_CHECKING:
    import peft
    import torch
    from torch import nn
    from transformers import PreTrainedModel

ADAPTER = "default"  # the name under which PEFT keeps the adapter


@dataclass
class Branch:
    """s B gate(A x) beside one projection: r hidden units, whose spectrum can be taken."""

    layer: nn.Module
    A: nn.Module  # has the weight, [r, d_in]
    B: Callable[[], torch.Tensor]  # [d_out, r], called inside the model's forward, where sharded weights are whole
    scaling: float
    r: int
    out_features: int
    gate: nn.Module | None = None  # None for the identity


class Family(ABC):
    """One kind of adapter."""

    name: str  # for tables and pictures
    uses: frozenset[str]  # the settings that it reads, beside kind and label. Any other that is set is refused.
    needs_targets: bool = True  # whether target_modules must be given
    trains_base: bool = False  # whether the base's weights are trained, and so loaded in float32
    b_matrix: str | None = None  # the module that holds B, for `adapter.b_lr_ratio`

    def title(self, config: AdapterConfig) -> str:
        return self.name

    def check(self, config: AdapterConfig) -> None:  # noqa: B027 - most have nothing to add
        """Raises UserError where settings contradict each other. Imports no torch."""

    def rate_factor(self, config: AdapterConfig) -> float | None:
        """The best learning rate over LoRA's, for `optimizer.lr=auto`. None: unknown."""
        return None

    def peft_config(self, config: AdapterConfig) -> peft.PeftConfig | None:
        """The config of PEFT; None without an adapter. Raises UserError for settings that PEFT refuses."""
        return None

    @abstractmethod
    def build(self, base: PreTrainedModel, config: AdapterConfig, left_out: list[str]) -> nn.Module:
        """The base with a fresh adapter. Its trainable parameters require gradients, no others do.

        Args:
            left_out: names of projections that all-linear does not take.
        """

    def branch(self, module: nn.Module) -> Branch | None:
        """The branch of this module; None for a module of another kind."""
        return None
