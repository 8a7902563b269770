"""Where a deployed model differs from its run: each module on the inputs that it has in the run.

Rounding adds up from layer to layer, and in 16 bits hides one module of hundreds from every figure
of the whole. In one module it is small."""

from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from cera_train.cera import CeraLayer
from cera_train.evaluation.generate import LoadedModel
from cera_train.model.batches import Batch

ROUNDING = {
    "float32": 2**-17,
    "float16": 2**-8,
    "bfloat16": 2**-8,
    "int8": 2**-5,
    "nf4": 2**-3,
}
"""Relative rounding of a module's output."""


def has_gates(loaded: LoadedModel) -> bool:
    return any(isinstance(module, CeraLayer) for module in loaded.model.modules())


@torch.no_grad()
def first_difference(
    run: LoadedModel, form: LoadedModel, row: Batch, precision: float
) -> str | None:
    """A sentence about the first module whose output is not that of the run, and about how strongly
    its adapter acts there. None where all agree. Adapters of a LoRA fitted to a CeRA are passed
    over.

    Args:
        precision: relative rounding of a module's output.
    """
    theirs = {plain_name(name): module for name, module in form.model.named_modules()}
    is_fitted = has_gates(run) and not has_gates(form)
    found = []

    def compare(
        name: str, module: nn.Module, inputs: tuple, settings: dict[str, Any], output: Any
    ) -> None:
        is_adapted = isinstance(module, BaseTunerLayer)
        if found or name not in theirs or (is_adapted and is_fitted):
            return
        y = first_tensor(output)
        with torch.autocast(y.device.type, enabled=False):
            inputs_there = [in_dtype(each, form.base.dtype) for each in inputs]
            difference = first_tensor(theirs[name](*inputs_there, **settings)) - y
        differs = difference.norm() > 4 * precision * y.norm()
        place = f"It first differs at {name}, "
        if not is_adapted:
            if differs:
                found.append(f"{place}which the run did not adapt.")
            return
        branch = y - first_tensor(module.base_layer(*inputs, **settings))
        change = (difference * branch).sum()
        size = branch.square().sum()
        # Rounding has no direction, so a change along the branch shows below the rounding of y.
        slack = precision / 8 * y.norm() * branch.norm()
        if differs or change.abs() > 0.05 * size + slack:
            strength = 1 + change / size
            found.append(f"{place}where its adapter acts {strength:.2f} times as strongly.")

    hooks = []
    adapted: list[str] = []
    for name, module in run.model.named_modules():
        if name.startswith(tuple(adapted)):
            continue  # a part of an adapter
        if isinstance(module, BaseTunerLayer):
            adapted.append(f"{name}.")
        elif [*module.children()]:
            continue
        hook = partial(compare, plain_name(name))
        hooks.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        with run.context():
            run.model(**row.inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.")


def first_tensor(output: Any) -> torch.Tensor:
    """Of a module's output, in float32."""
    return (output if isinstance(output, torch.Tensor) else output[0]).float()


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(dtype) if is_float else value
