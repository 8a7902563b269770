"""What each kind of adapter is in PEFT: its config, the base with a fresh adapter, and the branches
of a model. CeRA and LoRA give PEFT a config of their own; full fine-tuning has none."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Any

import peft
import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils.integrations import dequantize_module_weight
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel

from cera_train.adapters.families import place_of
from cera_train.adapters.folder import BEYOND_WEIGHTS
from cera_train.adapters.methods import config_class_of
from cera_train.adapters.targets import linear_names
from cera_train.cera import CeraConfig, CeraLinear
from cera_train.cera.coverage import exclude_projections
from cera_train.cera.experts import expert_names
from cera_train.common.errors import UserError
from cera_train.common.settings import require
from cera_train.settings.adapters import AdapterConfig, AdapterKind

ADAPTER = "default"  # the name under which PEFT keeps the adapter

UNUSABLE_SETTINGS = {
    "arrow_config": "it mixes adapters that are already trained",
    "loftq_config": "PEFT computes LoftQ on CUDA alone, where it is not tested",
    "apply_GS": "HRA starts from equal pairs, whose difference Gram-Schmidt would divide by",
    "use_asa": "ranks change between updates, by scores that no checkpoint keeps",
    "ensure_weight_tying": "PEFT unties it over 16-bit bases",
    "monteclora_config": "it draws from a buffer that no checkpoint keeps, and needs its own loss",
    "save_only_topk_weights": "what is saved is too little to resume from",
}
"""Settings of PEFT's methods that the loop cannot train, and why."""

NOT_FROM_BASE = ("eva", "corda", "lora_ga", "pissa_niter")
"""Starts of LoRA's init_lora_weights that W0 alone does not give again."""


@dataclasses.dataclass
class Branch:
    """s B gate(A x) beside one projection: r hidden units, whose spectrum can be taken."""

    layer: nn.Module
    A: nn.Module
    """Has the weight, [r, d_in]."""
    B: Callable[[], torch.Tensor]
    """-> [d_out, r]. Called inside the model's forward, where sharded weights are whole."""
    scaling: float
    r: int
    out_features: int
    gate: nn.Module | None = None  # None for the identity


class Builder:
    """A method of PEFT."""

    def peft_config(self, config: AdapterConfig) -> peft.PeftConfig | None:
        """The PEFT config; None without an adapter. r, alpha and dropout go to the fields of these
        names, MISS's to miss_alpha and miss_dropout; null and 0 leave PEFT's defaults. Raises
        UserError for what PEFT refuses."""
        config_class = config_class_of(config.method)
        names = {field.name for field in dataclasses.fields(config_class)}
        fields = {}
        for setting, unset in (("r", None), ("alpha", None), ("dropout", 0)):
            if (value := getattr(config, setting)) != unset:
                long_name = f"{config.method.lower()}_{setting}"
                name = long_name if long_name in names else setting
                require(
                    name in names,
                    f"adapter.{setting}={value}: adapter.method={config.method} has no {setting}. "
                    f"Set adapter.{setting}={'null' if unset is None else unset}.",
                )
                fields[name] = value
        return self.make(config_class, config, fields)

    def make(
        self, config_class: type, config: AdapterConfig, fields: dict[str, Any]
    ) -> peft.PeftConfig:
        """A PEFT config of these fields, the targets and `adapter.settings`."""
        fields = fields | {"task_type": peft.TaskType.CAUSAL_LM}
        if config.target_modules is not None:
            fields["target_modules"] = config.target_modules
        start = config.settings.get("init_lora_weights")
        require(
            not (isinstance(start, str) and start.startswith(NOT_FROM_BASE)),
            f"adapter.settings.init_lora_weights={start} starts from data or random numbers, which "
            "cera-train 0.2.0 was the last to do: choose pissa or olora, which start from W0.",
        )
        for key, reason in UNUSABLE_SETTINGS.items():
            is_set = config.settings.get(key) not in (None, False)
            require(not is_set, f"adapter.settings.{key}: {reason}. Leave it out.")
        for key in config.settings.keys() & {*BEYOND_WEIGHTS}:
            raise UserError(
                f"adapter.settings.{key} can import or open files: no run sets it. Leave it out."
            )
        with peft_errors(config):
            return config_class(**fields, **config.settings)

    def build(
        self,
        base: PreTrainedModel,
        config: AdapterConfig,
        left_out: list[str],
    ) -> nn.Module:
        """The base with a fresh adapter. Its trainable parameters require gradients, no others do.

        Args:
            left_out: names of projections that all-linear does not take.
        """
        peft_config = self.peft_config(config)
        if config.target_modules == "all-linear":
            name_linears(peft_config, base, left_out)
        exclude_projections(peft_config, left_out)
        with peft_errors(config):
            experts = ", ".join(taken_for_experts(peft_config, base))
            require(
                not experts,
                f"adapter.target_modules: PEFT takes a name among these for experts ({experts}) of "
                "this model: leave it out, or choose adapter=cera.",
            )
            model = peft.get_peft_model(base, peft_config)
            # PEFT fills in fields while it builds, such as IA3's feedforward_modules. Checks that
            # the config loads again once it is saved.
            peft.PeftConfig.from_peft_type(**copy.deepcopy(peft_config.to_dict()))
            return model

    def branch(self, module: nn.Module) -> Branch | None:
        """The branch of this module; None for a module of another kind."""
        return None


