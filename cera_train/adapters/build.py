"""An adapter on its base model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

import peft
from peft.utils.other import match_target_against_key
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cera_train.adapters.config import AdapterConfig, AdapterKind
from cera_train.cera import CeraConfig
from cera_train.common.errors import UserError


def add_adapter(model: PreTrainedModel, config: AdapterConfig) -> peft.PeftModel:
    """The model with a fresh adapter on its target modules, float32 whatever the base.

    Raises:
        ValueError: a target matches no module, or one that cannot be adapted.
    """
    _check_targets(model, config)
    if config.target_modules == "all-linear" and config.layers is not None:
        # PEFT's LoRA takes layers with named modules only; the head is in no layer.
        layers = {name: module for name, module in model.named_modules() if re.search(r"\.\d+\.", name)}
        config = replace(config, target_modules=linear_names(layers.items()))
    return peft.get_peft_model(model, adapter_config(config))


def adapter_config(config: AdapterConfig) -> peft.PeftConfig:
    """The PEFT config of an adapter: ours for CeRA, PEFT's LoRA for the others."""
    common = {
        "r": config.r,
        "target_modules": config.target_modules,
        "layers_to_transform": config.layers,
        "task_type": peft.TaskType.CAUSAL_LM,
    }
    if config.kind == AdapterKind.cera:
        return CeraConfig(**common, alpha=config.alpha, dropout=config.dropout, activation=str(config.activation))
    return peft.LoraConfig(
        **common,
        lora_alpha=config.scaled_alpha,
        lora_dropout=config.dropout,
        use_rslora=config.kind == AdapterKind.rslora,
        use_dora=config.kind == AdapterKind.dora,
    )


def _check_targets(model: PreTrainedModel, config: AdapterConfig) -> None:
    """PEFT complains only when nothing at all matches; one mistyped name of two would be ignored."""
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(config.target_modules, list):
        wanted = config.target_modules
        unmatched = [want for want in wanted if not any(name == want or name.endswith(f".{want}") for name in names)]
    elif config.target_modules != "all-linear":
        matches = any(match_target_against_key(config.target_modules, name) for name in names)
        unmatched = [] if matches else [config.target_modules]
    else:
        unmatched = []
    if unmatched:
        raise UserError(
            f"adapter.target_modules: {', '.join(map(repr, unmatched))} matches no module of this model. "
            f"Its linear projections are {', '.join(linear_names(model.named_modules()))}."
        )
    layers = model.config.get_text_config().num_hidden_layers
    outside = [layer for layer in config.layers or [] if not 0 <= layer < layers]
    if outside:
        raise UserError(f"adapter.layers: {outside} is outside this model's layers 0 to {layers - 1}.")


def linear_names(named_modules: Iterable[tuple[str, nn.Module]]) -> list[str]:
    """The last part of the names of the linear projections, each once, in their order."""
    names = (name for name, module in named_modules if isinstance(module, (nn.Linear, Conv1D)))
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters. A 4-bit weight counts as the numbers it stands for."""
    trainable, total = 0, 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)  # bitsandbytes packs two 4-bit numbers into a byte
        count = parameter.numel() if state is None else state.shape.numel()
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total
