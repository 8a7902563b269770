"""The folder of what a run trains: an adapter in PEFT's format, or a fully fine-tuned model in
transformers'. Its files are checked before torch is imported.

A full model has `full_model.json` beside it: an adapter_config.json would send transformers looking
for an adapter.
"""

import json
from pathlib import Path
from typing import Any

from cera_train.adapters.families import replaces_base
from cera_train.common.errors import UserError
from cera_train.common.files import read_json
from cera_train.common.settings import require
from cera_train.common.terminal import announce_import
from cera_train.settings.adapters import AdapterConfig

ADAPTER_CONFIG = "adapter_config.json"
FULL_MODEL = "full_model.json"


def is_saved_in(folder: Path) -> bool:
    """Whether a folder holds an adapter or a full model in the format of `saved.save`."""
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
    raise UserError(
        f"{folder} lacks its weights, {weights.name}: restore the file, or convert a pickle, which "
        "can run code when it is read, to it where it comes from."
    )


def check_saved(folder: Path) -> dict[str, Any]:
    """Raises UserError where a folder holds no weights or a pickle, or asks for more than to put
    weights in place. Returns its description."""
    weights_file(folder)
    description = read_json(description_file(folder))
    if description_file(folder).name == ADAPTER_CONFIG:
        kind = description.get("peft_type")
        # Only other types are looked up in PEFT, whose import is slow.
        if kind not in ("CERA", "LORA"):
            announce_import("PyTorch and PEFT")
            from cera_train.adapters.methods import usable_methods

            methods = usable_methods()
            require(
                kind in methods,
                f"{folder} is an adapter of type {kind!r}: expected one of {', '.join(methods)}.",
            )
        start = description.get("init_lora_weights")
        require(
            start not in ("corda", "lora_ga"),
            f"{folder} lacks the part of W0 that its start, {start}, moved into it: save it as a "
            "plain LoRA, by PEFT's path_initial_model_for_weight_conversion, where it was trained.",
        )
        require(
            not description.get("alora_invocation_tokens"),
            f"{folder} is an aLoRA, which acts after its invocation tokens: only PEFT's own calls "
            "run it. Generate by peft.AutoPeftModelForCausalLM.",
        )
        check_adapter_settings(folder, description)
    return description


BEYOND_WEIGHTS = (
    "auto_mapping",
    "megatron_config",
    "loftq_config",
    "corda_config",
    "arrow_config",
    "layer_replication",
    "runtime_config",
)
"""Fields of PEFT's configs that name modules to import, files to open, or layers to add."""


def check_adapter_settings(adapter: Path, settings: dict[str, Any]) -> None:
    """Refuses an adapter_config.json that does more than place weights."""
    match settings.get("auto_mapping"):
        # What PEFT writes if task_type is missing: the base's class and its module.
        case {"base_model_class": str(), "parent_library": str(module), **others} if not others:
            allowed = {"auto_mapping"} if module.startswith("transformers.models.") else set()
        case _:
            allowed = set()
    if found := [name for name in BEYOND_WEIGHTS if settings.get(name) and name not in allowed]:
        raise UserError(
            f"{adapter}/adapter_config.json sets {', '.join(found)}, which can import or open what "
            "its author chose: set it to null if the adapter does not need it."
        )


START_FIELDS = (
    "peft_type",
    "use_rslora",
    "use_dora",
    "r",
    "alpha",
    "lora_alpha",
    "activation",
    "mix",
    "rank_pattern",
    "alpha_pattern",
)
"""Fields of PEFT's config that weights to start from must share. Their names and shapes show
targets and layers."""


def check_start(config: AdapterConfig, folder: Path) -> None:
    """Raises UserError where the adapter in a folder would compute something else under these
    settings (`adapter.start_from`)."""
    from cera_train.adapters.builders import builder

    theirs = check_saved(folder)
    ours = builder(config.kind).peft_config(config).to_dict()
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
