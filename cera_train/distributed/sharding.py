"""One model on several processes: replicated (DDP) or sharded (FSDP2). A checkpoint holds whole tensors either way: a
run can resume with another number of processes or another strategy."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from cera_train.common.errors import UserError


def fsdp2() -> FullyShardedDataParallelPlugin:
    """Accelerate's settings for FSDP2: each decoder layer is gathered when it computes, in its stored precision, so the
    numbers are those of DDP."""
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
        mixed_precision_policy=MixedPrecisionPolicy(),
    )


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Gathers a sharded tensor, a collective; returns any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trainable_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trainable weights, whole. A collective."""
    return {name: whole(weight.detach()) for name, weight in model.named_parameters() if weight.requires_grad}


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state_dict, whole. A collective."""
    return _map_tensors(whole, optimizer.state_dict())


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads a whole state_dict, sharded as the weights are.

    Raises:
        UserError: the state belongs to another optimizer or to other weights.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def shard(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        is_moment = isinstance(parameter, DTensor) and value.shape == parameter.shape  # AdamW's step count is a scalar
        return distribute_tensor(value, parameter.device_mesh, parameter.placements) if is_moment else value

    try:
        sharded = {
            index: _map_tensors(lambda value, index=index: shard(parameters[index], value), moments)
            for index, moments in state["state"].items()
        }
        optimizer.load_state_dict(state | {"state": sharded})
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"the checkpoint does not fit this optimizer: {error!r}.") from error


def _map_tensors(function: Any, tree: Any) -> Any:
    """Applies a function to every tensor in nested dicts and lists."""
    if isinstance(tree, dict):
        return {key: _map_tensors(function, value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_map_tensors(function, value) for value in tree]
    return function(tree) if isinstance(tree, torch.Tensor) else tree
