"""Builds an adapter on its base model, counts its parameters and groups them for the optimizer.
What differs by kind is in builders.py."""

from collections.abc import Sequence
from typing import Any

import peft
from torch import nn
from transformers import PreTrainedModel

from cera_train.adapters.builders import ADAPTER, builder
from cera_train.adapters.families import check_settings, family, place_of
from cera_train.adapters.probe import errors_beside, is_quantised
from cera_train.adapters.targets import check_targets
from cera_train.cera.coverage import (
    bypassed_projections,
    idle_projections,
    projections_outside_text,
)
from cera_train.common.settings import require
from cera_train.settings.adapters import AdapterConfig


def check(config: AdapterConfig) -> None:
    """Raises UserError for settings that contradict each other or PEFT. Needs no model."""
    check_settings(config)
    builder(config.kind).peft_config(config)


WHOLE_ALONE = """
ADAMSS DEFT DELORA DENSE FROD FULL GLORA HRA LOHA LOKR MICA OLORA ORTHOGONAL OSF PEANUT PISSA PSOFT
SUPERTUNING TINYLORA UNILORA
""".split()  # noqa: SIM905
"""Methods, and starts of LoRA, that read or train weights as they are stored: packed ones raise an
error, or something else is computed without any. docs/methods.md has found them."""


def check_quantised(config: AdapterConfig) -> None:
    """Raises UserError where a method does not work beside quantised weights."""
    start = str(config.settings.get("init_lora_weights")).partition("_")[0]
    names = {str(name).upper() for name in (config.kind, config.method, start)}
    # LN_TUNING of linears, not of norms
    if "LN_TUNING" in names and "norm" not in str(config.target_modules or "norm"):
        names.add("DENSE")
    require(
        names.isdisjoint(WHOLE_ALONE),
        f"{place_of(config)} does not work beside quantised weights: set model.quantization=none, "
        "or choose another adapter.",
    )


def rank(model: nn.Module) -> int | None:
    """The rank of a model's adapter; None for a method without one."""
    configs = getattr(model, "peft_config", {})
    return getattr(configs.get(ADAPTER), "r", None) or None


def build(
    base: PreTrainedModel,
    config: AdapterConfig,
    idle: list[str] | None = None,
    has_autocast: bool = True,
) -> nn.Module:
    """The base with a fresh adapter in float32, whatever the base's dtype; for full fine-tuning,
    the base itself. Raises UserError where the adapter does not fit the model.

    Args:
        idle: names of projections beside which a branch would not learn; None finds them by a pass,
            for which every process needs the weights.
        has_autocast: the model runs under autocast.
    """
    if is_quantised(base):
        check_quantised(config)
    check_targets(base, config)
    with errors_beside(base, config):
        model = builder(config.kind).build(base, config, left_out(base, config, idle))
    # PEFT leaves biases and copies of the base's modules in 16 bits, which would round most
    # updates away.
    narrow = [
        weight
        for weight in model.parameters()
        if weight.requires_grad and weight.dtype.itemsize < 4
    ]
    require(
        has_autocast or not narrow,
        f"adapter.kind={config.kind} trains weights of the base in float32 beside 16-bit ones, "
        "which needs autocast: set model.dtype=float32, or bfloat16 without train.autocast=false.",
    )
    if narrow:
        widen(model, narrow)
    return model


def widen(model: nn.Module, trained: Sequence[nn.Parameter]) -> None:
    """Turns trained weights of a 16-bit base into float32, to be used under autocast."""
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    # Beside float32 weights, a CPU's layer norm takes no 16-bit ones.
    for weight in [*trained, *(weight for norm in norms for weight in norm.parameters())]:
        weight.data = weight.data.float()


def left_out(
    base: PreTrainedModel, config: AdapterConfig, idle: list[str] | None = None
) -> list[str]:
    """Names of the projections that get no branch, since it would not learn: those for images and
    sound; and of all-linear those that kernels bypass, and `idle` ones. A regular expression is
    taken as it is."""
    targets = config.target_modules
    if isinstance(targets, str) and targets != "all-linear":
        return []
    names = projections_outside_text(base)
    if targets == "all-linear":
        names += bypassed_projections(base)
        names += idle_projections(base) if idle is None else idle
    return list(dict.fromkeys(names))


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters. A 4-bit weight counts as the numbers it stands for."""
    return peft.PeftModel.get_nb_trainable_parameters(model)  # of any module


def parameter_groups(model: nn.Module, config: AdapterConfig) -> list[dict[str, Any]]:
    """The trainable parameters as groups of an optimizer, whose learning rate `lr_ratio`
    multiplies: one group, unless `adapter.b_lr_ratio` lets B, and vectors, learn faster than A
    (LoRA+, arXiv 2402.12354). As in PEFT's, both matrices of an embedding have one rate: its A x is
    a column of A, no sum over the model's width. It is A's here, and 1e-6 in PEFT."""
    groups: dict[float, list[nn.Parameter]] = {1.0: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_fast = f".{family(config.kind).b_matrix}." in name or parameter.ndim == 1
            ratio = config.b_lr_ratio if is_fast else 1.0
            groups.setdefault(ratio, []).append(parameter)
    return [{"params": parameters, "lr_ratio": ratio} for ratio, parameters in groups.items()]
