"""Writes what a run trains to a folder, reads it, and puts it into a model."""

import json
import textwrap
from pathlib import Path

import peft
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from cera_train.adapters.build import widen
from cera_train.adapters.builders import ADAPTER
from cera_train.adapters.families import replaces_base
from cera_train.adapters.folder import (
    ADAPTER_CONFIG,
    FULL_MODEL,
    check_saved,
    description_file,
    weights_file,
)
from cera_train.common.errors import UserError
from cera_train.common.files import read_json
from cera_train.common.settings import require


def is_adapter(model: nn.Module) -> bool:
    return isinstance(model, peft.PeftModel)


def keeps_base(model: nn.Module) -> bool:
    """Whether `model.disable_adapter()` gives the untouched base model back. PiSSA moves a part of
    W0 into the adapter, KaSA drops one, biases of the base stay as trained, and full fine-tuning
    has no adapter."""
    if not is_adapter(model):
        return False
    config = model.peft_config[ADAPTER]
    keeps_biases = getattr(config, "bias", "none") == "none"
    is_whole = not replaces_base(getattr(config, "init_lora_weights", None))
    return keeps_biases and is_whole and not getattr(config, "kasa_config", None)


def save(model: nn.Module, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Writes trained weights, whole and by parameter name, into a folder."""
    if not is_adapter(model):
        # One file, by the names that `load` knows: those of the original format split what experts
        # share.
        model.save_pretrained(
            str(folder),
            state_dict=buffers(model) | weights,
            max_shard_size="1TB",
            save_original_format=False,
        )
        marker = {"kind": "full", "base_model_name_or_path": model.name_or_path}
        (folder / FULL_MODEL).write_text(json.dumps(marker, indent=2) + "\n")
        return
    # PEFT chooses from trained weights, one that modules share under each of its names, from the
    # adapter's frozen ones (MiCA's B), and from buffers: some methods hold random projections
    # there. Not from state_dict(): of a sharded model that is a collective.
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    shared = {
        alias: weights.get(names[id(parameter)], parameter)
        for alias, parameter in model.named_parameters(remove_duplicate=False)
        if names[id(parameter)] in weights or model.base_model.prefix in alias
    }
    tensors = buffers(model) | shared
    model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=tensors)


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Those that belong to a checkpoint, by name."""
    return {
        f"{place}.{name}".lstrip("."): buffer
        for place, module in model.named_modules(remove_duplicate=False)
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def read(folder: Path) -> dict[str, torch.Tensor]:
    """The weights in a folder that `save` wrote, on the CPU, for `load`. Raises UserError where
    there are none, or some are not finite."""
    try:
        check_saved(folder)  # also that they are no pickle
        weights = load_file(weights_file(folder))
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is damaged or no adapter: {error}") from error
    for name, tensor in weights.items():
        require(
            bool(tensor.float().isfinite().all()),
            f"{folder}: {name} is not finite: its training diverged. Restore the file, or train "
            "again with a lower optimizer.lr.",
        )
    return weights


def load(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Puts weights that `read` returned into a model. Raises UserError for a tensor too many,
    missing or misshapen."""
    tensors = saved_tensors(model)
    if not is_adapter(model):
        weights = buffers(model) | weights  # 0.2.0 left them out
    wanted, shapes = (
        {name: list(tensor.shape) for name, tensor in each.items()} for each in (tensors, weights)
    )
    if wrong := [name for name in wanted | shapes if wanted.get(name) != shapes.get(name)]:
        first = min(wrong)
        raise UserError(
            f"the checkpoint does not fit this model: {len(wrong)} tensors differ, first {first}, "
            f"{shapes.get(first, 'missing')} in the file and {wanted.get(first, 'missing')} in the "
            "model."
        )
    if is_adapter(model):
        peft.set_peft_model_state_dict(model, weights)
    else:
        model.load_state_dict(weights, strict=False)


def saved_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and buffers that `save` writes, by their names in its file."""
    if not is_adapter(model):
        return buffers(model) | dict(model.named_parameters())
    tensors = model.state_dict(keep_vars=True)
    return peft.get_peft_model_state_dict(model, tensors, save_embedding_layers=False)


def attach(base: PreTrainedModel, folder: Path) -> nn.Module:
    """The base with what a folder holds: an adapter, or the weights of a full fine-tuning in place
    of the base's. Raises UserError where the folder is damaged, holds no adapter, or belongs to
    another base model."""
    weights = read(folder)
    model = base
    try:
        if description_file(folder).name == ADAPTER_CONFIG:
            config = peft.PeftConfig.from_pretrained(str(folder))
            # PEFT puts the base's name there, and warns of any other.
            config.base_model_name_or_path = None
            config.task_type = peft.TaskType.CAUSAL_LM  # another trainer may have left it out
            config.auto_mapping = None
            model = peft.get_peft_model(base, config)
        _widen_as_trained(model, weights)
        load(model, weights)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is damaged or no adapter: {error}") from error
    except ValueError as error:
        reason = textwrap.shorten(str(error), 240, placeholder="...")
        wanted = read_json(description_file(folder)).get("base_model_name_or_path")
        if wanted not in (None, base.name_or_path):
            reason = (
                f"it belongs to another base model, {wanted}. Leave out model=, or name that one. "
                f"({reason})"
            )
        raise UserError(f"{folder} does not fit {base.name_or_path}: {reason}") from error
    return model


def _widen_as_trained(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Makes room for float32 weights in a 16-bit base, which would round them: those of a full
    fine-tuning, or norms and embeddings beside an adapter."""
    narrow = []
    for name, tensor in saved_tensors(model).items():
        is_wide_in_file = name in weights and weights[name].dtype == torch.float32
        is_parameter = isinstance(tensor, nn.Parameter)
        if is_wide_in_file and is_parameter and tensor.dtype.itemsize < 4:
            # autocast keeps its 16-bit copy only of a weight that takes a gradient
            narrow.append(tensor.requires_grad_())
    if narrow:
        widen(model, narrow)
