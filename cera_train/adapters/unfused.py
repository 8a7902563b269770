"""What it costs to train a model without its fused kernels, for `adapter.unfused=true`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from inspect import getclosurevars, isfunction
from typing import Any

import torch
from torch import nn

from cera_train.cera.bypass import fused_kernels, is_unfused

TOKENS = 512


def describe_unfused(model: nn.Module) -> str | None:
    """The layers without their kernel, and how much longer a pass through one takes. None where all have theirs."""
    layers = [module for module in model.modules() if is_unfused(module)]
    if not layers:
        return None
    kernels = fused_kernels(layers[0])
    names = " and ".join(kernel.__name__ for kernel in kernels if kernel is not None) or "their fused kernel"
    text = f"{len(layers)} {type(layers[0]).__name__} layers train without {names}"
    if not any(map(is_installed, kernels)):
        return f"{text}, which is not installed here: it costs nothing"
    width = model.config.get_text_config().hidden_size
    fused, unfused = (seconds_of_pass(layers[0], width, is_fused) for is_fused in (True, False))
    return f"{text}: {TOKENS} tokens take {unfused * 1e3:.1f} ms through one instead of {fused * 1e3:.1f} ms"


def is_installed(kernel: Callable[..., Any] | None) -> bool:
    """Whether a function of transformers runs a kernel, and not torch's operations in place of one."""
    if kernel is None:
        return False
    if not isfunction(kernel):
        return True  # a layer from the Hub
    # transformers' wrapper keeps in its closure which of the two it found
    return getclosurevars(kernel).nonlocals.get("is_new_implementation", True)


def seconds_of_pass(layer: nn.Module, width: int, is_fused: bool) -> float:
    """A forward and backward pass of TOKENS tokens through one layer, the median of three after a first."""
    weight = next(layer.parameters())
    x = torch.randn(1, TOKENS, width, device=weight.device, dtype=weight.dtype, requires_grad=True)
    seconds = []
    layer.training = is_fused  # its parts keep their mode
    try:
        for _ in range(4):
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            started = time.perf_counter()
            torch.autograd.grad(layer(x).sum(), x)
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            seconds.append(time.perf_counter() - started)
    finally:
        layer.training = False
    return statistics.median(seconds[1:])
