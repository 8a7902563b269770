"""Cross entropy of hidden states under an LM head, in chunks: the logits of a long sequence over a
large vocabulary are never in memory as a whole."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

Head = Callable[[Tensor], Tensor]  # [N, d] -> [N, V]


def chunk_tokens(on_gpu: bool) -> int:
    """Supervised tokens whose logits are in memory at once: enough to keep a GPU busy, few enough
    for CPU caches."""
    return 1024 if on_gpu else 128


def finish_logits(logits: Tensor, config: PretrainedConfig) -> Tensor:
    """What an architecture does to the logits of its head, by its config: a soft cap c tanh(logits
    / c) (Gemma), or a factor (Cohere, Granite). Only `layout.probe` verifies this."""
    config = config.get_text_config()
    if cap := getattr(config, "final_logit_softcapping", None):
        return torch.tanh(logits / cap) * cap
    if isinstance(factor := getattr(config, "logit_scale", None), float):  # MPT's may be a word
        return logits * factor
    if divisor := getattr(config, "logits_scaling", None):
        return logits / divisor
    return logits


def narrow_to_head(hidden_states: Tensor, head: nn.Module) -> Tensor:
    """Hidden states as the head takes them: Mamba's are float32 over 16-bit weights."""
    is_wide = hidden_states.dtype.itemsize > head.weight.dtype.itemsize
    return hidden_states.to(head.weight.dtype) if is_wide else hidden_states


def token_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """[N, V], [N] -> [N] in nats, float32."""
    return cross_entropy(logits.float(), targets, reduction="none")


def adapted_head_cross_entropy(hidden_states: Tensor, targets: Tensor, head: Head) -> Tensor:
    """[N, d], [N] -> [N] in nats. The head is trained: backward makes each chunk's logits again."""

    def chunk_losses(hidden: Tensor, wanted: Tensor) -> Tensor:
        return token_cross_entropy(head(hidden), wanted)

    size = chunk_tokens(hidden_states.is_cuda)
    chunks = zip(hidden_states.split(size), targets.split(size), strict=True)
    return torch.cat([checkpoint(chunk_losses, *chunk, use_reentrant=False) for chunk in chunks])


class FrozenHeadCrossEntropy(torch.autograd.Function):
    """Cross entropy of [N, d] hidden states under a frozen head, [N]. The gradient of each chunk is
    computed in the forward pass, while its logits are in memory: they are computed once, and only
    one chunk's exist at a time."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, targets: Tensor, head: Head) -> Tensor:
        gradients = []
        losses = []
        size = chunk_tokens(hidden_states.is_cuda)
        chunks = zip(hidden_states.split(size), targets[:, None].split(size), strict=True)
        for hidden, wanted in chunks:
            with torch.enable_grad():
                hidden = hidden.detach().requires_grad_()
                logits = head(hidden)
            wide = torch.promote_types(logits.dtype, torch.float32)
            log_p = torch.log_softmax(logits.detach(), -1, dtype=wide)
            losses.append(-log_p.gather(1, wanted)[:, 0])
            # d loss / d logits = p - 1 at the wanted token, in place of log p.
            minus_one = log_p.new_full(wanted.shape, -1.0)
            grad_logits = log_p.exp_().scatter_add_(1, wanted, minus_one)
            gradients += torch.autograd.grad(logits, hidden, grad_logits.to(logits.dtype))
            del logits, log_p, grad_logits  # else the next chunk's would be in memory beside these
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor, None, None]:
        (grad_hidden_states,) = ctx.saved_tensors
        grad = grad_losses[:, None] * grad_hidden_states
        return grad.to(grad_hidden_states.dtype), None, None
