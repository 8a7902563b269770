"""Any method of PEFT, by its name in peft.PeftType. CeRA and LoRA give PEFT a config of their own; building is the
same."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cera_train.adapters.families.base import Family
from cera_train.common.errors import UserError
from cera_train.common.settings import require
from cera_train.common.terminal import announce_import
from cera_train.common.trust import BEYOND_WEIGHTS
from cera_train.settings.adapters import AdapterConfig

if TYPE_CHECKING:
    import peft
    from torch import nn
    from transformers import PreTrainedModel

REPLACES_BASE = ("pissa", "olora", "corda", "lora_ga", "mica")
"""Starts of LoRA's init_lora_weights that take something out of W0."""


def replaces_base(start: Any) -> bool:
    """Whether a value of init_lora_weights takes something out of W0."""
    return isinstance(start, str) and start.startswith(REPLACES_BASE)


class Peft(Family):
    name = "PEFT"
    uses = frozenset({"method", "r", "alpha", "dropout", "target_modules", "layers", "settings"})
    needs_targets = False

    def title(self, config: AdapterConfig) -> str:
        return config.method or self.name

    def check(self, config: AdapterConfig) -> None:
        require(config.method is not None, "adapter.method=null: name a method of PEFT, such as adapter.method=MISS.")

    def rate_factor(self, config: AdapterConfig) -> float | None:
        is_full_rank = (config.method or "").upper() == "LN_TUNING"  # adapter=dense
        return 0.1 if is_full_rank else None

    def peft_config(self, config: AdapterConfig) -> peft.PeftConfig:
        """The PEFT config. r, alpha and dropout go to the fields of these names, MISS's to miss_alpha and miss_dropout;
        null and 0 leave PEFT's defaults."""
        config_class = config_class_of(config.method)
        names, fields = {field.name for field in dataclasses.fields(config_class)}, {}
        for setting, unset in (("r", None), ("alpha", None), ("dropout", 0)):
            if (value := getattr(config, setting)) != unset:
                long_name = f"{config.method.lower()}_{setting}"
                fields[long_name if long_name in names else setting] = value
        return self.make(config_class, config, fields)

    def make(self, config_class: type, config: AdapterConfig, fields: dict[str, Any]) -> peft.PeftConfig:
        """A PEFT config of these fields, the targets and `adapter.settings`."""
        import peft

        fields = fields | {"task_type": peft.TaskType.CAUSAL_LM}
        if config.target_modules is not None:
            fields["target_modules"] = config.target_modules
        if config.layers is not None and config.target_modules != "all-linear":  # PEFT takes not both: see `build`
            fields["layers_to_transform"] = config.layers
        for key in config.settings.keys() & {*BEYOND_WEIGHTS}:
            raise UserError(f"adapter.settings.{key} can import or open files: no run sets it. Leave it out.")
        with peft_errors(config):
            return config_class(**fields, **config.settings)

    def build(self, base: PreTrainedModel, config: AdapterConfig, left_out: list[str]) -> nn.Module:
        import peft

        from cera_train.adapters.targets import linear_names
        from cera_train.cera.coverage import exclude_projections

        if config.target_modules == "all-linear" and config.layers is not None:
            in_layers = [(name, module) for name, module in base.named_modules() if re.search(r"\.\d+\.", name)]
            config = dataclasses.replace(config, target_modules=linear_names(in_layers))
        peft_config = self.peft_config(config)
        exclude_projections(peft_config, left_out, base)
        with peft_errors(config):
            model = peft.get_peft_model(base, peft_config)
            # PEFT fills in fields while it builds, such as IA3's feedforward_modules: what is saved must load again.
            peft.PeftConfig.from_peft_type(**copy.deepcopy(peft_config.to_dict()))
            return model


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
def peft_errors(config: AdapterConfig) -> Iterator[None]:
    """Turns an error of PEFT, or its warning that a setting matches nothing, into a UserError with the settings to look
    at."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "error", "The following .*_pattern keys|You have passed exclude_modules|.* tied layer"
            )
            yield
    except (AttributeError, TypeError, ValueError, NotImplementedError, ImportError, re.error, Warning) as error:
        settings = "".join(f" adapter.settings.{key}={value}" for key, value in config.settings.items())
        method = f"method={config.method}" if config.method else f"kind={config.kind}"
        raise UserError(f"adapter.{method}{settings}: {' '.join(str(error).split())}") from error


def config_class_of(method: str) -> type[peft.PeftConfig]:
    """The config class of a PEFT method that the loop can train."""
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    usable = usable_methods()
    require(
        method.upper() in usable,
        f"adapter.method={method} is no method of PEFT that a forward and a backward pass train. There are: "
        f"{', '.join(usable)}.",
    )
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method.upper())]


def usable_methods() -> list[str]:
    """The names of PEFT's methods whose tuner only replaces modules: the loop calls the model inside it, and nothing
    between updates."""
    announce_import("PyTorch and PEFT")
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
