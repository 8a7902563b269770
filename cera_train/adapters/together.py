"""Several adapters on one base at once: the base multiplies the tokens of all of them together, and each adapter adds
its branch for those of its run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cera_train.adapters.spectrum import find_branches
from cera_train.data.batches import Batch
from cera_train.model.loss import SupervisedLoss
from cera_train.settings.adapters import AdapterConfig

Model = TypeVar("Model", bound=nn.Module)


def twin(model: Model) -> Model:
    """A second model with the same weights: an adapter that goes into one is not in the other."""
    copied = copy.copy(model)
    # Submodules, parameters, buffers and hooks lie in dictionaries.
    vars(copied).update({name: copy.copy(value) for name, value in vars(model).items() if isinstance(value, dict)})
    copied._modules = {name: child and twin(child) for name, child in model._modules.items()}
    return copied


@dataclass
class JoinedAdapter:
    """The adapter of one run on the shared base."""

    layers: dict[str, nn.Module]
    """Adapted projections by their names in the base."""
    add_branch: Callable[[nn.Module, Tensor, Tensor, int], Tensor]
    random: torch.Generator = field(default_factory=torch.Generator)
    """What its dropout masks follow from."""
    seed: int = 0
    """The seed of the pass in progress: a recomputed layer drops the same again."""

    @classmethod
    def of(cls, model: nn.Module, config: AdapterConfig) -> JoinedAdapter:
        """The adapter inside a twin of the base."""
        layers = {name: branch.layer for name, branch in find_branches(model).items()}
        trained = {weight for weight in model.parameters() if weight.requires_grad}
        assert trained == {
            weight for layer in layers.values() for weight in layer.parameters() if weight.requires_grad
        }, "this adapter trains more than branches"
        return cls(layers, config.family.add_branch)

    def add(self, number: int, name: str, output: Tensor, x: Tensor) -> Tensor:
        """output + branch(x) for this arm's tokens, at module `number` of the base; may write into `output`."""
        layer = self.layers.get(name)
        if layer is None or not len(x):
            return output
        return self.add_branch(layer, output, x, self.seed + number)


class SharedProjection(nn.Module):
    """W0 x for the tokens of all arms, and each arm's branch for its tokens."""

    def __init__(self, base_layer: nn.Module, number: int, name: str, loss: SharedLoss) -> None:
        super().__init__()
        self.base_layer, self.number, self.name = base_layer, number, name
        self._loss = [loss]  # in a list, else it would be a submodule

    def forward(self, x: Tensor) -> Tensor:
        (loss,) = self._loss
        result = self.base_layer(x)
        rows = x.reshape(-1, x.shape[-1]).split(loss.tokens)
        # Not views, as those of `split`: a branch may be added in place.
        outputs = torch.unsafe_split_with_sizes(result.reshape(-1, result.shape[-1]), loss.tokens)
        added = [arm.add(self.number, self.name, *part) for arm, *part in zip(loss.arms, outputs, rows, strict=True)]
        return torch.cat(added).view_as(result)


class SharedLoss(SupervisedLoss):
    """The loss of each arm, [arms], in one pass of a base that they share.

    Args:
        base: a twin of theirs without adapter; its projections are replaced.
        arms: all that may be in a pass; `self.arms`, which the caller sets, are those in the next one.
    """

    def __init__(self, base: PreTrainedModel, arms: Sequence[JoinedAdapter], autocast: Any) -> None:
        super().__init__(base, base, autocast)
        self.arms = arms
        self.tokens: list[int] = []
        """Tokens of each arm in the pass in progress."""
        for number, (name, module) in enumerate(list(base.named_modules())):
            if any(name in arm.layers for arm in arms):
                parent, _, child = name.rpartition(".")
                setattr(base.get_submodule(parent), child, SharedProjection(module, number, name, self))

    def forward(self, batch: Batch) -> Tensor:
        self.tokens = [share.tokens for share in batch.arms]
        for arm, tokens in zip(self.arms, self.tokens, strict=True):
            if tokens:
                arm.seed = int(torch.randint(2**62, (), generator=arm.random))
        return super().forward(batch)
