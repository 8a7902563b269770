"""Any method of PEFT, by its name in peft.PeftType. CeRA, LoRA and their kin give PEFT a config of their choice; the
rest, from building to loading, is the same."""

from __future__ import annotations

import copy
import dataclasses
import re
import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cera_train.adapters.family import ADAPTER, Family
from cera_train.common.errors import UserError
from cera_train.common.files import read_json
from cera_train.common.settings import require
from cera_train.common.trust import BEYOND_WEIGHTS, check_adapter_settings, weights_of

if TYPE_CHECKING:
    import peft
    import torch
    from torch import nn
    from transformers import PreTrainedModel

REPLACES_BASE = ("pissa", "olora", "corda", "lora_ga", "mica")
"""Starts of LoRA's init_lora_weights that take something out of W0."""


class Peft(Family):
    name = "PEFT"
    uses = frozenset({"method", "r", "alpha", "dropout", "target_modules", "layers", "settings"})
    needs_targets = False

    # --- settings ----------------------------------------------------------------------------------------------------

    def title(self, config: Any) -> str:
        return config.method if config.method else self.name

    def check(self, config: Any) -> None:
        require(config.method is not None, "adapter.method=null: name a method of PEFT, such as adapter.method=MISS.")

    def require_rank(self, config: Any) -> None:
        require(config.r is not None, f"adapter.r=null: adapter.kind={config.kind} needs a rank, such as adapter.r=64.")

    def check_by_library(self, config: Any) -> None:
        self.peft_config(config)

    def peft_config(self, config: Any) -> peft.PeftConfig:
        """The PEFT config. r, alpha and dropout go to the fields that hold them; null and 0 leave PEFT's defaults.

        Raises:
            UserError: the method or one of its settings is unknown, or PEFT refuses their values.
        """
        config_class, prefix = config_class_of(config.method), config.method.lower()
        names = {field.name for field in dataclasses.fields(config_class)}
        others = ", ".join(sorted(names - taken_fields()))
        fields = {}
        for setting, unset, places in (
            ("r", None, ("r",)),
            ("alpha", None, (f"{prefix}_alpha", "alpha")),
            ("dropout", 0, (f"{prefix}_dropout",)),
        ):
            place = next((place for place in places if place in names), None)
            value = getattr(config, setting)
            if place is not None and value != unset:
                fields[place] = value
            require(
                place is not None or value == unset,
                f"adapter.{setting}={value}: PEFT's {config.method} has none. Set adapter.{setting}="
                f"{'null' if unset is None else unset}, or one of adapter.settings: {others}.",
            )
        return self.make(config_class, config, fields)

    def make(self, config_class: type, config: Any, fields: dict[str, Any]) -> peft.PeftConfig:
        """A PEFT config of these fields, the targets and `adapter.settings`."""
        import peft

        fields = fields | {"task_type": peft.TaskType.CAUSAL_LM}
        if config.target_modules is not None:
            fields["target_modules"] = config.target_modules
        if config.layers is not None:
            fields["layers_to_transform"] = config.layers
        hints = typing.get_type_hints(config_class)
        names = {field.name for field in dataclasses.fields(config_class) if field.init}
        taken = taken_fields() | fields.keys()
        for key, value in config.settings.items():
            what = f"adapter.settings.{key}={value!r}"
            if key in taken:
                raise UserError(f"{what} is not for here: another setting holds it, or it opens files.")
            if key not in names:
                raise UserError(f"{what}: {config_class.__name__} has {', '.join(sorted(names - taken))}.")
            if not fits(value, hints[key]):
                raise UserError(f"{what}: expected {name_of(hints[key])}.")
        unknown = [key for key in fields if key not in names]
        if unknown:
            raise UserError(f"{described(config)} has no field {', '.join(unknown)}: set adapter.layers=null.")
        try:
            return config_class(**fields, **config.settings)
        except (TypeError, ValueError, NotImplementedError, ImportError) as error:
            raise UserError(f"{described(config)}: {one_line(error)}") from error

    # --- building ----------------------------------------------------------------------------------------------------

    def build(self, base: PreTrainedModel, config: Any) -> nn.Module:
        import peft

        from cera_train.cera.bypass import exclude_bypassed

        is_all = config.target_modules == "all-linear"
        if is_all and config.layers is not None:
            from cera_train.adapters.targets import linear_names

            # PEFT's LoRA takes layers with named modules only; the head is in no layer.
            layers = {name: module for name, module in base.named_modules() if re.search(r"\.\d+\.", name)}
            config = dataclasses.replace(config, target_modules=linear_names(layers.items()))
        peft_config = self.peft_config(config)
        if is_all:
            exclude_bypassed(peft_config, base)
        try:
            model = peft.get_peft_model(base, peft_config)
            # PEFT fills in fields while it builds, such as IA3's feedforward_modules: what is saved must load again.
            peft.PeftConfig.from_peft_type(**copy.deepcopy(peft_config.to_dict()))
            return model
        except (TypeError, ValueError, NotImplementedError, ImportError) as error:
            raise UserError(f"{described(config)}: {one_line(error)}") from error

    # --- what a model of PEFT's is ------------------------------------------------------------------------------------

    def made(self, model: nn.Module) -> bool:
        import peft

        return isinstance(model, peft.PeftModel)

    def keeps_base(self, model: nn.Module) -> bool:
        start = getattr(model.peft_config[ADAPTER], "init_lora_weights", None)
        return not (isinstance(start, str) and start.startswith(REPLACES_BASE))

    def why_no_spectrum(self, model: nn.Module) -> str:
        config = model.peft_config[ADAPTER]
        return f"PEFT's {config.peft_type.value}, as configured, adds no B h with hidden units h beside a projection"

    # --- saving and loading ------------------------------------------------------------------------------------------

    def wrote(self, folder: Path) -> bool:
        return (folder / "adapter_config.json").is_file()

    def description(self, folder: Path) -> dict[str, Any]:
        return read_json(folder / "adapter_config.json")

    def weights_file(self, folder: Path) -> Path:
        return weights_of(folder)

    def check_saved(self, folder: Path) -> None:
        weights_of(folder)
        settings = self.description(folder)
        kind = settings.get("peft_type")
        if kind not in ("CERA", "LORA") and kind not in (
            methods := usable_methods()
        ):  # needs PEFT, which takes seconds
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

    def load(self, model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
        import peft

        wanted = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        try:
            loaded = peft.set_peft_model_state_dict(model, weights)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"the checkpoint does not fit this adapter: {one_line(error)}") from error
        wrong = sorted(wanted.keys() ^ weights.keys())
        if wrong or loaded.unexpected_keys:
            detail = f"{len(wrong)} tensors differ, first {wrong[:1]}"
            raise UserError(f"the checkpoint does not fit this adapter: {detail}.")

    def attach(self, base: PreTrainedModel, folder: Path) -> nn.Module:
        import peft

        config = peft.PeftConfig.from_pretrained(str(folder))
        config.base_model_name_or_path = None  # PEFT puts the base's name there, and warns of any other
        return peft.get_peft_model(base, config)


