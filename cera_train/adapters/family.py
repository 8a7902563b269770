"""What every kind of adapter does: check its settings, build, save and load itself. Each file of families/ holds one.

Commands check settings before they load anything: these files and this one import torch and peft inside functions.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from cera_train.common.errors import UserError
from cera_train.common.files import read_json
from cera_train.common.settings import require
from cera_train.settings.adapters import AdapterConfig, AdapterKind

if TYPE_CHECKING:
    import peft
    import torch
    from torch import nn
    from transformers import PreTrainedModel

ADAPTER = "default"
"""The name under which PEFT keeps the adapter."""


@dataclass
class Branch:
    """s B gate(A x) beside one projection: r hidden units, whose spectrum can be taken."""

    layer: nn.Module
    A: nn.Linear
    gate: nn.Module | None
    """None: the identity."""
    r: int
    out_features: int
    gram: Callable[[], torch.Tensor]
    """s^2 B^T B, [R, R], float64. Called inside the model's forward, where sharded weights are whole."""
    closes: bool = False
    """Whether a hidden unit is off where the gate gives nothing above 0."""
    gamma: Callable[[], float] | None = None
    """The learned share of the gate, called inside the forward too; None where it is not learned."""

    def rows(self, inputs: tuple, is_token: torch.Tensor | None) -> torch.Tensor:
        """The rows that A gets from the layer's inputs, [N, d_in].

        Args:
            is_token: which places of the batch, flattened, are no padding; None: all.
        """
        x = inputs[0].reshape(-1, inputs[0].shape[-1])
        # a head gets [N, d_in], without padding
        return x if is_token is None or inputs[0].ndim == 2 else x[is_token]


