"""An adapter on its base model: built, counted, saved, loaded. What differs between methods stands in families/."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from cera_train.adapters.family import Family, check_settings, families, family, family_that_wrote
from cera_train.adapters.targets import check_targets
from cera_train.cera import CeraLayer
from cera_train.cera.coverage import bypassed_projections, idle_projections
from cera_train.common.errors import UserError
from cera_train.settings.adapters import AdapterConfig

EXPERTS_COMPILE = torch.__version__ >= (2, 13)
"""Whether torch.compile takes adapted experts: torch 2.12 guards on the number of tokens that an expert gets."""


def check(config: AdapterConfig, is_compiled: bool = False) -> None:
    """Raises UserError for settings that do not fit each other, PEFT or torch.compile. Needs no model."""
    check_settings(config)
    if is_compiled and config.adapted_experts and not EXPERTS_COMPILE:
        raise UserError(
            f"train.compile=true: torch {torch.__version__} compiles no adapted experts: leave it out, or use 2.13."
        )
    # PEFT takes no layers beside all-linear; `build` names the modules of these layers instead.
    adapter_config(replace(config, layers=None) if config.target_modules == "all-linear" else config)


def build(base: PreTrainedModel, config: AdapterConfig, is_sharded: bool = False) -> nn.Module:
    """The base with what is trained: a fresh adapter, float32 whatever the base; or, for full, the base itself. Raises
    UserError where the adapter does not go with the model.

    Args:
        is_sharded: only one process has the base's weights.
    """
    check_targets(base, config)
    return family(config.kind).build(base, config, left_out(base, config, is_sharded))


def left_out(base: PreTrainedModel, config: AdapterConfig, is_sharded: bool = False) -> list[str]:
    """Names of the projections that all-linear leaves out, since a branch there would not learn: those that kernels
    bypass, and those that a pass shows, for which every process needs the weights."""
    if config.target_modules != "all-linear":
        return []
    has_weights = not is_sharded and base.device.type != "meta"
    return bypassed_projections(base) + (idle_projections(base) if has_weights else [])


def adapter_config(config: AdapterConfig) -> peft.PeftConfig | None:
    """The PEFT config of an adapter; full has none."""
    return family(config.kind).peft_config(config)


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters. A 4-bit weight counts as the numbers it stands for."""
    trainable, total = 0, 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)  # bitsandbytes packs two 4-bit numbers into a byte
        count = parameter.numel() if state is None else state.shape.numel()
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


def save(model: nn.Module, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Writes trained weights, whole and by parameter name, into a folder: an adapter in PEFT's format, a fully
    fine-tuned model in transformers'."""
    _family_of(model).save(model, weights, folder)


def read(folder: Path) -> dict[str, torch.Tensor]:
    """The weights in a folder that `save` wrote, on the CPU, for `load`. Raises UserError where there are none."""
    try:
        return family_that_wrote(folder).read(folder)
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is damaged or no adapter: {error}") from error


def load(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Puts weights that `read` returned into a model. Raises UserError for a tensor too many, missing or misshapen."""
    kind = _family_of(model)
    wanted, shapes = kind.saved_shapes(model), {name: tensor.shape for name, tensor in weights.items()}
    if wrong := sorted(name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name)):
        name = wrong[0]
        there, here = (list(those[name]) if name in those else "missing" for those in (shapes, wanted))
        raise UserError(
            f"the checkpoint does not fit this model: {len(wrong)} tensors differ, first {name}, {there} in the file "
            f"and {here} in the model."
        )
    try:
        kind.load(model, weights)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the checkpoint does not fit this model: {' '.join(str(error).split())}") from error


def attach(base: PreTrainedModel, folder: Path) -> nn.Module:
    """The base with what a folder holds: an adapter, or the weights of a full fine-tuning in place of the base's.
    Raises UserError where the folder is damaged, holds no adapter, or belongs to another base model."""
    weights, kind = read(folder), family_that_wrote(folder)
    try:
        model = kind.attach(base, folder)
        load(model, weights)
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder} is damaged or no adapter: {error}") from error
    except ValueError as error:
        misfit = f"{folder} does not fit {base.name_or_path}"
        reason = textwrap.shorten(str(error), 240, placeholder="...")
        wanted = kind.description(folder).get("base_model_name_or_path")
        if wanted in (None, base.name_or_path):
            raise UserError(f"{misfit}: {reason}") from error
        raise UserError(
            f"{misfit}: it belongs to another base model, {wanted}. Leave out model=, or name that one. ({reason})"
        ) from error
    return model


def keeps_base(model: nn.Module) -> bool:
    """Whether `model.disable_adapter()` gives the untouched base model back. PiSSA moves a part of W0 into the adapter,
    and full fine-tuning has no adapter."""
    return _family_of(model).keeps_base(model)


def _family_of(model: nn.Module) -> Family:
    return next(kind for kind in families() if kind.made(model))


def parameter_groups(model: nn.Module, config: AdapterConfig) -> list[dict[str, Any]]:
    """The trainable parameters as groups of an optimizer, whose learning rate `lr_ratio` multiplies: one group, unless
    `adapter.b_lr_ratio` lets B learn faster than A (LoRA+, arXiv 2402.12354)."""
    groups: dict[float, list[nn.Parameter]] = {1.0: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            ratio = config.b_lr_ratio if f".{family(config.kind).b_matrix}." in name else 1.0
            groups.setdefault(ratio, []).append(parameter)
    return [{"params": parameters, "lr_ratio": ratio} for ratio, parameters in groups.items()]


def cera_layers(model: nn.Module) -> list[CeraLayer]:
    return [layer for layer in model.modules() if isinstance(layer, CeraLayer)]