class FullBuilder(Builder):
    def peft_config(self, config: AdapterConfig) -> None:
        return None

    def build(self, base: PreTrainedModel, config: AdapterConfig, left_out: list[str]) -> nn.Module:
        # 16-bit weights would round most updates away; the loop computes in 16 bits by autocast.
        return base.float().requires_grad_(True)


class CeraBuilder(Builder):
    def peft_config(self, config: AdapterConfig) -> peft.PeftConfig:
        shared = {field.name for field in dataclasses.fields(config)} & {
            field.name for field in dataclasses.fields(CeraConfig)
        }
        values = {}
        for name in shared - {"target_modules"}:
            value = getattr(config, name)
            values[name] = str(value) if isinstance(value, StrEnum) else value
        return self.make(CeraConfig, config, values)

    def build(self, base: PreTrainedModel, config: AdapterConfig, left_out: list[str]) -> nn.Module:
        if config.experts:
            settings = config.settings | {"target_parameters": expert_names(base)}
            config = dataclasses.replace(config, experts=False, settings=settings)
        return super().build(base, config, left_out)

    def branch(self, module: nn.Module) -> Branch | None:
        if not isinstance(module, CeraLinear) or ADAPTER not in module.r:
            return None
        A, B, gate, *_ = module.parts(ADAPTER)
        return Branch(
            layer=module,
            A=A,
            B=lambda: B.weight,
            scaling=module.scaling[ADAPTER],
            r=module.r[ADAPTER],
            out_features=module.out_features,
            gate=None if isinstance(gate, nn.Identity) else gate,
        )


class LoraBuilder(Builder):
    def __init__(self, use_rslora: bool = False, use_dora: bool = False) -> None:
        self.use_rslora = use_rslora
        self.use_dora = use_dora

    def peft_config(self, config: AdapterConfig) -> peft.PeftConfig:
        scale_one = math.sqrt if self.use_rslora else int
        if config.alpha is None and (ranks := config.settings.get("rank_pattern")):
            given = config.settings.get("alpha_pattern") or {}
            # PEFT takes the first key that matches a module.
            alphas = given | {key: scale_one(r) for key, r in ranks.items()} | given
            config = dataclasses.replace(
                config, settings=config.settings | {"alpha_pattern": alphas}
            )
        fields = {
            "r": config.r,
            "lora_alpha": scale_one(config.r) if config.alpha is None else config.alpha,
            "lora_dropout": config.dropout,
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
        }
        return self.make(peft.LoraConfig, config, fields)

    def branch(self, module: nn.Module) -> Branch | None:
        if not isinstance(module, LoraLayer) or ADAPTER not in module.lora_A:
            return None
        if isinstance(module, ParamWrapper):  # adds to experts' weights, without hidden units
            return None
        A = module.lora_A[ADAPTER]
        variant = module.lora_variant.get(ADAPTER)
        matrix = {"NoneType": plain_B, "DoraLinearVariant": dora_B}.get(type(variant).__name__)
        if matrix is None or not isinstance(A, nn.Linear):
            return None

        scaling = module.scaling[ADAPTER]
        r = module.r[ADAPTER]
        return Branch(module, A, lambda: matrix(module), scaling, r, module.out_features)


