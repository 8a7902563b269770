"""Any method of PEFT, by its name in peft.PeftType. CeRA, LoRA and their kin give PEFT a config of their choice; the
rest, from building to loading, is the same."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cera_train.adapters.family import ADAPTER, Family
from cera_train.common.errors import UserError
from cera_train.common.settings import require
from cera_train.common.trust import BEYOND_WEIGHTS, check_adapter_settings, weights_of
from cera_train.settings.adapters import AdapterConfig

if TYPE_CHECKING:
    import peft
    import torch
    from torch import nn
    from transformers import PreTrainedModel

REPLACES_BASE = ("pissa", "olora", "corda", "lora_ga", "mica")
"""Starts of LoRA's init_lora_weights that take something out of W0."""


def replaces_base(start: Any) -> bool:
    """Whether a value of init_lora_weights takes something out of W0."""
    return isinstance(start, str) and start.startswith(REPLACES_BASE)


class Peft(Family):
    name = "PEFT"
    marker = "adapter_config.json"
    uses = frozenset({"method", "r", "alpha", "dropout", "target_modules", "layers", "settings"})
    needs_targets = False

    def title(self, config: AdapterConfig) -> str:
        return config.method or self.name

    def check(self, config: AdapterConfig) -> None:
        require(config.method is not None, "adapter.method=null: name a method of PEFT, such as adapter.method=MISS.")

    def peft_config(self, config: AdapterConfig) -> peft.PeftConfig:
        """The PEFT config. r, alpha and dropout go to the fields that hold them; null and 0 leave PEFT's defaults."""
        config_class, prefix = config_class_of(config.method), config.method.lower()
        names = {field.name for field in dataclasses.fields(config_class)}
        others = ", ".join(sorted(names - taken_fields()))
        fields = {}
        for setting, unset, places in (
            ("r", None, ("r",)),
            ("alpha", None, (f"{prefix}_alpha", "alpha")),
            ("dropout", 0, (f"{prefix}_dropout",)),
        ):
            value = getattr(config, setting)
            if value == unset:
                continue
            place = next((place for place in places if place in names), None)
            require(
                place is not None,
                f"adapter.{setting}={value}: PEFT's {config.method} has none. Set adapter.{setting}="
                f"{'null' if unset is None else unset}, or one of adapter.settings: {others}.",
            )
            fields[place] = value
        return self.make(config_class, config, fields)

    def make(self, config_class: type, config: AdapterConfig, fields: dict[str, Any]) -> peft.PeftConfig:
        """A PEFT config of these fields, the targets and `adapter.settings`."""
        import peft

        fields = fields | {"task_type": peft.TaskType.CAUSAL_LM}
        if config.target_modules is not None:
            fields["target_modules"] = config.target_modules
        if config.layers is not None:
            fields["layers_to_transform"] = config.layers
        taken = taken_fields() | fields.keys()
        for key, value in config.settings.items():
            place = f"adapter.settings.{key}={value!r}"
            require(key not in taken, f"{place} is not for here: another setting holds it, or it opens files.")
        with refusals_of_peft(config):
            return config_class(**fields, **config.settings)

    def build(self, base: PreTrainedModel, config: AdapterConfig, left_out: list[str]) -> nn.Module:
        import peft

        from cera_train.cera.coverage import exclude_projections

        if config.target_modules == "all-linear" and config.layers is not None:
            from cera_train.adapters.targets import linear_names

            # PEFT's LoRA takes layers with named modules only; the head is in no layer.
            layers = {name: module for name, module in base.named_modules() if re.search(r"\.\d+\.", name)}
            config = dataclasses.replace(config, target_modules=linear_names(layers.items()))
        peft_config = self.peft_config(config)
        exclude_projections(peft_config, left_out, base)
        with refusals_of_peft(config):
            model = peft.get_peft_model(base, peft_config)
            # PEFT fills in fields while it builds, such as IA3's feedforward_modules: what is saved must load again.
            peft.PeftConfig.from_peft_type(**copy.deepcopy(peft_config.to_dict()))
            return model

    def made(self, model: nn.Module) -> bool:
        import peft

        return isinstance(model, peft.PeftModel)

    def keeps_base(self, model: nn.Module) -> bool:
        return not replaces_base(getattr(model.peft_config[ADAPTER], "init_lora_weights", None))

    def why_no_spectrum(self, model: nn.Module) -> str:
        method = model.peft_config[ADAPTER].peft_type.value
        return f"PEFT's {method}, as configured, adds no B h with hidden units h beside a projection"

    def weights_file(self, folder: Path) -> Path:
        return weights_of(folder)

    def check_saved(self, folder: Path) -> None:
        super().check_saved(folder)
        settings = self.description(folder)
        kind = settings.get("peft_type")
        if kind not in ("CERA", "LORA") and kind not in (methods := usable_methods()):  # imports PEFT, which is slow
            raise UserError(f"{folder} is an adapter of type {kind!r}: expected one of {', '.join(methods)}.")
        check_adapter_settings(folder, settings)

    def save(self, model: nn.Module, weights: dict[str, torch.Tensor], folder: Path) -> None:
        # PEFT chooses from trained weights, one that modules share under each of its names, and from buffers: some
        # methods hold random projections there. Not from state_dict(): of a sharded model that is a collective.
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        shared = {
            alias: weights[names[id(parameter)]]
            for alias, parameter in model.named_parameters(remove_duplicate=False)
            if names[id(parameter)] in weights
        }
        buffers = dict(model.named_buffers(remove_duplicate=False))
        model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=buffers | shared)

    def read(self, folder: Path) -> dict[str, torch.Tensor]:
        import peft

        self.check_saved(folder)  # PEFT would also take a pickle, or look for the weights on the Hub
        return peft.load_peft_weights(str(folder), device="cpu")

    def saved_shapes(self, model: nn.Module) -> dict[str, torch.Size]:
        import peft

        tensors = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        return {name: tensor.shape for name, tensor in tensors.items()}

    def load(self, model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
        import peft

        if unexpected := peft.set_peft_model_state_dict(model, weights).unexpected_keys:
            raise ValueError(f"nothing takes {unexpected[0]}")

    def attach(self, base: PreTrainedModel, folder: Path) -> nn.Module:
        import peft

        config = peft.PeftConfig.from_pretrained(str(folder))
        config.base_model_name_or_path = None  # PEFT puts the base's name there, and warns of any other
        config.task_type, config.auto_mapping = peft.TaskType.CAUSAL_LM, None  # another trainer may have left it out
        return peft.get_peft_model(base, config)


class RankedPeft(Peft):
    """A method with A and B of a rank, which has a kind of its own."""

    uses = Peft.uses - {"method"} | {"b_lr_ratio", "start_from"}
    needs_targets = True

    def check(self, config: AdapterConfig) -> None:
        require(config.r is not None, f"adapter.r=null: adapter.kind={config.kind} needs a rank, such as adapter.r=64.")
        start = config.settings.get("init_lora_weights")
        require(
            config.start_from is None or not replaces_base(start),
            f"adapter.start_from={config.start_from}: adapter.settings.init_lora_weights={start} moves a part of W0 "
            "into fresh weights. Leave one of the two out.",
        )


@contextlib.contextmanager
def refusals_of_peft(config: AdapterConfig) -> Iterator[None]:
    """Turns PEFT's refusal, or its warning that a setting matches nothing, into one line with the settings
    to look at."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "The following .*_pattern keys|You have passed exclude_modules")
            yield
    except (TypeError, ValueError, NotImplementedError, ImportError, re.error, Warning) as error:
        raise UserError(f"{described(config)}: {' '.join(str(error).split())}") from error


def described(config: AdapterConfig) -> str:
    settings = "".join(f" adapter.settings.{key}={value}" for key, value in config.settings.items())
    return f"adapter.{f'method={config.method}' if config.method else f'kind={config.kind}'}{settings}"


def config_class_of(method: str) -> type[peft.PeftConfig]:
    """The config class of a PEFT method that the loop can train."""
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    usable = usable_methods()
    if method.upper() not in usable:
        reason = "is no method of PEFT's"
        if method.upper() in PeftType.__members__:
            reason = "needs more than a forward and a backward pass (prompts, several adapters, calls between updates)"
        raise UserError(f"adapter.method={method} {reason}. There are: {', '.join(usable)}.")
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method.upper())]


def usable_methods() -> list[str]:
    """The names of PEFT's methods whose tuner only replaces modules: the loop calls the model inside it, and nothing
    between updates."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    import cera_train.cera  # noqa: F401 - registers CeRA

    return sorted(
        kind.value
        for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()
        if issubclass(tuner, BaseTuner)
        and tuner.forward is BaseTuner.forward
        and not hasattr(tuner, "update_and_allocate")
    )


def taken_fields() -> set[str]:
    """Fields of PEFT's configs that `adapter.settings` may not hold: other settings do, or they open files."""
    import peft

    base = {field.name for field in dataclasses.fields(peft.PeftConfig)}
    return {*base, *BEYOND_WEIGHTS, "r", "target_modules", "layers_to_transform"}


FAMILY = Peft()
