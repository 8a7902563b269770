"""LoRA+ for CeRA: B learns faster than A, arXiv 2402.12354."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer as create_for_lora
from torch.optim import Optimizer


def create_loraplus_optimizer(
    model: PeftModel, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """PEFT's function of this name, with CeRA's B in the group that learns at `lr * loraplus_lr_ratio`.

    PEFT's looks for "lora_B" in a parameter's name, and would train CeRA's B at the learning rate of A.
    """
    optimizer = create_for_lora(model, optimizer_cls, lr=lr, loraplus_lr_ratio=loraplus_lr_ratio, **kwargs)
    slow, _, fast, _ = optimizer.param_groups
    is_B = {id(parameter) for name, parameter in model.named_parameters() if ".cera_B." in name}
    fast["params"] += [parameter for parameter in slow["params"] if id(parameter) in is_B]
    slow["params"] = [parameter for parameter in slow["params"] if id(parameter) not in is_B]
    return optimizer