def plain_B(layer: nn.Module) -> torch.Tensor:
    return layer.lora_B[ADAPTER].weight.double()


def dora_B(layer: nn.Module) -> torch.Tensor:
    """m / |W0 + s B A| B, by which DoRA multiplies A x. The rescaled W0 x is left out: it is of
    full rank whatever the adapter learns, and would drown the branch."""
    magnitude = layer.lora_magnitude_vector[ADAPTER]
    update = layer.lora_B[ADAPTER].weight @ layer.lora_A[ADAPTER].weight
    weight = dequantize_module_weight(layer.get_base_layer()).to(update.dtype)
    scale = (
        magnitude.weight / magnitude.get_weight_norm(weight, update, layer.scaling[ADAPTER])
    ).double()
    return scale[:, None] * plain_B(layer)


def name_linears(config: peft.PeftConfig, base: PreTrainedModel, left_out: list[str]) -> None:
    """Names the projections that all-linear stands for, where PEFT would take others: of a mixture
    of experts, and where a method cannot leave some out (VeRA)."""
    taken = as_peft_takes(config, base).target_modules
    is_mixture = taken != "all-linear"
    excluded = [] if hasattr(config, "exclude_modules") else left_out
    if not (is_mixture or excluded):
        return
    names = linear_names(
        (name, module)
        for name, module in base.named_modules()
        if re.search(r"\.\d+\.", name) and name not in excluded
    )
    config.target_modules = {name for name in names if not is_mixture or name in taken}


def as_peft_takes(config: peft.PeftConfig, base: PreTrainedModel) -> peft.PeftConfig:
    """A copy of a config with the targets that PEFT would take. A LoRA of a mixture may be of a
    transformers in which experts were modules: PEFT takes names such as down_proj for theirs, which
    are parameters now, and has no names for dense or shared projections that are called so."""
    config = copy.deepcopy(config)
    convert_peft_config_for_transformers(config, base, None)
    return config


def taken_for_experts(config: peft.PeftConfig, base: PreTrainedModel) -> list[str]:
    """Parameters of experts that PEFT would adapt, and that target_parameters do not name."""
    named = {*(getattr(config, "target_parameters", None) or ())}
    taken = {*(getattr(as_peft_takes(config, base), "target_parameters", None) or ())}
    return sorted(taken - named)


@contextlib.contextmanager
def peft_errors(config: AdapterConfig) -> Iterator[None]:
    """Turns an error of PEFT, or its warning that a setting matches nothing, into a UserError with
    the settings to look at."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "error",
                "The following .*_pattern keys|You have passed exclude_modules|.* tied layer",
            )
            yield
    except UserError:
        raise
    except (TypeError, ValueError, NotImplementedError, ImportError, re.error, Warning) as error:
        reason = " ".join(str(error).split())
        if "tied layer" in reason:
            reason = "lm_head and embed_tokens are one weight here: leave them out."
        raise UserError(f"{place_of(config)}: {reason}") from error


BUILDERS: dict[AdapterKind, Builder] = {
    AdapterKind.cera: CeraBuilder(),
    AdapterKind.lora: LoraBuilder(),
    AdapterKind.rslora: LoraBuilder(use_rslora=True),
    AdapterKind.dora: LoraBuilder(use_dora=True),
    AdapterKind.peft: Builder(),
    AdapterKind.full: FullBuilder(),
}


def builder(kind: str) -> Builder:
    return BUILDERS[AdapterKind(kind)]
