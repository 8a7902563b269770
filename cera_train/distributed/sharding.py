"""One model on several processes: replicated (DDP) or sharded (FSDP2). A checkpoint holds whole tensors either way: a
run can resume with another number of processes or another strategy."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from cera_train.common.errors import UserError
from cera_train.common.settings import map_values


def trainable_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trainable weights, whole. A collective."""
    return {name: _whole(weight.detach()) for name, weight in model.named_parameters() if weight.requires_grad}


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state_dict, whole. A collective."""
    return map_values(_whole, optimizer.state_dict(), torch.Tensor)


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads a whole state_dict, sharded as the weights are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        sharded = {
            index: map_values(functools.partial(_shard, parameters[index]), moments, torch.Tensor)
            for index, moments in state["state"].items()
        }
        optimizer.load_state_dict(state | {"state": sharded})
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"the checkpoint does not fit this optimizer: {error!r}.") from error


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _shard(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    is_moment = isinstance(parameter, DTensor) and value.shape == parameter.shape  # AdamW's step count is a scalar
    return distribute_tensor(value, parameter.device_mesh, parameter.placements) if is_moment else value