def config_class_of(method: str) -> type[peft.PeftConfig]:
    """The config class of a PEFT method that the loop can train.

    Raises:
        UserError: there is no such method, or it needs more than a model's forward and backward pass.
    """
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    usable = usable_methods()
    if method.upper() not in usable:
        reason = "is no method of PEFT's"
        if method.upper() in PeftType.__members__:
            reason = "needs more than a forward and a backward pass (prompts, several adapters, calls between updates)"
        raise UserError(f"adapter.method={method} {reason}. There are: {', '.join(usable)}.")
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method.upper())]


def taken_fields() -> set[str]:
    """Fields of PEFT's configs that `adapter.settings` may not hold: other settings do, or they open files."""
    import peft

    base = {field.name for field in dataclasses.fields(peft.PeftConfig)}
    return {*base, *BEYOND_WEIGHTS, "r", "target_modules", "layers_to_transform"}


def usable_methods() -> list[str]:
    """The names of PEFT's methods that the loop can train."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    import cera_train.cera  # noqa: F401 - registers CeRA

    return sorted(kind.value for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items() if is_trainable(tuner))


def is_trainable(tuner: type) -> bool:
    """Whether a tuner only replaces modules: the loop calls the model inside it, and nothing between updates."""
    from peft.tuners.tuners_utils import BaseTuner

    return (
        issubclass(tuner, BaseTuner)
        and tuner.forward is BaseTuner.forward
        and not hasattr(tuner, "update_and_allocate")
    )


def described(config: Any) -> str:
    """The settings to look at where PEFT refuses an adapter."""
    settings = "".join(f" adapter.settings.{key}={value}" for key, value in config.settings.items())
    return f"adapter.{f'method={config.method}' if config.method else f'kind={config.kind}'}{settings}"


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def fits(value: Any, hint: Any) -> bool:
    """Whether a value from YAML is of a field's type. True for a type that YAML has no words for."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        # PEFT writes a pattern as pissa_niter_[number of iters]
        starts = tuple(argument.split("[")[0] for argument in arguments if "[" in str(argument))
        return value in arguments or (bool(starts) and isinstance(value, str) and value.startswith(starts))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    kind = origin or hint
    return not isinstance(kind, type) or kind not in (bool, str, list, dict, types.NoneType) or isinstance(value, kind)


def name_of(hint: Any) -> str:
    """A type as a reader of YAML knows it."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(map(name_of, typing.get_args(hint)))
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(map(str, typing.get_args(hint)))
    return "null" if hint is types.NoneType else getattr(hint, "__name__", str(hint))


FAMILY = Peft()
