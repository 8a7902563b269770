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
    """Raises UserError for a target that the model does not have. PEFT complains only where nothing at all matches: one
    mistyped name of two would be ignored."""
    modules = [name for name, _ in model.named_modules() if name]
    experts = [f"{key}.{name}" for key, name in all_experts(model)]
    if config.experts and not experts:
        raise UserError("adapter.experts=True: this model has no experts, it is dense. Set adapter.experts=false.")
    for target in config.target_parameters or []:
        if not any(_is_target(name, [target]) for name in experts):
            raise UserError(
                f"adapter.target_parameters: {target!r} is no expert's projection in this model. There are: "
                f"{', '.join(expert_names(model)) or 'none, it is dense'}."
            )
    targets = config.target_modules
    if targets is not None and targets != "all-linear":
        if isinstance(targets, str):
            unmatched = [targets] * (not any(_is_target(name, targets) for name in modules))
        else:
            unmatched = [target for target in targets if not any(_is_target(name, [target]) for name in modules)]
        if unmatched:
            raise UserError(
                f"adapter.target_modules: {', '.join(map(repr, unmatched))} matches no module of this model. "
                f"Its linear projections are {', '.join(linear_names(model.named_modules()))}."
            )
    layers = model.config.get_text_config().num_hidden_layers
    outside = [layer for layer in config.layers or [] if not 0 <= layer < layers]
    if outside:
        raise UserError(f"adapter.layers: {outside} is outside this model's layers 0 to {layers - 1}.")


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
