"""Layers compiled by torch: the same graphs serve all layers, lengths and numbers of sequences."""

import functools
import os
import shutil
import sysconfig
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._triton import has_triton

from cera_train.common.errors import UserError
from cera_train.model.language_model import LanguageModel
from cera_train.model.weights import layer_classes

PYTHON_HEADER = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
"""Where Triton and torch's inductor look for Python.h: the code that they generate includes it."""


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has the compiler and the headers that it needs."""
    if not PYTHON_HEADER.is_file():
        return False
    if device.type == "cuda":
        return has_triton() and ("CC" in os.environ or any(map(shutil.which, ("gcc", "clang"))))
    return any(map(shutil.which, ("g++", "clang++", "cl")))


def compile_layers(language_model: LanguageModel, backend: str | Callable = "inductor") -> None:
    """Compiles the layers. Raises UserError without a compiler."""
    causal_lm = language_model.causal_lm
    if not can_compile(causal_lm.device):
        raise UserError(
            "train.compile=true needs a C++ compiler on a CPU, such as g++; on CUDA a C compiler, "
            f"such as gcc, and Triton; on both Python's headers ({PYTHON_HEADER}), such as "
            "python3-dev: install what is missing, or set train.compile=false."
        )
    torch.compiler.reset()  # layers of an earlier run count towards the limit of variants
    _counters().clear()
    compiled = functools.cache(functools.partial(torch.compile, dynamic=True, backend=backend))
    kinds = layer_classes(causal_lm)
    for layer in causal_lm.modules():
        # FSDP2 gives layers a class of its own, below theirs.
        if kinds.isdisjoint(kind.__name__ for kind in type(layer).__mro__):
            continue
        if getattr(layer, "gradient_checkpointing", False):
            # gradient_checkpointing_enable() would set one function for all layers.
            layer._gradient_checkpointing_func = functools.partial(
                _checkpoint_compiled, layer._gradient_checkpointing_func, compiled
            )
        else:
            layer.compile(dynamic=True, backend=backend)
    language_model.is_compiled = True


def count_graphs() -> int:
    """The graphs that torch has compiled since `compile_layers`: one for each piece of a layer
    between two breaks, and for each variant of it."""
    return _counters()["stats"]["unique_graphs"]


def _counters() -> dict[str, Counter]:
    """torch.compile's own."""
    from torch._dynamo.utils import counters  # takes a second

    return counters


def _checkpoint_compiled(
    checkpoint: Callable, compiled: Callable, layer: functools.partial, *args: Any
) -> Any:
    """Checkpoints a compiled layer. torch.compile runs a layer that holds a checkpoint eagerly."""
    return checkpoint(functools.partial(compiled(layer.func), *layer.args, **layer.keywords), *args)
