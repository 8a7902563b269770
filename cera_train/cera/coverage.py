"""Which projections an adapter can learn beside, and proof on a first forward and backward pass
that each one does.

A module is proven when it was called, the loss has a non-zero gradient at its output, and each of
its trainable matrices has a gradient. A's alone is no proof: it is exactly zero until B has left
zero.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

EXPERT = re.compile(r"\.experts\.\d+\.")
"""In the name of a projection: that of one expert, which runs where a token is routed to it."""


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D, BaseTunerLayer))


def bypassed_projections(model: nn.Module) -> list[str]:
    """Names of the linear projections whose weights a model may read without calling them, or whose
    output is not W x. Needs neither weights nor the kernels.

    Mamba's fused kernels take the weights of x_proj, dt_proj and out_proj as arguments; a router
    returns a tuple; a grouped projection has a W for each group of x (DeepSeek-V4).
    """
    names = []
    for prefix, parent in model.named_modules():
        is_mamba = {"A_log", "D"} <= dict(parent.named_parameters(recurse=False)).keys()
        bypassed = {"x_proj", "dt_proj", "out_proj"} if is_mamba else set()
        for name, child in parent.named_children():
            is_other = any(kind in type(child).__name__ for kind in ("Router", "Grouped"))
            if is_linear(child) and (name in bypassed or is_other):
                names.append(f"{prefix}.{name}".removeprefix("."))
    return names


def projections_outside_text(model: PreTrainedModel) -> list[str]:
    """Names of the linear projections for images and sound: passes of text do not call them."""
    if model.config.get_text_config() is model.config:
        return []
    for_text = {*model.get_decoder().modules(), model.get_output_embeddings()}
    return [
        name
        for name, module in model.named_modules()
        if is_linear(module) and module not in for_text
    ]


def idle_projections(model: PreTrainedModel) -> list[str]:
    """Names of the linear projections beside which a branch would not learn: a pass of the base in
    training does not call them, or no gradient reaches their output. Needs the weights."""

    def require_gradient(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        # In a frozen base nothing else does. A clone, since some models scale it in place.
        return output.detach().requires_grad_().clone()

    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    coverage = Coverage(linears, {})
    ids = torch.ones(1, 8, dtype=torch.long, device=model.device)
    with ExitStack() as stack:
        stack.enter_context(coverage.watch())
        stack.callback(model.train, model.training)
        stack.enter_context(torch.random.fork_rng())  # dropout of the base
        stack.callback(model.get_input_embeddings().register_forward_hook(require_gradient).remove)
        model.train()(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
        ).logits.sum().backward()
    # Experts that are modules run where a token is routed to them.
    return [
        name for name in linears if name not in coverage.has_gradient and not EXPERT.search(name)
    ]


def exclude_projections(config: PeftConfig, names: list[str]) -> None:
    """Adds projections to the `exclude_modules` of a config."""
    if not (names and hasattr(config, "exclude_modules")):
        return
    excluded = config.exclude_modules or []
    if isinstance(excluded, str):
        expressions = (rf"(.*\.)?{re.escape(name)}" for name in names)
        config.exclude_modules = "|".join([excluded, *expressions])
    else:
        config.exclude_modules = sorted({*excluded, *names})


@contextmanager
def check_coverage(model: nn.Module) -> Iterator[Coverage]:
    """Watches the passes inside it, in all processes of a job, and refuses adapters that did not
    run or do not learn.

        with check_coverage(model):
            model(**batch).loss.backward()

    Raises:
        ValueError: the message names the modules and the likely reason.
    """
    coverage = Coverage.of_adapters(model)
    with coverage.watch():
        yield coverage
    if (problem := coverage.problem()) is not None:
        raise ValueError(problem)


class Coverage:
    """What layers did while they were watched.

    Args:
        layers: by name, those to watch.
        weights: by name, those that should learn.
    """

    def __init__(self, layers: dict[str, nn.Module], weights: dict[str, nn.Parameter]) -> None:
        self.layers = layers
        self.weights = weights
        self.called: set[str] = set()
        self.moves_loss: set[str] = set()
        """Layers whose output has a gradient that is not zero."""
        self.has_gradient: set[str] = set()
        """Weights, and layers at their output, that have a gradient, though it may be zero."""

    @classmethod
    def of_adapters(cls, model: nn.Module) -> Coverage:
        """What to watch of a model with trainable adapters, of any PEFT method that puts layers
        beside projections."""
        layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, BaseTunerLayer)
            and any(weight.requires_grad for weight in module.parameters())
        }
        weights = {
            name: weight for name, weight in model.named_parameters() if weight.requires_grad
        }
        return cls(layers, weights)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Records calls and the gradients of outputs and weights, gathered over all processes."""
        with ExitStack() as hooks:
            for name, layer in self.layers.items():
                hooks.callback(layer.register_forward_hook(self._watch_output(name)).remove)
            for name, weight in self.weights.items():
                hooks.callback(
                    weight.register_hook(lambda _, name=name: self.has_gradient.add(name)).remove
                )
            yield
        # The hook of a sharded weight is on a tensor that takes no part in the pass.
        self.has_gradient |= {
            name for name, weight in self.weights.items() if weight.grad is not None
        }
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            seen = [()] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(
                seen, (self.called, self.moves_loss, self.has_gradient)
            )
            self.called, self.moves_loss, self.has_gradient = (
                set().union(*sets) for sets in zip(*seen, strict=True)
            )

    def _watch_output(self, name: str) -> Callable[..., None]:
        def look(gradient: torch.Tensor) -> None:
            self.has_gradient.add(name)
            if gradient.any():
                self.moves_loss.add(name)

        def count(layer: nn.Module, args: Any, output: Any) -> None:
            self.called.add(name)
            output = output[0] if isinstance(output, tuple) else output
            if output.requires_grad:
                output.register_hook(look)

        return count

    def problem(self) -> str | None:
        """The adapted modules that were not proven and the reason, in one line; None where all
        were."""
        if not self.layers:
            return (
                "this model has no trainable adapter: build one, or load it with is_trainable=True."
            )
        names = defaultdict(list)
        for name in self.layers:
            if (reason := self._reason(name)) is not None:
                names[reason].append(name)
        if not names:
            return None
        parts = [f"{_first(modules)}: {reason}" for reason, modules in names.items()]
        count = sum(map(len, names.values()))
        return f"{count} of {len(self.layers)} adapted modules would not train. {'; '.join(parts)}."

    def _reason(self, name: str) -> str | None:
        """Why a module was not proven; None where it was, or belongs to an expert that got no
        token."""
        if name not in self.called:
            siblings = re.compile(re.escape(EXPERT.sub("<>", name)).replace("<>", EXPERT.pattern))
            return None if any(map(siblings.fullmatch, self.called)) else "the model never calls it"
        if name not in self.moves_loss:
            return "called, but the loss has no gradient, or one of exactly zero, at its output"
        without = [
            weight.removeprefix(f"{name}.")
            for weight in self.weights
            if weight.startswith(f"{name}.") and weight not in self.has_gradient
        ]
        return f"no gradient reaches {', '.join(without)}" if without else None


def _first(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(name.removeprefix("base_model.model.") for name in names[:3]) + more
