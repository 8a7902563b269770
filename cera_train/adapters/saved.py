"""What a run trains, on the disk: an adapter in PEFT's format, or a fully fine-tuned model in
transformers'.

A full model has `full_model.json` beside it: an adapter_config.json would send transformers looking
for an adapter. Imports torch and peft inside functions, so that a mistake is answered before they
are loaded.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cera_train.adapters.families import family
from cera_train.adapters.families.base import ADAPTER, replaces_base, usable_methods
from cera_train.common.errors import UserError
from cera_train.common.files import read_json
from cera_train.common.settings import require
from cera_train.common.trust import check_adapter_settings
from cera_train.settings.adapters import AdapterConfig

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

ADAPTER_CONFIG = "adapter_config.json"
FULL_MODEL = "full_model.json"


def is_saved_in(folder: Path) -> bool:
    """Whether a folder holds an adapter or a full model in the format of `save`."""
    return (folder / ADAPTER_CONFIG).is_file() or (folder / FULL_MODEL).is_file()


def description_file(folder: Path) -> Path:
    """The JSON file that names the base model. Raises UserError where there is none."""
    if not is_saved_in(folder):
        raise UserError(f"{folder} holds no adapter: expected a folder with {ADAPTER_CONFIG}.")
    return folder / (ADAPTER_CONFIG if (folder / ADAPTER_CONFIG).is_file() else FULL_MODEL)


def weights_file(folder: Path) -> Path:
    """The safetensors file with the weights. Raises UserError where there is none: PEFT would look
    for an adapter's on the Hub, by the folder's name, and would read a pickle."""
    of_adapter = description_file(folder).name == ADAPTER_CONFIG
    weights = folder / ("adapter_model.safetensors" if of_adapter else "model.safetensors")
    if weights.is_file():
        return weights
    if of_adapter and (folder / "adapter_model.bin").is_file():
        raise UserError(
            f"{folder}/adapter_model.bin is a pickle, which can run code when it is read: convert "
            "it to safetensors where it comes from, "
            "safetensors.torch.save_file(torch.load('adapter_model.bin', weights_only=True), "
            "'adapter_model.safetensors')."
        )
    raise UserError(f"{folder} lacks its weights, {weights.name}: restore the file.")


def check_saved(folder: Path) -> dict[str, Any]:
    """Raises UserError where a folder holds no weights or a pickle, or asks for more than to put
    weights in place. Returns its description."""
    weights_file(folder)
    description = read_json(description_file(folder))
    if description_file(folder).name == ADAPTER_CONFIG:
        kind = description.get("peft_type")
        # Only other types are looked up in PEFT, whose import is slow.
        if kind not in ("CERA", "LORA"):
            methods = usable_methods()
            require(
                kind in methods,
                f"{folder} is an adapter of type {kind!r}: expected one of {', '.join(methods)}.",
            )
        check_adapter_settings(folder, description)
    return description


START_FIELDS = (
    *("peft_type", "use_rslora", "use_dora", "r", "alpha", "lora_alpha", "activation", "mix"),
    *("rank_pattern", "alpha_pattern"),
)
"""Fields of PEFT's config that weights to start from must share. Their names and shapes show
targets and layers."""


def check_start(config: AdapterConfig, folder: Path) -> None:
    """Raises UserError where the adapter in a folder would compute something else under these
    settings (`adapter.start_from`)."""
    theirs = check_saved(folder)
    ours = family(config.kind).peft_config(config).to_dict()
    if replaces_base(start := theirs.get("init_lora_weights")):
        raise UserError(
            f"adapter.start_from={config.start_from}: {start} moved a part of W0 into these "
            "weights, which fit only the rest of it. Start from an adapter with another init."
        )
    shared = [name for name in START_FIELDS if name in ours and name in theirs]
    different = [
        f"{name} is {json.dumps(theirs[name])} there, {json.dumps(ours[name])} here"
        for name in shared
        if theirs[name] != ours[name]
    ]
    if different:
        raise UserError(
            f"adapter.start_from={config.start_from}: {'; '.join(different)}. Set what is here to "
            "what is there, or start from another adapter."
        )


def is_adapter(model: nn.Module) -> bool:
    import peft

    return isinstance(model, peft.PeftModel)


def keeps_base(model: nn.Module) -> bool:
    """Whether `model.disable_adapter()` gives the untouched base model back. PiSSA moves a part of
    W0 into the adapter, biases of the base stay as trained, and full fine-tuning has no adapter."""
    if not is_adapter(model):
        return False
    config = model.peft_config[ADAPTER]
    keeps_biases = getattr(config, "bias", None) in (None, "none")
    return keeps_biases and not replaces_base(getattr(config, "init_lora_weights", None))


def save(model: nn.Module, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Writes trained weights, whole and by parameter name, into a folder."""
    if not is_adapter(model):
        # One file, by the names that `load` knows: those of the original format split what experts
        # share.
        model.save_pretrained(
            str(folder), state_dict=dict(weights), max_shard_size="1TB", save_original_format=False
        )
        marker = {"kind": "full", "base_model_name_or_path": model.name_or_path}
        (folder / FULL_MODEL).write_text(json.dumps(marker, indent=2) + "\n")
        return
    # PEFT chooses from trained weights, one that modules share under each of its names, and from
    # buffers: some methods hold random projections there. Not from state_dict(): of a sharded model
    # that is a collective.
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    shared = {
        alias: weights[names[id(parameter)]]
        for alias, parameter in model.named_parameters(remove_duplicate=False)
        if names[id(parameter)] in weights
    }
    buffers = dict(model.named_buffers(remove_duplicate=False))
    model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=buffers | shared)


def read(folder: Path) -> dict[str, torch.Tensor]:
    """The weights in a folder that `save` wrote, on the CPU, for `load`. Raises UserError where
    there are none, or some are not finite."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

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
    import peft

    tensors = saved_tensors(model)
    wanted, shapes = (
        {name: tensor.shape for name, tensor in each.items()} for each in (tensors, weights)
    )
    if wrong := sorted(
        name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name)
    ):
        there, here = (
            list(each[wrong[0]]) if wrong[0] in each else "missing" for each in (shapes, wanted)
        )
        raise UserError(
            f"the checkpoint does not fit this model: {len(wrong)} tensors differ, first "
            f"{wrong[0]}, {there} in the "
            f"file and {here} in the model."
        )
    if not is_adapter(model):
        model.load_state_dict(weights, strict=False)
        return
    peft.set_peft_model_state_dict(model, weights)


def saved_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and buffers that `save` writes, by their names in its file."""
    import peft

    if not is_adapter(model):
        return dict(model.named_parameters())
    tensors = model.state_dict(keep_vars=True)
    return peft.get_peft_model_state_dict(model, tensors, save_embedding_layers=False)


def attach(base: PreTrainedModel, folder: Path) -> nn.Module:
    """The base with what a folder holds: an adapter, or the weights of a full fine-tuning in place
    of the base's. Raises UserError where the folder is damaged, holds no adapter, or belongs to
    another base model."""
    import peft

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
    import torch

    from cera_train.adapters.build import widen

    narrow = []
    for name, tensor in saved_tensors(model).items():
        is_wide_in_file = name in weights and weights[name].dtype == torch.float32
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        if is_wide_in_file and is_parameter and tensor.dtype.itemsize < 4:
            # autocast keeps its 16-bit copy only of a weight that takes a gradient
            narrow.append(tensor.requires_grad_())
    if narrow:
        widen(model, narrow)
