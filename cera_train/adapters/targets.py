"""The modules that an adapter goes to, checked on the model before anything is built."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import match_target_against_key
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cera_train.cera.experts import all_experts, expert_parameters
from cera_train.common.errors import UserError
from cera_train.settings.adapters import AdapterConfig


def check_targets(model: PreTrainedModel, config: AdapterConfig) -> None:
    """Raises UserError where the targets or the rank do not fit the model."""
    _check_experts(model, config)
    if config.target_modules is None:
        return
    _check_names(model, config)
    _check_layers(model, config)
    _check_tied_head(model, config)
    _check_width("r", config.r, {name: _widths(module) for name, module in _targeted(model, config).items()})


def describe_targets(model: nn.Module) -> str | None:
    """How many projections were adapted of all that have the names of adapted ones: `q_proj v_proj: 60 of 60 layers`.
    None for a model without adapter layers."""
    total, adapted = Counter(), Counter()
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, f"{name}.")
            adapted[name.rpartition(".")[2]] += 1
        if isinstance(module, (BaseTunerLayer, nn.Linear, Conv1D)) or expert_parameters(module):
            total[name.rpartition(".")[2]] += 1
    whole = [kind for kind in adapted if adapted[kind] == total[kind]]
    groups = [whole] * bool(whole) + [[kind] for kind in adapted if kind not in whole]
    parts = [
        f"{' '.join(group)}: {sum(adapted[kind] for kind in group)} of {sum(total[kind] for kind in group)} layers"
        for group in groups
    ]
    return "; ".join(parts) or None


def describe_left_out(model: nn.Module) -> str | None:
    """The projections, but for the head, that got no adapter; None where there are none."""
    head, inside, names = model.get_output_embeddings(), (), []
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, f"{name}.")
        elif isinstance(module, (nn.Linear, Conv1D)) and module is not head and not name.startswith(inside):
            names.append(name.rpartition(".")[2])
    kinds = ", ".join(dict.fromkeys(names))
    return f"without {len(names)} projections that the model or its kernels bypass: {kinds}" if names else None


def linear_names(named_modules: Iterable[tuple[str, nn.Module]]) -> list[str]:
    """The last part of the names of the linear projections, each once, in their order."""
    names = (name for name, module in named_modules if isinstance(module, (nn.Linear, Conv1D)))
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))


def expert_names(model: PreTrainedModel) -> list[str]:
    """The last two parts of the names of the experts' projections, each once."""
    return list(dict.fromkeys(f"{key.rpartition('.')[2]}.{name}" for key, name in all_experts(model)))


def layers_without_adapted_experts(model: nn.Module) -> int:
    """Number of modules of experts that no adapter wraps."""
    modules = model.named_modules()
    return sum(bool(expert_parameters(module)) and not name.endswith(".base_layer") for name, module in modules)


def _is_target(name: str, targets: list[str] | str) -> bool:
    if isinstance(targets, str):
        return bool(match_target_against_key(targets, name))
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _check_names(model: PreTrainedModel, config: AdapterConfig) -> None:
    """PEFT complains only when nothing at all matches; one mistyped name of two would be ignored."""
    if config.target_modules == "all-linear":
        return
    names = [name for name, _ in model.named_modules() if name]
    is_list = isinstance(config.target_modules, list)
    wanted = [[target] for target in config.target_modules] if is_list else [config.target_modules]
    unmatched = [target for target in wanted if not any(_is_target(name, target) for name in names)]
    if unmatched:
        shown = ", ".join(repr(target[0] if isinstance(target, list) else target) for target in unmatched)
        raise UserError(
            f"adapter.target_modules: {shown} matches no module of this model. "
            f"Its linear projections are {', '.join(linear_names(model.named_modules()))}."
        )


def _check_experts(model: PreTrainedModel, config: AdapterConfig) -> None:
    names = [f"{key}.{name}" for key, name in all_experts(model)]
    if config.experts and not names:
        raise UserError("adapter.experts=True: this model has no experts, it is dense. Set adapter.experts=false.")
    for target in config.target_parameters or []:
        if not any(_is_target(name, [target]) for name in names):
            there = f"Its experts' are {', '.join(expert_names(model))}." if names else "It has none, it is dense."
            raise UserError(f"adapter.target_parameters: {target!r} is no expert's projection in this model. {there}")
    targeted = expert_names(model) if config.experts else config.target_parameters or []
    rank, widths = config.expert_r or config.r, {}
    for key, name in all_experts(model):
        if _is_target(f"{key}.{name}", targeted):
            widths[f"{key}.{name}"] = tuple(getattr(model.get_submodule(key), name).shape[1:])
    _check_width("r" if config.expert_r is None else "expert_r", rank, widths)


def _check_layers(model: PreTrainedModel, config: AdapterConfig) -> None:
    layers = model.config.get_text_config().num_hidden_layers
    outside = [layer for layer in config.layers or [] if not 0 <= layer < layers]
    if outside:
        raise UserError(f"adapter.layers: {outside} is outside this model's layers 0 to {layers - 1}.")


def _targeted(model: PreTrainedModel, config: AdapterConfig) -> dict[str, nn.Module]:
    """The targeted projections, whatever their layer."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    if config.target_modules == "all-linear":  # of which PEFT leaves out the head
        return {name: module for name, module in modules.items() if module is not model.get_output_embeddings()}
    return {name: module for name, module in modules.items() if _is_target(name, config.target_modules)}


def _check_tied_head(model: PreTrainedModel, config: AdapterConfig) -> None:
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or getattr(head, "weight", None) is not embeddings.weight:
        return
    for name, module in model.named_modules():
        is_target = config.target_modules != "all-linear" and _is_target(name, config.target_modules)
        if module in (head, embeddings) and is_target:
            raise UserError(
                f"adapter.target_modules={config.target_modules}: head and embeddings of this model share weights, "
                f"and an adapter on {name} would untie them. Leave it out."
            )


def _check_width(setting: str, rank: int | None, widths: dict[str, tuple[int, int]]) -> None:
    """Refuses a rank above d_in or d_out of every target: B h spans at most d_out directions, A x at most d_in."""
    if rank is None or not widths or any(rank <= min(sides) for sides in widths.values()):
        return
    name, (d_in, d_out) = max(widths.items(), key=lambda item: min(item[1]))
    raise UserError(
        f"adapter.{setting}={rank} is more than the width of every targeted projection: {name}, the widest, maps "
        f"{d_in} to {d_out}. Use adapter.{setting}={min(d_in, d_out)} or less."
    )


def _widths(module: nn.Module) -> tuple[int, int]:
    """(d_in, d_out)"""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    return module.in_features, module.out_features
