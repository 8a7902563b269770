"""The optimizer of a config, and its learning rate as a function of the update."""

import importlib
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from cera_train.adapters.families import family, title
from cera_train.common.errors import UserError
from cera_train.common.settings import Choice
from cera_train.model.folder import load_architecture
from cera_train.settings.adapters import AdapterConfig
from cera_train.settings.model import ModelConfig
from cera_train.settings.training import OPTIMIZERS, ObjectiveKind, OptimizerConfig, Schedule


def build_optimizer(
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    config: OptimizerConfig,
    device: torch.device,
) -> torch.optim.Optimizer:
    """The optimizer of a config. Raises UserError if it cannot run on this device.

    Args:
        parameters: the parameters, or groups of them with an `lr_ratio` that multiplies the
            learning rate.
    """
    kind = OPTIMIZERS[config.kind]
    if kind.needs_gpu and device.type != "cuda":
        raise UserError(
            f"optimizer.kind={config.kind} pages GPU memory, and this run is on {device.type}: "
            "use optimizer=adamw_8bit or optimizer=adamw."
        )
    # A third of the time of torch's default on a CPU, a loop over the parameters.
    step = {"fused": True} if kind.has_fused_cpu_step and device.type == "cpu" else {}
    module, _, name = kind.path.rpartition(".")
    optimizer = getattr(importlib.import_module(module), name)(
        parameters,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        **step,
    )
    set_learning_rate(optimizer, config.lr)
    return optimizer


def auto_rate(
    model: ModelConfig, adapter: AdapterConfig, objective: ObjectiveKind
) -> Choice[float]:
    """The learning rate of `optimizer.lr=auto`, to two digits: 7.5e-4 (2000 / hidden size)^p for
    LoRA, times the factors of the adapter and the objective.

    Tinker fitted 5e-4, and p = 0.0775 for Qwen and 0.781 for Llama and others, to sweeps with alpha
    = 32 (https://tinker-docs.thinkingmachines.ai/supervised-learning/sl-hyperparams). Short runs
    need more: 1.5 times by https://thinkingmachines.ai/blog/lora, twice in the runs of 16 to 80
    updates of the studies auto_rate and fair_scale, where 1.5 costs less than 1 % of the loss. The
    factors: 2 for CeRA and its control, whose branches start at half of LoRA's scale, as auto_rate
    found; not measured: 1/10 for full fine-tuning, as Tinker has it, and for dense,
    1 for LoRA's kin, and 1/10 for DPO and GRPO, which start from a model that answers.
    """
    config = load_architecture(model).get_text_config()
    hidden_size = getattr(config, "hidden_size", None)
    if hidden_size is None:
        raise UserError(
            f"optimizer.lr=auto: the config of {model.path} has no hidden_size: set a number, "
            f"such as 3e-4."
        )
    exponent = 0.0775 if config.model_type.startswith("qwen") else 0.781
    rate = 7.5e-4 * (2000 / hidden_size) ** exponent
    reason = f"optimizer.lr=auto, 7.5e-4 (2000 / {hidden_size})^{exponent}"
    if (factor := family(adapter.kind).rate_factor(adapter)) is None:
        reason += f", LoRA's: no factor is known for {title(adapter)}"
    else:
        rate *= factor
        reason += f", x {factor:g} for {title(adapter)}"
    if objective != ObjectiveKind.sft:
        rate *= 0.1
        reason += f", x 0.1 for {objective}"
    return Choice(float(f"{rate:.2g}"), reason)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every parameter group, in ratio to `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)  # bare parameters have no ratio


def learning_rate(config: OptimizerConfig, update: int, updates: int) -> float:
    """The learning rate of update number `update` (from 0) of `updates`: a linear warm-up, then the
    schedule. `linear` and `cosine` reach 0 after the last update."""
    warmup = math.ceil(config.warmup_ratio * updates)
    if update < warmup:
        return config.lr * (update + 1) / warmup
    progress = (update - warmup) / max(1, updates - warmup)
    if config.schedule == Schedule.linear:
        return config.lr * (1 - progress)
    if config.schedule == Schedule.cosine:
        return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr
