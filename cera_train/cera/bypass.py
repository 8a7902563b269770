"""Projections whose weight a model reads without calling them: a branch beside such a one would never run.

Fused kernels take `self.out_proj.weight` as an argument, and some models multiply by a weight themselves. The source of
the class that holds a projection shows it, whatever the model type and whether or not the kernel is installed here.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Bypass:
    """Why a branch beside a projection would not run."""

    reason: str
    is_fused: bool = False
    """Only a fused kernel reads its weight, and only in training: `unfuse` takes the model off it."""

    def __str__(self) -> str:
        return self.reason


def bypass(parent: nn.Module, name: str) -> Bypass | None:
    """Why a branch beside `parent.name` would not run; None where it does."""
    kind = type(getattr(parent, name))
    if _returns_several(kind):
        return Bypass(f"{kind.__name__} returns a tuple, to which a branch cannot be added")
    uses = [use for use in _uses(type(parent), name) if _may_run(use, parent)]
    reads = [use for use in uses if use.is_read]
    if not reads:
        return None
    fused = [use for use in reads if use.is_training_only]
    never_called = len(reads) == len(uses)
    if not never_called and not fused:
        return None  # conditions decide that only a pass knows: `check_coverage` sees which hold
    function, layer = (reads if never_called else fused)[-1].reader, type(parent).__name__
    reader = f"{function} of {layer}" if function else layer
    when = "" if never_called else " in training"
    return Bypass(
        f"{reader} reads its weight without calling it{when}, so an adapter there would never run", bool(when)
    )


def bypassed(model: nn.Module) -> dict[str, Bypass]:
    """The linear projections of a model beside which a branch would never run, by their names."""
    return {
        f"{prefix}.{name}".removeprefix("."): found
        for prefix, parent in model.named_modules()
        for name, child in parent.named_children()
        if is_linear(child) and (found := bypass(parent, name)) is not None
    }


def runs_beside(parent: nn.Module) -> list[str]:
    """The linear projections in a layer beside which a branch runs."""
    return [name for name, child in parent.named_children() if is_linear(child) and bypass(parent, name) is None]


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D, BaseTunerLayer))


def exclude_bypassed(config: PeftConfig, model: nn.Module) -> dict[str, Bypass]:
    """Adds the bypassed projections of a model to the `exclude_modules` of a config that targets every linear layer.

    Returns:
        What was added, by its name: `out_proj` where all of that name are bypassed, else the whole name of each.
    """
    if not hasattr(config, "exclude_modules"):
        return {}
    found = bypassed(model)
    last = {name: name.rpartition(".")[2] for name, module in model.named_modules() if is_linear(module)}
    mixed = {last[name] for name in last if name not in found}
    added = {name if last[name] in mixed else last[name]: reason for name, reason in found.items()}
    excluded = config.exclude_modules or []
    if isinstance(excluded, str):
        added = {name: reason for name, reason in added.items() if not re.search(re.escape(name), excluded)}
        config.exclude_modules = "|".join([excluded, *(rf"(.*\.)?{re.escape(name)}" for name in added)])
    else:
        added = {name: reason for name, reason in added.items() if name not in excluded}
        config.exclude_modules = sorted({*excluded, *added}) or None
    return added


def unfuse(model: nn.Module) -> list[str]:
    """Takes a model off the fused kernels that read weights without calling their modules, before it gets an adapter.

    Only training uses such kernels: each layer that has one stays in eval mode itself, while its parts follow the
    model. The result is the same but for rounding.

    Returns:
        The names of those layers.
    """
    names = []
    for name, module in list(model.named_modules()):
        children = [child for child, part in module.named_children() if is_linear(part)]
        if any(use.is_training_only for child in children for use in _uses(type(module), child)):
            module.__class__ = _unfused(type(module))
            module.training = False
            names.append(name)
    return names


def keep_scale(model: nn.Module) -> None:
    """Takes RWKV off the halving of its weights in eval mode: it is for float16, and a branch would not be halved."""
    for module in model.modules():
        if hasattr(module, "_rescale_layers") and module.config.rescale_every > 0:
            if module.layers_are_rescaled:
                mode, module.training = module.training, True
                module._rescale_layers()
                module.training = mode
            module.config.rescale_every = 0


def is_unfused(module: nn.Module) -> bool:
    """Whether `unfuse` took this layer off its fused kernel."""
    return getattr(type(module), "stays_in_eval_mode", False)


def fused_kernels(layer: nn.Module) -> list[Callable[..., Any] | None]:
    """The functions that read weights of a layer in training; None for one that is not installed.

    transformers stands a function of torch's operations in for a missing kernel, or None.
    """
    uses = [use for child, _ in layer.named_children() for use in _uses(type(layer), child) if use.is_training_only]
    names = dict.fromkeys(use.reader for use in uses)
    return [getattr(sys.modules[type(layer).__module__], name, None) for name in names if name is not None]


@functools.cache
def _unfused(layer: type[nn.Module]) -> type[nn.Module]:
    """The class of a layer that stays in eval mode, under the same name."""
    if getattr(layer, "stays_in_eval_mode", False):
        return layer

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        layer.train(self, mode)
        self.training = False
        return self

    return type(layer.__name__, (layer,), {"train": train, "stays_in_eval_mode": True, "__module__": layer.__module__})


# --- the source of a class -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Use:
    """One place in the methods of a class where `self.name` stands."""

    is_read: bool
    """Its weight is read. Else the module is called, or handed on."""
    reader: str | None
    """The function that the weight is an argument of."""
    conditions: tuple[tuple[str, bool], ...]
    """The tests around it, and whether each must be true."""

    @property
    def is_training_only(self) -> bool:
        return self.is_read and any("self.training" in test and wanted for test, wanted in self.conditions)


@functools.cache
def _uses(layer: type[nn.Module], name: str) -> tuple[_Use, ...]:
    """Where the methods of a class, but for those that initialise it, use `self.name`. Empty: none reads its weight."""
    owners = [owner for owner in layer.__mro__ if owner not in nn.Module.__mro__]
    if not any(f"self.{name}.weight" in _module_text(owner.__module__) for owner in owners):
        return ()
    uses, seen = [], set()
    for owner in owners:
        for method in _methods(owner) if f"self.{name}" in _module_text(owner.__module__) else []:
            if method.name not in seen and not any(word in method.name for word in ("init", "reset")):
                uses += _uses_in(method, name, (), None)
            if "super()" not in ast.unparse(method):
                seen.add(method.name)  # overridden below
    return tuple(uses)


@functools.cache
def _returns_several(kind: type[nn.Module]) -> bool:
    """Whether a class of linear layers returns a tuple, as routers of experts do."""
    if not issubclass(kind, (nn.Linear, Conv1D)) or kind.forward in (nn.Linear.forward, Conv1D.forward):
        return False
    returned = [
        node.value
        for part in _methods(kind)
        if part.name == "forward"
        for node in ast.walk(part)
        if isinstance(node, ast.Return)
    ]
    return any(isinstance(value, ast.Tuple) for value in returned)


@functools.cache
def _module_text(module: str) -> str:
    try:
        return inspect.getsource(sys.modules[module])
    except (OSError, TypeError, KeyError):  # no source here: `check_coverage` finds what this cannot
        return ""


def _methods(owner: type) -> list[ast.FunctionDef]:
    try:
        [tree] = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return []
    return [node for node in tree.body if isinstance(node, ast.FunctionDef)]


def _uses_in(node: ast.AST, name: str, conditions: tuple[tuple[str, bool], ...], reader: str | None) -> Iterator[_Use]:
    """The uses of `self.name` in a piece of source, which is an argument of the function `reader`."""
    if isinstance(node, (ast.If, ast.IfExp)):
        test = ast.unparse(node.test)
        yield from _uses_in(node.test, name, conditions, reader)
        for part, wanted in ((node.body, True), (node.orelse, False)):
            for child in part if isinstance(part, list) else [part]:
                yield from _uses_in(child, name, (*conditions, (test, wanted)), reader)
    elif _is_part(node, name):
        yield _Use(False, None, conditions)
    elif isinstance(node, ast.Attribute) and _is_part(node.value, name):
        if node.attr == "weight":
            yield _Use(True, reader, conditions)
    elif isinstance(node, ast.Call):
        function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
        yield from _uses_in(node.func, name, conditions, reader)
        for argument in [*node.args, *node.keywords] if function not in LOOKS else []:
            yield from _uses_in(argument, name, conditions, function)
    elif not (isinstance(node, ast.Attribute) and node.attr in FACTS):  # self.proj.weight.dtype
        for child in ast.iter_child_nodes(node):
            yield from _uses_in(child, name, conditions, reader)


def _is_part(node: ast.AST, name: str) -> bool:
    """Whether a piece of source is `self.name`."""
    is_attribute = isinstance(node, ast.Attribute) and node.attr == name
    return is_attribute and isinstance(node.value, ast.Name) and node.value.id == "self"


FACTS = frozenset(("dtype", "device", "shape", "ndim", "requires_grad", "is_meta"))
"""Attributes of a weight that are not its numbers."""

LOOKS = frozenset(("isinstance", "hasattr", "getattr", "to", "type_as", "zeros_like", "ones_like", "empty_like"))
"""Calls that look at a weight and leave its numbers."""


def _may_run(use: _Use, parent: nn.Module) -> bool:
    """Whether the conditions of a use can hold for this layer. Those on a pass's arguments can."""
    return all(_value(test, parent) in (wanted, None) for test, wanted in use.conditions)


def _value(test: str, parent: nn.Module) -> bool | None:
    """The value of a condition that follows from the layer alone; None for any other."""
    if "self.training" in test and not is_unfused(parent):
        return None
    tree = ast.parse(test, mode="eval")
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    if not all(isinstance(function, ast.Name) and function.id in HARMLESS for function in calls):
        return None
    try:  # the layer's class asks the same at every pass
        return bool(eval(compile(tree, "<condition>", "eval"), {"__builtins__": HARMLESS, "self": parent}))
    except Exception:  # an argument of the pass, or an attribute that a pass sets
        return None


HARMLESS: dict[str, Any] = {function.__name__: function for function in (hasattr, isinstance, getattr, len, bool)}
"""What a condition may call and still be looked at."""
