"""A causal language model as a function from a micro-batch to the losses of its supervised tokens,
-log p(x_t | x_<t). Every token weighs the same in every batch: perplexity is exp of the mean.

Only the hidden states that predict a supervised token go through the LM head, in chunks, so the
logits of a long sequence over a large vocabulary are never in memory as a whole.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel

from cera_train.model.attention import BY_SEQUENCE, VARLEN, Sequences, attention_of
from cera_train.model.batches import Batch
from cera_train.model.weights import decoder_of, layer_classes
from cera_train.settings.model import Dtype

Head = Callable[[Tensor], Tensor]  # [N, d] -> [N, V]


@dataclass(frozen=True)
class Allowed:
    """What a model allows."""

    chunks_head: bool = False
    """Its head can be applied apart from its forward: what it does to the logits afterwards is in
    `finish_logits`."""
    flattens: bool = False
    """Sequences can lie end to end in one row: it neither ignores position ids nor carries a state
    across."""
    attention: str | None = None
    """The fastest attention by sequence that works here, for flat rows."""
    refused: tuple[str, ...] = ()
    """Faster ones, and why they do not."""


class LanguageModel(nn.Module):
    """The module that DDP or FSDP wrap.

    Args:
        model: `causal_lm` with an adapter inside it.
        causal_lm: transformers' model.
        autocast_dtype: what products compute in under autocast; None: without.
        device: where the model will compute; None: where it is.
    """

    def __init__(
        self,
        model: nn.Module,
        causal_lm: PreTrainedModel,
        autocast_dtype: Dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.autocast_dtype = autocast_dtype
        self.device = device or causal_lm.device
        # Accelerate shards by these names.
        self._no_split_modules = layer_classes(causal_lm)
        # Not registered: these are parts of `model`, and their parameters must not appear twice.
        vars(self).update(causal_lm=causal_lm, decoder=decoder_of(causal_lm))
        self.allowed = Allowed()
        self.is_flat = False
        """Whether the model takes flat batches."""
        self.is_compiled = False
        """Whether its layers are compiled: `compiled.compile_layers` sets it."""

    def forward(self, batch: Batch) -> Tensor:
        """[N] losses of the supervised tokens in nats, float32, in the order of the micro-batch."""
        targets = batch.input_ids.flatten()[batch.predicted]
        with self.autocast():
            if not self.allowed.chunks_head:
                logits = self.causal_lm(**self.inputs(batch)).logits
                return token_cross_entropy(states_before(logits, batch), targets)

            hidden_states = self.decoder(**self.inputs(batch)).last_hidden_state
            hidden_states = narrow_to_head(states_before(hidden_states, batch), self.head)
            is_head_trained = any(weight.requires_grad for weight in self.head.parameters())
            size = chunk_tokens(self.device)
            if torch.is_grad_enabled() and not is_head_trained:
                return FrozenHeadCrossEntropy.apply(hidden_states, targets, self.logits, size)
            return adapted_head_cross_entropy(hidden_states, targets, self.logits, size)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """[..., d] -> [..., V]."""
        logits = self.head(narrow_to_head(hidden_states, self.head))
        return finish_logits(logits, self.causal_lm.config)

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """The arguments of transformers' model for a micro-batch."""
        # transformers recognises a flat row only without a cache
        inputs = batch.inputs | {"use_cache": False}
        if batch.sequence_lengths is not None and self.attends_by_sequence:
            inputs["sequences"] = Sequences(batch.sequence_lengths)
        return inputs

    def with_whole_weights(self, function: Callable[[LanguageModel], None]) -> None:
        """Calls function(self). FSDP gathers sharded weights for methods of this module alone."""
        function(self)

    def use_flat_batches(self) -> None:
        """Makes the model take flat batches from now on, with the fastest attention that it
        allows."""
        self.is_flat = True
        if self.allowed.attention is not None:
            self.causal_lm.set_attn_implementation(self.allowed.attention)

    def autocast(self) -> torch.autocast:
        """The context that the model and its adapter compute in."""
        dtype = self.autocast_dtype and getattr(torch, self.autocast_dtype)
        return torch.autocast(self.causal_lm.device.type, dtype, enabled=dtype is not None)

    @contextlib.contextmanager
    def generating(self) -> Iterator[PreTrainedModel]:
        """The transformers model as generation needs it: in eval mode, for padded rows, with layers
        that are not compiled. All changes, including to its generation_config, are undone at the
        end."""
        causal_lm = self.causal_lm
        was_training = self.training
        attention = self.attention
        settings = causal_lm.generation_config
        self.eval()
        if self.attends_by_sequence:
            causal_lm.set_attn_implementation("sdpa")  # as the probe found it
        try:
            with self.autocast(), self.uncompiled():
                yield causal_lm
        finally:
            causal_lm.generation_config = settings
            if attention != self.attention:
                causal_lm.set_attn_implementation(attention)
            self.train(was_training)

    def uncompiled(self) -> contextlib.AbstractContextManager:
        """Passes inside the context run layers eagerly: compiled layers call no hooks."""
        if not self.is_compiled:
            return contextlib.nullcontext()
        return torch.compiler.set_stance("force_eager")

    @property
    def attention(self) -> str:
        """The name of the attention that computes."""
        return attention_of(self.causal_lm.config)

    @property
    def attends_by_sequence(self) -> bool:
        """Whether that is one of ours, which takes the lengths of a flat row's sequences."""
        return self.attention in (BY_SEQUENCE, VARLEN)

    @property
    def head(self) -> nn.Module:
        return self.causal_lm.get_output_embeddings()


