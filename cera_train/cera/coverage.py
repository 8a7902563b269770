"""Which projections an adapter can learn beside, and proof on a first forward and backward pass that each one does.

A module is proven when it was called, the loss has a non-zero gradient at its output, and each of its trainable
matrices has a gradient. A's alone is no proof: it is exactly zero until B has left zero.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.trainer_callback import TrainerCallback

EXPERT = re.compile(r"\.experts\.\d+\.")
"""In the name of a projection: that of one expert, which runs where a token is routed to it."""


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D, BaseTunerLayer))


def bypassed_projections(model: nn.Module) -> list[str]:
    """Names of the linear projections that models are known to use without calling them for one tensor, whether or not
    the kernels are installed here. Needs no weights.

    Mamba's fused kernels take the weights of x_proj, dt_proj and out_proj as arguments; a router returns a tuple.
    """
    names = []
    for prefix, parent in model.named_modules():
        taken = ("x_proj", "dt_proj", "out_proj") if {"A_log", "D"} <= parent._parameters.keys() else ()
        for name, child in parent.named_children():
            if is_linear(child) and (name in taken or "Router" in type(child).__name__):
                names.append(f"{prefix}.{name}".removeprefix("."))
    return names


def idle_projections(model: PreTrainedModel) -> list[str]:
    """Names of the linear projections beside which a branch would not learn: a pass of the base in training does not
    call them, or no gradient reaches their output. Needs the weights."""
    outputs: dict[str, list[torch.Tensor]] = {name: [] for name, module in model.named_modules() if is_linear(module)}

    def keep_output(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            outputs[name] += [output] * (isinstance(output, torch.Tensor) and output.requires_grad)

        return keep

    def require_gradient(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        output.requires_grad_(True)  # of a frozen base nothing else does

    modes = {module: module.training for module in model.modules()}
    ids = torch.ones(1, 8, dtype=torch.long, device=model.device)
    with ExitStack() as stack:
        for name in outputs:
            stack.callback(model.get_submodule(name).register_forward_hook(keep_output(name)).remove)
        for module, is_training in modes.items():
            stack.callback(setattr, module, "training", is_training)
        stack.enter_context(torch.random.fork_rng())  # dropout of the base
        stack.callback(model.get_input_embeddings().register_forward_hook(require_gradient).remove)
        logits = model.train()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    calls = [(name, output) for name, called in outputs.items() for output in called]
    gradients = torch.autograd.grad(logits.sum(), [output for _, output in calls], allow_unused=True)
    trained = {name for (name, _), gradient in zip(calls, gradients, strict=True) if gradient is not None}
    # Experts that are modules run where a token is routed to them.
    return [name for name in outputs if name not in trained and not EXPERT.search(name)]


def exclude_projections(config: PeftConfig, names: list[str], model: nn.Module) -> None:
    """Adds projections to the `exclude_modules` of a config: by their last name where all of that name are excluded."""
    if not (names and hasattr(config, "exclude_modules")):
        return
    kept = {
        name.rpartition(".")[2] for name, module in model.named_modules() if is_linear(module) and name not in names
    }
    short = {last if (last := name.rpartition(".")[2]) not in kept else name for name in names}
    excluded = config.exclude_modules or []
    if isinstance(excluded, str):
        config.exclude_modules = "|".join([excluded, *(rf"(.*\.)?{re.escape(name)}" for name in sorted(short))])
    else:
        config.exclude_modules = sorted({*excluded, *short})


@contextmanager
def check_coverage(model: nn.Module) -> Iterator[Coverage]:
    """Watches the passes inside it, and refuses adapters that did not run or do not learn.

        with check_coverage(model):
            model(**batch).loss.backward()

    Raises:
        ValueError: the message names the modules and the likely reason.
    """
    coverage = Coverage(model)
    with coverage.watch():
        yield coverage
    if (problem := coverage.problem()) is not None:
        raise ValueError(problem)


class CoverageCallback(TrainerCallback):
    """`check_coverage` around the first update of transformers' Trainer, and so of TRL's trainers."""

    def on_train_begin(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.coverage = Coverage(model)
        self.watching: ExitStack | None = ExitStack()
        self.watching.enter_context(self.coverage.watch())

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.watching is None:
            return
        self.watching.close()
        self.watching = None  # the first update alone
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self.coverage.sum(_sum_over_processes)
        if (problem := self.coverage.problem()) is not None:
            raise ValueError(problem)


class Coverage:
    """What the adapted modules of a model did while they were watched.

    Args:
        model: a model with trainable adapters, of any PEFT method that puts layers beside projections.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers: dict[str, nn.Module] = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, BaseTunerLayer) and any(weight.requires_grad for weight in module.parameters())
        }
        self.weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        device = next(iter(self.weights.values())).device if self.weights else "cpu"
        self.called, self.moves_loss = (torch.zeros(len(self.layers), device=device) for _ in range(2))
        self.has_gradient = torch.zeros(len(self.weights), device=device)
        self.idle_in_layers = 0
        """Experts without a token in layers that hold all of theirs, [E, ...] in one parameter."""

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Counts calls, and looks at the gradients of outputs and weights."""
        with ExitStack() as hooks:
            for number, layer in enumerate(self.layers.values()):
                hooks.callback(layer.register_forward_hook(self._count_call(number)).remove)
            for number, weight in enumerate(self.weights.values()):
                hooks.callback(weight.register_hook(self._count_gradient(number)).remove)
            yield
        for number, weight in enumerate(self.weights.values()):
            if weight.grad is not None:  # sharded, the hook is on a tensor that takes no part in the pass
                self.has_gradient[number] = 1
        self.idle_in_layers = sum(_idle_experts(layer) for name, layer in self.layers.items() if "expert" in name)

    def _count_call(self, number: int) -> Callable[..., None]:
        def look(gradient: torch.Tensor) -> None:
            self.moves_loss[number] += gradient.ne(0).any().to(self.moves_loss.device)

        def count(layer: nn.Module, args: Any, output: Any) -> None:
            self.called[number] = 1
            output = output[0] if isinstance(output, tuple) else output
            if output.requires_grad:
                output.register_hook(look)

        return count

    def _count_gradient(self, number: int) -> Callable[..., None]:
        def count(gradient: torch.Tensor) -> None:
            self.has_gradient[number] = 1

        return count

    def sum(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Adds what was seen in every process.

        Args:
            reduce: the sum of a tensor over the processes.
        """
        parts = (self.called, self.moves_loss, self.has_gradient)
        self.called, self.moves_loss, self.has_gradient = reduce(torch.cat(parts)).split([len(part) for part in parts])

    @property
    def idle_experts(self) -> int:
        """Adapted experts to which no token was routed: they are proven when one is."""
        return self.idle_in_layers + sum(self._is_idle(name, called) for name, called in self._calls().items())

    def problem(self) -> str | None:
        """The adapted modules that were not proven and the reason, in one line; None where all were."""
        if not self.layers:
            return "this model has no trainable adapter: build one, or load it with is_trainable=True."
        names: dict[str, list[str]] = {}
        for name, reason in self._reasons().items():
            names.setdefault(reason, []).append(name)
        if not names:
            return None
        parts = [f"{_first(modules)}: {reason}" for reason, modules in names.items()]
        count = sum(map(len, names.values()))
        return f"{count} of {len(self.layers)} adapted modules would not train. {'; '.join(parts)}."

    def _reasons(self) -> dict[str, str]:
        """Why a module was not proven, by its name."""
        reasons = {}
        has_gradient = dict(zip(self.weights, self.has_gradient.tolist(), strict=True))
        for (name, called), moves_loss in zip(self._calls().items(), self.moves_loss.tolist(), strict=True):
            weights = [weight for weight in self.weights if weight.startswith(f"{name}.")]
            if not called and not self._is_idle(name, called):
                reasons[name] = "the model never calls it"
            elif called and not moves_loss:
                reasons[name] = "called, but the loss has no gradient, or one of exactly zero, at its output"
            elif called and not all(has_gradient[weight] for weight in weights):
                without = (weight.removeprefix(f"{name}.") for weight in weights if not has_gradient[weight])
                reasons[name] = f"no gradient reaches {', '.join(without)}"
        return reasons

    def _calls(self) -> dict[str, bool]:
        return dict(zip(self.layers, map(bool, self.called.tolist()), strict=True))

    def _is_idle(self, name: str, called: bool) -> bool:
        """Whether it belongs to an expert without a token, beside one that has a token."""
        if called or not EXPERT.search(name):
            return False
        siblings = re.compile(re.escape(EXPERT.sub("<>", name)).replace("<>", EXPERT.pattern))
        return any(found and siblings.fullmatch(other) for other, found in self._calls().items())


def _idle_experts(layer: nn.Module) -> int:
    """The experts of a layer that got no gradient, where its matrices hold one for each: [E, ...]."""
    gradients = [weight.grad for weight in layer.parameters() if weight.ndim == 3 and weight.grad is not None]
    if not gradients:
        return 0
    whole = [gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient for gradient in gradients]
    learned = torch.stack([gradient.flatten(1).any(1) for gradient in whole]).any(0)
    return int(learned.logical_not().sum())


def _sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    torch.distributed.all_reduce(tensor)
    return tensor


def _first(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(name.removeprefix("base_model.model.") for name in names[:3]) + more
