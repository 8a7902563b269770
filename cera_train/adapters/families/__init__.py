"""The kinds of adapters, and the check that a kind reads every setting that is set. Imports no
torch."""

from dataclasses import fields

from cera_train.adapters.families.base import Family, Full
from cera_train.adapters.families.cera import Cera
from cera_train.adapters.families.lora import Lora
from cera_train.common.errors import UserError
from cera_train.common.settings import require
from cera_train.settings.adapters import AdapterConfig, AdapterKind

FAMILIES: dict[AdapterKind, Family] = {
    AdapterKind.cera: Cera(),
    AdapterKind.lora: Lora("LoRA"),
    AdapterKind.rslora: Lora("rsLoRA", use_rslora=True),
    AdapterKind.dora: Lora("DoRA", use_dora=True),
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
    adapts_experts = config.experts or config.target_parameters
    require(
        bool(targets)
        or (targets is None and not kind.needs_targets)
        or (targets == [] and bool(adapts_experts)),
        f"adapter.target_modules={targets!r} must be a list of module names, a regular expression "
        f"or all-linear.",
    )
    kind.check(config)
