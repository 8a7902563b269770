"""LoRA+ for CeRA: B learns faster than A, arXiv 2402.12354."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer as create_for_lora
from torch.optim import Optimizer


def create_loraplus_optimizer(
    model: PeftModel, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """PEFT's function of this name, with CeRA's B, and nothing else of it, in the group that learns at
    `lr * loraplus_lr_ratio`.

    PEFT's takes "lora_B" and every vector there, and so would train CeRA's B at the learning rate of A, and gamma at
    that of B.
    """
    optimizer = create_for_lora(model, optimizer_cls, lr=lr, loraplus_lr_ratio=loraplus_lr_ratio, **kwargs)
    slow, _, fast, _ = optimizer.param_groups
    for part, group, other in ((".cera_B.", slow, fast), (".cera_gate.", fast, slow)):
        moved = {id(parameter) for name, parameter in model.named_parameters() if part in name}
        other["params"] += [parameter for parameter in group["params"] if id(parameter) in moved]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in moved]
    return optimizer
