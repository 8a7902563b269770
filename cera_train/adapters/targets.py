"""The modules that an adapter goes to, checked on the model before anything is built."""

import re
from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cera_train.cera.experts import expert_names
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


def linear_names(named_modules: Iterable[tuple[str, nn.Module]]) -> list[str]:
    """The last part of the names of the linear projections, each once, in their order."""
    names = (name for name, module in named_modules if isinstance(module, (nn.Linear, Conv1D)))
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
