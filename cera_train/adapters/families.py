"""The kinds of adapters: any method of PEFT, by its name in peft.PeftType, unless a class here says
otherwise; and the check that a kind reads every setting that is set.

Commands check settings before they load anything: nothing here imports torch. `builders` has what
needs it.
"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from cera_train.common.errors import UserError
from cera_train.common.settings import require, word_of
from cera_train.settings.adapters import Activation, AdapterConfig, AdapterKind, Mix

REPLACES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Starts of LoRA's init_lora_weights that take something out of W0."""


def replaces_base(start: Any) -> bool:
    """Whether a value of init_lora_weights takes something out of W0."""
    return isinstance(start, str) and start.lower().startswith(REPLACES_BASE)


class Family:
    """One kind of adapter; as it stands, a method of PEFT."""

    name = "PEFT"  # for tables and pictures
    # The settings that it reads, beside kind and label. Any other that is set is refused.
    uses = frozenset({"method", "r", "alpha", "dropout", "target_modules", "settings"})
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


class Cera(RankedFamily):
    """CeRA: y = W0 x + s B dropout(gate(A x)), arXiv 2602.22911."""

    name = "CeRA"
    uses = RankedFamily.uses | {"activation", "init", "dropout_on", "mix", "experts"}
    b_matrix = "cera_B"

    def check(self, config: AdapterConfig) -> None:
        super().check(config)
        require(
            not (config.experts and config.parameters),
            "adapter.experts=true adapts all of them, and adapter.settings.target_parameters some: "
            "leave out one of the two.",
        )

    def title(self, config: AdapterConfig) -> str:
        variants = self.variants(config)
        return f"{self.name} ({', '.join(variants)})" if variants else self.name

    def variants(self, config: AdapterConfig) -> list[str]:
        """How these settings differ from the paper's."""
        scale = config.settings.get("init_scale", 1)
        differs = {
            str(config.activation): config.activation != "silu",
            f"init {config.init}": config.init != "kaiming_normal",
            f"A x {scale}": scale != 1,
            "dropout on input": config.dropout_on == "input",
            "learned mix": config.mix == "learned",
        }
        return [name for name, is_other in differs.items() if is_other]

    def rate_factor(self, config: AdapterConfig) -> float:
        """silu, relu and gelu are z/2 + an even term: the branch starts at half of LoRA's scale, as
        that of the control does, by its alpha. tanh, identity and the learned mix start like z."""
        is_z = config.activation in (Activation.tanh, Activation.identity) and config.alpha != 16
        return (1 if is_z or config.mix == Mix.learned else 2) / math.sqrt(config.b_lr_ratio)


class Lora(RankedFamily):
    """LoRA: y = W0 x + s B A dropout(x), PEFT's, with s = alpha / r. PiSSA and others are settings
    of it. rsLoRA: s = alpha / sqrt(r). DoRA: the rows of W0 + s B A rescaled to a learned magnitude
    m."""

    b_matrix = "lora_B"

    def __init__(self, name: str) -> None:
        self.name = name

    def rate_factor(self, config: AdapterConfig) -> float:
        """With LoRA+, whose rates are those of A and of B, their geometric mean is LoRA's."""
        return 1 / math.sqrt(config.b_lr_ratio)


FAMILIES: dict[AdapterKind, Family] = {
    AdapterKind.cera: Cera(),
    AdapterKind.lora: Lora("LoRA"),
    AdapterKind.rslora: Lora("rsLoRA"),
    AdapterKind.dora: Lora("DoRA"),
    AdapterKind.peft: Family(),
    AdapterKind.full: Full(),
}

UNSET = {"r": None, "alpha": None, "dropout": 0, "target_modules": None, "settings": {}}
"""Values that count as unset, where the default does not."""


def family(kind: str) -> Family:
    return FAMILIES[AdapterKind(kind)]


def title(config: AdapterConfig) -> str:
    """The name of an adapter for tables and pictures."""
    return config.label or family(config.kind).title(config)


def check_settings(config: AdapterConfig) -> None:
    """Raises UserError where settings contradict each other, or the kind would ignore one."""
    kind = family(config.kind)
    for field in fields(config):
        name = field.name
        value = getattr(config, field.name)
        unset = UNSET.get(field.name, field.default)
        if name not in {*kind.uses, "kind", "label", "start_digest"} and value != unset:
            fix = "null" if unset is None else str(unset).lower()
            raise UserError(
                f"adapter.{name}={value}: adapter.kind={config.kind} does not use it. Set "
                f"adapter.{name}={fix}."
            )
    targets = config.target_modules
    adapts_experts = config.experts or config.parameters
    require(
        bool(targets)
        or (targets is None and not kind.needs_targets)
        or (targets == [] and bool(adapts_experts)),
        f"adapter.target_modules={targets!r} must be a list of module names, a regular expression "
        f"or all-linear.",
    )
    kind.check(config)


def place_of(config: AdapterConfig) -> str:
    """The settings that choose a method."""
    method = f"adapter.method={config.method}" if config.method else f"adapter.kind={config.kind}"
    settings = "".join(f" adapter.settings.{key}={value}" for key, value in config.settings.items())
    if config.target_modules not in (None, "all-linear"):
        settings += f" adapter.target_modules={word_of(config.target_modules)}"
    return method + settings
