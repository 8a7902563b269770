"""The modules that an adapter goes to, checked on the model before anything is built."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cera_train.cera.experts import expert_names, expert_parameters
from cera_train.common.errors import UserError
from cera_train.settings.adapters import AdapterConfig


def check_targets(model: PreTrainedModel, config: AdapterConfig) -> None:
    """Raises UserError for a target that the model does not have. PEFT complains only where nothing
    matches: one mistyped name of two would be ignored."""
    if config.experts and not expert_names(model):
        raise UserError(
            "adapter.experts=true: this model has no experts. Set adapter.experts=false."
        )
    targets = [] if config.target_modules in (None, "all-linear") else config.target_modules
    if isinstance(targets, str):
        expressions = {targets: targets}
    else:
        expressions = {target: rf"(.*\.)?{re.escape(target)}" for target in targets}
    for target, expression in expressions.items():
        if not any(re.fullmatch(expression, name) for name, _ in model.named_modules()):
            raise UserError(
                f"adapter.target_modules: {target!r} matches no module of this model. "
                f"Its linear projections are {', '.join(linear_names(model.named_modules()))}."
            )
    layers = model.config.get_text_config().num_hidden_layers
    outside = [layer for layer in config.layers or [] if not 0 <= layer < layers]
    if outside:
        raise UserError(
            f"adapter.layers: {outside} is outside this model's layers 0 to {layers - 1}."
        )


def describe_targets(model: nn.Module) -> str | None:
    """How many projections have an adapter, of all with the same names: `q_proj v_proj: 60 of 60`.
    None for a model without adapter layers."""
    total = Counter()
    adapted = Counter()
    for kind, module in _projections(model):
        total[kind] += 1
        if isinstance(module, BaseTunerLayer):
            adapted[kind] += 1
    whole = [kind for kind in adapted if adapted[kind] == total[kind]]
    groups = [[kind] for kind in adapted if kind not in whole]
    if whole:
        groups.insert(0, whole)

    parts = []
    for group in groups:
        adapted_count = sum(adapted[kind] for kind in group)
        total_count = sum(total[kind] for kind in group)
        parts.append(f"{' '.join(group)}: {adapted_count} of {total_count}")
    return "; ".join(parts) or None


def describe_left_out(model: nn.Module) -> str | None:
    """The projections and experts without an adapter, except for the head; None where there are
    none."""
    head = model.get_output_embeddings()
    names = [
        kind
        for kind, module in _projections(model)
        if not isinstance(module, BaseTunerLayer) and module is not head
    ]
    kinds = ", ".join(dict.fromkeys(names))
    return f"all-linear leaves out {len(names)} modules: {kinds}" if names else None


def linear_names(named_modules: Iterable[tuple[str, nn.Module]]) -> list[str]:
    """The last part of the names of the linear projections, each once, in their order."""
    names = (name for name, module in named_modules if isinstance(module, (nn.Linear, Conv1D)))
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))


def _projections(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Adapted layers, and the projections and modules of experts without an adapter, with the last
    part of their names."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, f"{name}.")
        if isinstance(module, (BaseTunerLayer, nn.Linear, Conv1D)) or expert_parameters(module):
            yield name.rpartition(".")[2], module