class Family(ABC):
    """One kind of adapter. The methods get an `AdapterConfig`, a base model, or the model that `build` returned."""

    name: ClassVar[str]
    """For tables and pictures."""
    marker: ClassVar[str]
    """The JSON file beside saved weights, with base_model_name_or_path: a folder that has it is of this kind."""
    uses: ClassVar[frozenset[str]]
    """The settings that it reads, beside kind and label. Any other that is set is refused."""
    needs_targets: ClassVar[bool] = True
    """Whether target_modules must be given."""
    trains_base: ClassVar[bool] = False
    """Whether the base's weights are trained, so that they are to be loaded in float32."""
    b_matrix: ClassVar[str | None] = None
    """The module that holds B, for `adapter.b_lr_ratio`."""
    alpha_field: ClassVar[str] = "alpha"
    """The field of PEFT's config that holds `adapter.alpha`."""

    def title(self, config: AdapterConfig) -> str:
        """The name of a config's method."""
        return self.name

    def check(self, config: AdapterConfig) -> None:  # noqa: B027 - most have nothing to add
        """Raises UserError where settings contradict each other. Imports no torch."""

    def default_alpha(self, r: int) -> float | None:
        """The alpha of adapter.alpha=null, as PEFT's config has it."""
        return None

    def peft_config(self, config: AdapterConfig) -> peft.PeftConfig | None:
        """The config of PEFT's; None without an adapter. Raises UserError for settings that PEFT refuses."""
        return None

    @abstractmethod
    def build(self, base: PreTrainedModel, config: AdapterConfig, left_out: list[str]) -> nn.Module:
        """The base with a fresh adapter. Its trainable parameters require gradients, no others do.

        Args:
            left_out: names of projections that all-linear does not take.
        """

    def branch(self, module: nn.Module) -> Branch | None:
        """The branch of one module; None for a module of another kind."""
        return None

    def branches(self, module: nn.Module) -> dict[str, Branch]:
        """The branches of one module by what follows its name."""
        branch = self.branch(module)
        return {} if branch is None else {"": branch}

    @abstractmethod
    def why_no_spectrum(self, model: nn.Module) -> str:
        """The reason why a model of this kind without any `branch` has no spectrum."""

    @abstractmethod
    def made(self, model: nn.Module) -> bool:
        """Whether `model` is one that this kind builds, saves and loads."""

    @abstractmethod
    def keeps_base(self, model: nn.Module) -> bool:
        """Whether `model.disable_adapter()` gives the base model back."""

    def wrote(self, folder: Path) -> bool:
        """Whether a folder is one that `save` wrote, or a library that saves alike."""
        return (folder / self.marker).is_file()

    def description(self, folder: Path) -> dict[str, Any]:
        """The content of `marker`."""
        return read_json(folder / self.marker)

    @abstractmethod
    def weights_file(self, folder: Path) -> Path:
        """The safetensors file with the weights. Raises UserError where there is none."""

    def check_saved(self, folder: Path) -> None:
        """Raises UserError where a folder lacks its weights, or asks for more than to put them in place."""
        self.weights_file(folder)
        self.description(folder)

    @abstractmethod
    def save(self, model: nn.Module, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """Writes the trained weights, whole and by parameter name, into a folder that exists."""

    @abstractmethod
    def read(self, folder: Path) -> dict[str, torch.Tensor]:
        """The weights that `save` wrote, on the CPU."""

    @abstractmethod
    def saved_shapes(self, model: nn.Module) -> dict[str, torch.Size]:
        """The shapes of the tensors that `save` writes, by their names."""

    @abstractmethod
    def load(self, model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
        """Puts weights that `read` returned into a model. Raises ValueError or RuntimeError where they do not fit."""

    @abstractmethod
    def attach(self, base: PreTrainedModel, folder: Path) -> nn.Module:
        """The base with the adapter that lies in a folder, built as the folder describes it, without its weights."""


def families() -> list[Family]:
    return [family(kind) for kind in AdapterKind]


def family(kind: str) -> Family:
    """The family of an `adapter.kind`: the file of that name."""
    return importlib.import_module(f"cera_train.adapters.families.{kind}").FAMILY


def title(config: AdapterConfig) -> str:
    """The name of an adapter for tables and pictures."""
    return config.label or family(config.kind).title(config)


UNSET = {"r": None, "dropout": 0, "target_modules": None, "settings": {}}
"""Values that stand for no choice, of settings whose default is one."""


def unset(name: str) -> Any:
    """The value of a setting that its kind does not use."""
    return UNSET[name] if name in UNSET else getattr(AdapterConfig, name)


def with_kind(config: AdapterConfig, kind: str) -> AdapterConfig:
    """The settings with another kind, without those of CeRA's gate where it has none."""
    ignored = family("cera").gate_settings - family(kind).uses
    return replace(config, kind=AdapterKind(kind), **{name: unset(name) for name in ignored})


def check_settings(config: AdapterConfig) -> None:
    """Raises UserError where settings contradict each other, or the kind would ignore one. Imports no torch."""
    kind = family(config.kind)
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name not in {*kind.uses, "kind", "label", "start_digest"} and value != unset(field.name):
            mend = "null" if unset(field.name) is None else str(unset(field.name)).lower()
            raise UserError(
                f"adapter.{field.name}={value}: adapter.kind={config.kind} does not use it. Set "
                f"adapter.{field.name}={mend}."
            )
    targets, adapts_experts = config.target_modules, config.experts or config.target_parameters
    is_list = isinstance(targets, list) and all(isinstance(name, str) for name in targets)
    is_chosen = bool(targets) and (is_list or isinstance(targets, str))
    require(
        is_chosen or (targets is None and not kind.needs_targets) or (targets == [] and bool(adapts_experts)),
        f"adapter.target_modules={targets!r} must be a list of module names, a regular expression or all-linear.",
    )
    kind.check(config)


def is_saved_in(folder: Path) -> bool:
    """Whether a folder holds trained weights that a family loads."""
    return any(family.wrote(folder) for family in families())


def family_that_wrote(folder: Path) -> Family:
    """The family that loads a folder. Raises UserError where none does."""
    for family in families():
        if family.wrote(folder):
            return family
    raise UserError(f"{folder} holds no adapter: expected a folder with adapter_config.json.")
