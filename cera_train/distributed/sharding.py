"""One model on several processes: replicated (DDP) or sharded (FSDP2). A checkpoint holds whole
tensors either way: a run can resume with another number of processes or another strategy."""

import functools
from typing import Any

import torch
from torch import nn
from torch.amp import GradScaler
from torch.distributed.tensor import DTensor, distribute_tensor

from cera_train.common.settings import map_values


def trainable_weights(model: nn.Module, keep: bool = True) -> dict[str, torch.Tensor | None]:
    """The trainable weights, unsharded; a process that does not `keep` them gets None for each. A
    collective."""
    return {
        name: _whole(weight.detach(), keep)
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }


def optimizer_state(
    optimizer: torch.optim.Optimizer, scaler: GradScaler | None = None, keep: bool = True
) -> dict[str, Any]:
    """The unsharded state_dict of an optimizer, and its gradient scaler's; a process that does not
    `keep` them gets None for each tensor. A collective."""
    state = map_values(lambda tensor: _whole(tensor, keep), optimizer.state_dict(), torch.Tensor)
    return state if scaler is None else state | {"scaler": scaler.state_dict()}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, state: dict[str, Any], scaler: GradScaler | None = None
) -> None:
    """Loads what `optimizer_state` returned, sharded as the weights are. The scaler starts anew if
    the state comes from a run in another precision."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    sharded = {
        index: map_values(functools.partial(_shard, parameters[index]), moments, torch.Tensor)
        for index, moments in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": sharded})
    if scaler is not None and "scaler" in state:
        scaler.load_state_dict(state["scaler"])


def _whole(tensor: torch.Tensor, keep: bool) -> torch.Tensor | None:
    if isinstance(tensor, DTensor):
        whole = tensor.full_tensor()
        # A GPU may hold one unsharded tensor, but not all of them.
        return whole.cpu() if keep else None
    return tensor if keep else None


def _shard(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    # AdamW's step count is a scalar, and not sharded.
    is_moment = isinstance(parameter, DTensor) and value.shape == parameter.shape
    return (
        distribute_tensor(value, parameter.device_mesh, parameter.placements)
        if is_moment
        else value
    )
