"""The optimizer of a config, and its learning rate as a function of the update."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from cera_train.common.errors import UserError
from cera_train.settings.training import OPTIMIZERS, OptimizerConfig, Schedule


def build_optimizer(
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], config: OptimizerConfig, device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer of a config. Raises UserError where it cannot run on this device.

    Args:
        parameters: what it updates; or groups, in which `lr_ratio` multiplies the learning rate.
    """
    kind = OPTIMIZERS[config.kind]
    if kind.needs_gpu and device.type != "cuda":
        raise UserError(
            f"optimizer.kind={config.kind} pages GPU memory, and this run is on {device.type}: "
            "use optimizer=adamw_8bit or optimizer=adamw."
        )
    module, _, name = kind.path.rpartition(".")
    optimizer = getattr(importlib.import_module(module), name)(
        parameters,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    set_learning_rate(optimizer, config.lr)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives every group of parameters its learning rate, in ratio to `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)  # bare parameters have no ratio


def learning_rate(config: OptimizerConfig, update: int, updates: int) -> float:
    """The learning rate of update number `update` (from 0) of `updates`: a linear warm-up, then the schedule. `linear`
    and `cosine` reach 0 after the last update."""
    warmup = math.ceil(config.warmup_ratio * updates)
    if update < warmup:
        return config.lr * (update + 1) / warmup
    progress = (update - warmup) / max(1, updates - warmup)
    if config.schedule == Schedule.linear:
        return config.lr * (1 - progress)
    if config.schedule == Schedule.cosine:
        return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr
