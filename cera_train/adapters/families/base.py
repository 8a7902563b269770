"""A kind of adapter: any method of PEFT, by its name in peft.PeftType, unless a subclass says
otherwise. CeRA and LoRA give PEFT a config of their own; full fine-tuning has none.

Commands check settings before they load anything: the files of this folder import torch and peft
inside functions.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from cera_train.common.errors import UserError
from cera_train.common.settings import require, word_of
from cera_train.common.terminal import announce_import
from cera_train.common.trust import BEYOND_WEIGHTS
from cera_train.settings.adapters import AdapterConfig

if TYPE_CHECKING:
    import peft
    import torch
    from torch import nn
    from transformers import PreTrainedModel

ADAPTER = "default"  # the name under which PEFT keeps the adapter

REPLACES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Starts of LoRA's init_lora_weights that take something out of W0."""

UNUSABLE_SETTINGS = {
    "arrow_config": "it mixes adapters that are already trained",
    "loftq_config": "PEFT computes LoftQ on CUDA alone, where it is not tested",
    "apply_GS": "HRA starts from equal pairs, whose difference Gram-Schmidt would divide by",
    "use_asa": "ranks change between updates, by scores that no checkpoint keeps",
    "monteclora_config": "it draws from a buffer that no checkpoint keeps, and needs its own loss",
    "save_only_topk_weights": "what is saved is too little to resume from",
}
"""Settings of PEFT's methods that the loop cannot train, and why."""

NOT_FROM_BASE = ("eva", "corda", "lora_ga", "pissa_niter")
"""Starts of LoRA's init_lora_weights that W0 alone does not give again."""


def replaces_base(start: Any) -> bool:
    """Whether a value of init_lora_weights takes something out of W0."""
    return isinstance(start, str) and start.lower().startswith(REPLACES_BASE)


@dataclasses.dataclass
class Branch:
    """s B gate(A x) beside one projection: r hidden units, whose spectrum can be taken."""

    layer: nn.Module
    A: nn.Module
    """Has the weight, [r, d_in]."""
    B: Callable[[], torch.Tensor]
    """-> [d_out, r]. Called inside the model's forward, where sharded weights are whole."""
    scaling: float
    r: int
    out_features: int
    gate: nn.Module | None = None  # None for the identity


class Family:
    """One kind of adapter; as it stands, a method of PEFT."""

    name = "PEFT"  # for tables and pictures
    # The settings that it reads, beside kind and label. Any other that is set is refused.
    uses = frozenset({"method", "r", "alpha", "dropout", "target_modules", "layers", "settings"})
    needs_targets = False  # whether target_modules must be given
    trains_base = False  # whether the base's weights are trained
    b_matrix: str | None = None  # the module that holds B, for `adapter.b_lr_ratio`

    def title(self, config: AdapterConfig) -> str:
        return (config.method or self.name).rpartition(".")[2]

    def check(self, config: AdapterConfig) -> None:
        """Raises UserError where settings contradict each other. Imports no torch."""
        require(
            "method" not in self.uses or config.method is not None,
            "adapter.method=null: name a method of PEFT, such as adapter.method=MISS.",
        )

    def rate_factor(self, config: AdapterConfig) -> float | None:
        """The best learning rate over LoRA's, for `optimizer.lr=auto`. None: unknown."""
        is_full_rank = (config.method or "").upper() == "LN_TUNING"  # adapter=dense
        return 0.1 if is_full_rank else None

    def peft_config(self, config: AdapterConfig) -> peft.PeftConfig | None:
        """The PEFT config; None without an adapter. r, alpha and dropout go to the fields of these
        names, MISS's to miss_alpha and miss_dropout; null and 0 leave PEFT's defaults. Raises
        UserError for what PEFT refuses."""
        announce_import("PyTorch and PEFT")
        from cera_train.adapters.methods import config_class_of

        config_class = config_class_of(config.method)
        names = {field.name for field in dataclasses.fields(config_class)}
        fields = {}
        for setting, unset in (("r", None), ("alpha", None), ("dropout", 0)):
            if (value := getattr(config, setting)) != unset:
                long_name = f"{config.method.lower()}_{setting}"
                name = long_name if long_name in names else setting
                require(
                    name in names,
                    f"adapter.{setting}={value}: adapter.method={config.method} has no {setting}. "
                    f"Set adapter.{setting}={'null' if unset is None else unset}.",
                )
                fields[name] = value
        return self.make(config_class, config, fields)

    def make(
        self, config_class: type, config: AdapterConfig, fields: dict[str, Any]
    ) -> peft.PeftConfig:
        """A PEFT config of these fields, the targets and `adapter.settings`."""
        import peft

        fields = fields | {"task_type": peft.TaskType.CAUSAL_LM}
        if config.target_modules is not None:
            fields["target_modules"] = config.target_modules
        # PEFT does not take both: see `build`.
        if config.layers is not None and config.target_modules != "all-linear":
            fields["layers_to_transform"] = config.layers
        start = config.settings.get("init_lora_weights")
        require(
            not (isinstance(start, str) and start.startswith(NOT_FROM_BASE)),
            f"adapter.settings.init_lora_weights={start} starts from data or random numbers, which "
            "cera-train 0.2.0 was the last to do: choose pissa or olora, which start from W0.",
        )
        for key, reason in UNUSABLE_SETTINGS.items():
            is_set = config.settings.get(key) not in (None, False)
            require(not is_set, f"adapter.settings.{key}: {reason}. Leave it out.")
        for key in config.settings.keys() & {*BEYOND_WEIGHTS}:
            raise UserError(
                f"adapter.settings.{key} can import or open files: no run sets it. Leave it out."
            )
        with peft_errors(config):
            return config_class(**fields, **config.settings)

    def build(
        self,
        base: PreTrainedModel,
        config: AdapterConfig,
        left_out: list[str],
    ) -> nn.Module:
        """The base with a fresh adapter. Its trainable parameters require gradients, no others do.

        Args:
            left_out: names of projections that all-linear does not take.
        """
        import peft

        from cera_train.adapters.targets import linear_names
        from cera_train.cera.coverage import exclude_projections

        if config.target_modules == "all-linear":
            peft_config = as_peft_takes(self.peft_config(config), base)
            taken = peft_config.target_modules
            # VeRA has no exclude_modules
            excluded = [] if hasattr(peft_config, "exclude_modules") else left_out
            names = linear_names(
                (name, module)
                for name, module in base.named_modules()
                if re.search(r"\.\d+\.", name) and name not in excluded
            )
            is_mixture = taken != "all-linear"
            if is_mixture:
                names = [name for name in names if name in taken]
            if is_mixture or excluded or config.layers is not None:
                config = dataclasses.replace(config, target_modules=names)
        peft_config = self.peft_config(config)
        exclude_projections(peft_config, left_out, base)
        with peft_errors(config):
            experts = ", ".join(taken_for_experts(peft_config, base))
            require(
                not experts,
                f"adapter.target_modules: PEFT takes a name among these for experts ({experts}) of "
                "this model: leave it out, or choose adapter=cera.",
            )
            model = peft.get_peft_model(base, peft_config)
            # PEFT fills in fields while it builds, such as IA3's feedforward_modules. Checks that
            # the config loads again once it is saved.
            peft.PeftConfig.from_peft_type(**copy.deepcopy(peft_config.to_dict()))
            return model

    def branch(self, module: nn.Module) -> Branch | None:
        """The branch of this module; None for a module of another kind."""
        return None


class RankedFamily(Family):
    """A method with A and B of a rank, which has a kind of its own."""

    uses = Family.uses - {"method"} | {"b_lr_ratio", "start_from"}
    needs_targets = True

    def check(self, config: AdapterConfig) -> None:
        require(
            config.r is not None,
            f"adapter.r=null: adapter.kind={config.kind} needs a rank, such as adapter.r=64.",
        )
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = config.settings.get(name) or {}
            is_pattern = isinstance(pattern, dict) and all(
                isinstance(each, int | float) for each in pattern.values()
            )
            require(
                is_pattern,
                f"adapter.settings.{name}={pattern}: expected numbers by name, such as "
                "{q_proj: 8}.",
            )
        start = config.settings.get("init_lora_weights")
        require(
            config.start_from is None or not replaces_base(start),
            f"adapter.start_from={config.start_from}: adapter.settings.init_lora_weights={start} "
            "moves a part of W0 into fresh weights. Leave one of the two out.",
        )


class Full(Family):
    """Full fine-tuning: every weight of the base, in float32, and no adapter."""

    name = "full fine-tuning"
    uses = frozenset()
    trains_base = True

    def rate_factor(self, config: AdapterConfig) -> float:
        return 0.1

    def peft_config(self, config: AdapterConfig) -> None:
        return None

    def build(self, base: PreTrainedModel, config: AdapterConfig, left_out: list[str]) -> nn.Module:
        # 16-bit weights would round most updates away; the loop computes in 16 bits by autocast.
        return base.float().requires_grad_(True)


def as_peft_takes(config: peft.PeftConfig, base: PreTrainedModel) -> peft.PeftConfig:
    """A copy of a config with the targets that PEFT would take. A LoRA of a mixture may be of a
    transformers in which experts were modules: PEFT takes names such as down_proj for theirs, which
    are parameters now, and has no names for dense or shared projections that are called so."""
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = copy.deepcopy(config)
    convert_peft_config_for_transformers(config, base, None)
    return config


def taken_for_experts(config: peft.PeftConfig, base: PreTrainedModel) -> list[str]:
    """Parameters of experts that PEFT would adapt, and that target_parameters do not name."""
    named = {*(getattr(config, "target_parameters", None) or ())}
    taken = {*(getattr(as_peft_takes(config, base), "target_parameters", None) or ())}
    return sorted(taken - named)


@contextlib.contextmanager
def peft_errors(config: AdapterConfig) -> Iterator[None]:
    """Turns an error of PEFT, or its warning that a setting matches nothing, into a UserError with
    the settings to look at."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "error",
                "The following .*_pattern keys|You have passed exclude_modules|.* tied layer",
            )
            yield
    except UserError:
        raise
    except (TypeError, ValueError, NotImplementedError, ImportError, re.error, Warning) as error:
        reason = " ".join(str(error).split())
        if "tied layer" in reason:
            reason = (
                "lm_head and embed_tokens are one weight here: leave them out, or for LoRA set "
                "++adapter.settings.ensure_weight_tying=true."
            )
        raise UserError(f"{place_of(config)}: {reason}") from error


def place_of(config: AdapterConfig) -> str:
    """The settings that choose a method."""
    method = f"adapter.method={config.method}" if config.method else f"adapter.kind={config.kind}"
    settings = "".join(f" adapter.settings.{key}={value}" for key, value in config.settings.items())
    if config.target_modules not in (None, "all-linear"):
        settings += f" adapter.target_modules={word_of(config.target_modules)}"
    return method + settings


def is_import_path(method: str | None) -> bool:
    """Whether `adapter.method` names code from outside PEFT, which a command imports."""
    return "." in (method or "")
