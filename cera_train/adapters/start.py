"""`adapter.start_from`: whether another adapter's weights compute under these settings what they computed under
theirs. Needs no weights and no torch, so that a mistake is answered before anything is loaded."""

from __future__ import annotations

from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from cera_train.adapters.families.peft import replaces_base
from cera_train.adapters.family import family, family_that_wrote
from cera_train.common.errors import UserError
from cera_train.settings.adapters import AdapterConfig, AdapterKind


def check_start(config: AdapterConfig, folder: Path, recorded: AdapterConfig | None) -> None:
    """Raises UserError where the adapter in a folder has another kind, shape, gate or other targets than `config`.

    Args:
        recorded: the settings of the run that the adapter is of. None: those in its adapter_config.json.
    """
    place = f"adapter.start_from={config.start_from}"
    description = family_that_wrote(folder).description(folder) if recorded is None else {}
    start = description.get("init_lora_weights") if recorded is None else recorded.settings.get("init_lora_weights")
    if replaces_base(start):
        raise UserError(
            f"{place}: {start} moved a part of W0 into these weights, and they belong to what was left of it. Start "
            "from an adapter with another init."
        )
    wanted, theirs = fitting(config), described(description) if recorded is None else fitting(recorded)
    different = [key for key in wanted if wanted[key] != theirs.get(key)]
    if "kind" in different:  # the rest follows from it
        different = ["kind"]
    if different:
        values = "; ".join(f"adapter.{key} is {theirs[key]!r} there, {wanted[key]!r} here" for key in different)
        raise UserError(f"{place}: {values}. Set what is here to what is there, or start from another adapter.")


def fitting(config: AdapterConfig) -> dict[str, Any]:
    """The settings that decide which tensors an adapter has and what they compute; dropout and draws do not."""
    names = [field.name for field in fields(config) if field.metadata["binds_checkpoint"] and field.name not in FREE]
    values = {name: getattr(config, name) for name in names}
    values |= {f"settings.{name}": config.settings.get(name) or None for name in IN_SETTINGS}
    if config.alpha is None:
        values["alpha"] = family(config.kind).default_alpha(config.r)
    return {name: _plain(value) for name, value in values.items()}


FREE = ("dropout", "dropout_on", "init", "method", "settings")
IN_SETTINGS = ("rank_pattern", "alpha_pattern", "use_rslora")


def described(description: dict[str, Any]) -> dict[str, Any]:
    """The same settings of an adapter without a run, from its adapter_config.json."""
    kind = kind_of(description)
    if kind not in list(AdapterKind) or "start_from" not in family(kind).uses:
        return {"kind": kind}
    unset = fitting(AdapterConfig(kind, dropout=0))
    layers = description.get("layers_to_transform")
    values = unset | {key: _plain(description[key]) for key in unset if key in description}
    values |= {f"settings.{name}": description.get(name) or None for name in IN_SETTINGS}
    if kind != "cera":  # of PEFT's LoRA, use_rslora is a kind
        values["settings.use_rslora"] = None
    values["layers"] = [layers] if isinstance(layers, int) else layers
    return values | {"alpha": description.get(family(kind).alpha_field)}


def kind_of(description: dict[str, Any]) -> str:
    """`adapter.kind` by an adapter_config.json; PEFT's name of the method where no kind is named so."""
    method = str(description.get("peft_type") or description.get("kind")).lower()
    variants = ("dora", "rslora") if method == "lora" else ()
    return next((kind for kind in variants if description.get(f"use_{kind}")), method)


def _plain(value: Any) -> Any:
    """Text of an enum; names in order, since PEFT keeps a set."""
    return str(value) if isinstance(value, StrEnum) else sorted(value) if isinstance(value, list) else value