def states_before(states: Tensor, batch: Batch) -> Tensor:
    """What predicts the supervised tokens: [B, T, d] -> [N, d]."""
    return states.flatten(0, 1).index_select(0, batch.predicted - 1)


def perplexity(mean_loss: float) -> float:
    """exp of a mean loss in nats; infinite if it overflows a float."""
    return math.exp(mean_loss) if mean_loss < 700 else math.inf


# --- the head -------------------------------------------------------------------------------------


def chunk_tokens(device: torch.device) -> int:
    """Supervised tokens whose logits are in memory at a time: enough to keep a GPU busy, few enough
    for CPU caches."""
    return 1024 if device.type == "cuda" else 128


def finish_logits(logits: Tensor, config: PretrainedConfig) -> Tensor:
    """Applies what an architecture does to the logits of its head, by its config: a soft cap c
    tanh(logits / c) (Gemma), or a factor (Cohere, Granite). Only `layout.probe` verifies this."""
    config = config.get_text_config()
    if cap := getattr(config, "final_logit_softcapping", None):
        return torch.tanh(logits / cap) * cap
    if isinstance(factor := getattr(config, "logit_scale", None), float):  # MPT's may be a string
        return logits * factor
    if divisor := getattr(config, "logits_scaling", None):
        return logits / divisor
    return logits


def narrow_to_head(hidden_states: Tensor, head: nn.Module) -> Tensor:
    """Hidden states in the dtype of the head: Mamba's are float32 over 16-bit weights."""
    is_wide = hidden_states.dtype.itemsize > head.weight.dtype.itemsize
    return hidden_states.to(head.weight.dtype) if is_wide else hidden_states


def token_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """[N, V], [N] -> [N] in nats, float32."""
    return cross_entropy(logits.float(), targets, reduction="none")


def adapted_head_cross_entropy(
    hidden_states: Tensor, targets: Tensor, head: Head, size: int
) -> Tensor:
    """[N, d], [N] -> [N] in nats. The head is trained: backward recomputes the logits of each
    chunk of `size` tokens."""

    def chunk_losses(hidden: Tensor, wanted: Tensor) -> Tensor:
        return token_cross_entropy(head(hidden), wanted)

    chunks = zip(hidden_states.split(size), targets.split(size), strict=True)
    return torch.cat([checkpoint(chunk_losses, *chunk, use_reentrant=False) for chunk in chunks])


class FrozenHeadCrossEntropy(torch.autograd.Function):
    """Cross entropy of [N, d] hidden states under a frozen head, [N]. The gradient of each chunk is
    computed in the forward pass, while its logits are in memory: they are computed once, and only
    one chunk's exist at a time."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, targets: Tensor, head: Head, size: int) -> Tensor:
        gradients = []
        losses = []
        chunks = zip(hidden_states.split(size), targets[:, None].split(size), strict=True)
        for hidden, wanted in chunks:
            with torch.enable_grad():
                hidden = hidden.detach().requires_grad_()
                logits = head(hidden)
            wide = torch.promote_types(logits.dtype, torch.float32)
            log_p = torch.log_softmax(logits.detach(), -1, dtype=wide)
            losses.append(-log_p.gather(1, wanted)[:, 0])
            # d loss / d logits = p - 1 at the target token, in place of log p.
            minus_one = log_p.new_full(wanted.shape, -1.0)
            grad_logits = log_p.exp_().scatter_add_(1, wanted, minus_one)
            gradients += torch.autograd.grad(logits, hidden, grad_logits.to(logits.dtype))
            # Otherwise these would be in memory beside the next chunk's.
            del logits, log_p, grad_logits
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_hidden_states,) = ctx.saved_tensors
        grad = grad_losses[:, None] * grad_hidden_states
        return grad.to(grad_hidden_states.dtype), None, None, None
