"""Layers of a frozen model that keep less for the backward pass, with the same outputs. Autograd
keeps a norm's input in float32, and act(gate) beside gate and up. Recomputing both takes one pass
over memory: recipes/math_r64.yaml needs 31 GB instead of 37.
"""

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm


class Norm(torch.autograd.Function):
    """weight * x / rms(x), [..., d], for a frozen weight."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.to(torch.float32)
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, scale, weight)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor, None, None]:
        x, scale, weight = ctx.saved_tensors
        normal = x.to(torch.float32) * scale
        grad = (grad_output * weight).to(torch.float32)
        along = (grad * normal).mean(-1, keepdim=True)
        return normal.mul_(along).neg_().add_(grad).mul_(scale).to(x.dtype), None, None


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    if self.weight.requires_grad or not _is_kept_for(hidden_states):
        return self.usual_forward(hidden_states)
    return Norm.apply(hidden_states, self.weight, self.variance_epsilon)


def _mlp(self: Any, x: Tensor) -> Tensor:
    if not _is_kept_for(x):
        return self.usual_forward(x)

    def gated(gate: Tensor, up: Tensor) -> Tensor:
        return self.act_fn(gate) * up

    gate = self.gate_proj(x)
    up = self.up_proj(x)
    return self.down_proj(
        checkpoint(gated, gate, up, use_reentrant=False, preserve_rng_state=False)
    )


def _is_kept_for(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling()


def keep_less(model: nn.Module) -> None:
    """Changes the norms and gated MLPs whose forward is Llama's: transformers' models have copies
    of it. A norm whose weight trains, a pass without gradients and a compiled layer run the usual
    forward; torch's compiler finds this saving by itself."""
    for module in model.modules():
        if (lean := _lean_class(type(module))) is not None:
            module.__class__ = lean


@functools.cache
def _lean_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The class with a lean forward; None for a layer that computes something else."""
    lean_forwards = {
        inspect.getsource(LlamaRMSNorm.forward): _norm,
        inspect.getsource(LlamaMLP.forward): _mlp,
    }
    try:
        lean_forward = lean_forwards[inspect.getsource(kind.forward)]
    except (KeyError, OSError, TypeError):  # OSError and TypeError: the class has no source file
        return None
    return type(
        f"Lean{kind.__name__}", (kind,), {"forward": lean_forward, "usual_forward": kind.forward}
    )
