"""Next-token loss on supervised tokens only: - sum over supervised t of log p(x_t | x_<t).

Only the hidden states that predict a supervised token go through the LM head, in chunks, so the logits of a long
sequence over a large vocabulary are never in memory as a whole.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from cera_train.common.errors import UserError
from cera_train.data.batches import Batch, flat_batch, padded_batch
from cera_train.data.config import BatchLayout
from cera_train.model.attention import BY_SEQUENCE, VARLEN, kernel_may_run
from cera_train.model.config import chunk_tokens


@dataclass(frozen=True)
class Allowed:
    """What a model allows."""

    chunks_head: bool = False
    """Its head can be applied apart from its forward: it does not change the logits afterwards."""
    flattens: bool = False
    """Sequences can lie end to end in one row: it neither ignores position ids nor carries a state across."""
    attention: str | None = None
    """Name of the fastest attention by sequence that works here, for flat rows."""


class SupervisedLoss(nn.Module):
    """A causal language model as a function from a micro-batch to its summed loss, so that DDP or FSDP wrap it whole.

    Args:
        model: the model with its adapter; the adapter sits inside `causal_lm`.
        causal_lm: the transformers model.
        autocast: the context in which it computes.
    """

    def __init__(
        self,
        model: nn.Module,
        causal_lm: PreTrainedModel,
        autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ) -> None:
        super().__init__()
        self.model = model
        self.autocast = autocast
        self._no_split_modules = causal_lm._no_split_modules  # Accelerate shards by these
        # Not registered: these are parts of `model`, and their parameters must not appear twice.
        self._parts = {"causal_lm": causal_lm, "decoder": causal_lm.get_decoder()}
        self.allowed = Allowed()
        self.is_flat = False
        """Whether it takes flat batches: `choose_layout` decides."""
        self.is_compiled = False

    @torch.no_grad()
    def probe(self) -> Allowed:
        """Finds out by trying what this architecture allows, and keeps it in `allowed`.

        Where the weights are sharded, they are whole only inside this and `forward`:
        `torch.distributed.fsdp.register_fsdp_forward_method` has to know it.
        """
        causal_lm = self._parts["causal_lm"]
        vocabulary = causal_lm.get_input_embeddings().num_embeddings
        first, second, third = ([(7 * i + offset) % vocabulary for i in range(1, 9)] for offset in (0, 3, 5))
        masks = [[False] + [True] * 7] * 2
        was_training = self.training
        self.eval()  # dropout would make any two passes differ
        with torch.autocast(causal_lm.device.type, enabled=False):
            apart = padded_batch([first, second], masks).to(causal_lm.device)
            expected = causal_lm(**apart.inputs, use_cache=False).logits
            # A few models are their decoder: it gives logits.
            states = getattr(self._parts["decoder"](**apart.inputs, use_cache=False), "last_hidden_state", None)
            head = causal_lm.get_output_embeddings()
            chunks_head = states is not None and _close(head(_narrow(states, head)), expected, tolerance=1e-3)
            flat = [flat_batch(rows, masks).to(causal_lm.device) for rows in ([first, second], [third, second])]
            flattens, attention = self._probe_flat(*flat, expected)
        self.train(was_training)
        self.allowed = Allowed(chunks_head, flattens, attention)
        return self.allowed

    def _probe_flat(self, flat: Batch, other: Batch, expected: torch.Tensor) -> tuple[bool, str | None]:
        """Whether sequences that share a row get the logits they get apart, and by which attention of ours.

        Args:
            other: `flat` with another first sequence. The second one's logits must not move: a state that crosses over
                can be smaller than what another mask rounds in 16 bits.
        """
        causal_lm = self._parts["causal_lm"]
        # 16-bit attention rounds differently under another mask; a leak between sequences is far larger.
        tolerance = 1e-3 if causal_lm.dtype == torch.float32 else 0.05

        def agrees() -> bool:
            logits, moved = (
                causal_lm(**self._inputs(batch), use_cache=False).logits.view_as(expected) for batch in (flat, other)
            )
            return _close(logits, expected, tolerance) and _close(moved[1], logits[1], tolerance / 10)

        before = causal_lm.config._attn_implementation
        if before != "sdpa":  # chosen by the user
            return agrees(), None
        try:  # the model's sdpa would make a T x T mask for a flat row
            for name in (
                (VARLEN, BY_SEQUENCE) if kernel_may_run(flat.input_ids.device, causal_lm.dtype) else (BY_SEQUENCE,)
            ):
                causal_lm.set_attn_implementation(name)
                if causal_lm.config._attn_implementation != name:  # a model of a kind that takes no other
                    break
                # Its attention needs arguments that ours does not take, or the kernel refuses this GPU or head width.
                with contextlib.suppress(NotImplementedError, ImportError, RuntimeError, TypeError):
                    if agrees():
                        return True, name
        finally:
            causal_lm.set_attn_implementation(before)
        return agrees(), None

    def compile_layers(self) -> None:
        """Compiles the layers: one graph for all of them and for every length.

        Raises:
            UserError: there is no compiler for this device.
        """
        causal_lm = self._parts["causal_lm"]
        if causal_lm.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "cl"))):
            raise UserError(
                "train.compile=true needs a C++ compiler on a CPU, such as g++: install one, or leave it out."
            )
        for module in causal_lm.modules():
            if type(module).__name__ in (self._no_split_modules or ()):
                module.compile(dynamic=True)
        self.is_compiled = True

    def eagerly(self, batch: Batch) -> torch.Tensor:
        """The loss without compiled layers, which call no hooks."""
        with torch.compiler.set_stance("force_eager") if self.is_compiled else contextlib.nullcontext():
            return self(batch)

    def use_flat_batches(self) -> None:
        """Takes flat batches from now on, with the fastest attention by sequence that the model allows."""
        self.is_flat = True
        if self.allowed.attention is not None:
            self._parts["causal_lm"].set_attn_implementation(self.allowed.attention)

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        is_by_sequence = self._parts["causal_lm"].config._attn_implementation in (BY_SEQUENCE, VARLEN)
        return batch.inputs | ({"sequence_lengths": batch.sequence_lengths} if is_by_sequence else {})

    def forward(self, batch: Batch) -> torch.Tensor:
        """The loss summed over the supervised tokens of a micro-batch, a float32 scalar."""
        with self.autocast():
            return self._summed(batch)

    def _summed(self, batch: Batch) -> torch.Tensor:
        targets = batch.input_ids[:, 1:][batch.loss_mask[:, 1:]]
        causal_lm, decoder = self._parts["causal_lm"], self._parts["decoder"]
        if not self.allowed.chunks_head:
            logits = causal_lm(**self._inputs(batch), use_cache=False).logits[:, :-1][batch.loss_mask[:, 1:]]
            return cross_entropy(logits.float(), targets, reduction="sum")

        hidden_states = decoder(**self._inputs(batch), use_cache=False).last_hidden_state
        head = causal_lm.get_output_embeddings()
        hidden_states = _narrow(hidden_states[:, :-1][batch.loss_mask[:, 1:]], head)
        if torch.is_grad_enabled() and not any(weight.requires_grad for weight in head.parameters()):
            return FrozenHeadLoss.apply(hidden_states, targets, head)
        size = chunk_tokens(hidden_states.is_cuda)
        chunks = zip(hidden_states.split(size), targets.split(size), strict=True)
        if len(targets) <= size or not torch.is_grad_enabled():
            return torch.stack([head_loss(head, *chunk) for chunk in chunks]).sum()
        # An adapted head: the backward pass makes each chunk's logits again.
        return torch.stack([checkpoint(head_loss, head, *chunk, use_reentrant=False) for chunk in chunks]).sum()


class FrozenHeadLoss(torch.autograd.Function):
    """Summed cross entropy under a frozen head. The gradient of each chunk is computed in the forward pass, while its
    logits are in memory: they are computed once, and only one chunk's exist at a time."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, hidden_states: torch.Tensor, targets: torch.Tensor, head: nn.Module
    ) -> torch.Tensor:
        gradients, losses = [], []
        size = chunk_tokens(hidden_states.is_cuda)
        for hidden, wanted in zip(hidden_states.split(size), targets[:, None].split(size), strict=True):
            with torch.enable_grad():
                hidden = hidden.detach().requires_grad_()
                logits = head(hidden)
            wide = torch.promote_types(logits.dtype, torch.float32)
            log_p = torch.log_softmax(logits.detach(), -1, dtype=wide)
            losses.append(-log_p.gather(1, wanted).sum())
            # d loss / d logits = p - 1 at the wanted token, in place of log p.
            grad_logits = log_p.exp_().scatter_add_(1, wanted, log_p.new_full(wanted.shape, -1.0))
            gradients += torch.autograd.grad(logits, hidden, grad_logits.to(logits.dtype))
        ctx.save_for_backward(torch.cat(gradients))
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad_hidden_states,) = ctx.saved_tensors
        return (gradient * grad_hidden_states).to(grad_hidden_states.dtype), None, None


def choose_layout(wanted: BatchLayout, loss: SupervisedLoss, device: torch.device) -> None:
    """Probes the model and makes the loss take flat batches where that is correct and fast.

    Raises:
        UserError: flat was asked for, and this model would let sequences see each other.
    """
    allowed = loss.probe()
    if wanted == BatchLayout.flat and not allowed.flattens:
        raise UserError("train.batch_layout=flat: this model mixes sequences that share a row. Use padded or auto.")
    if wanted == BatchLayout.auto:
        # On a CPU, attention over one long row under a mask costs more than the padding of rows of near-equal length.
        is_fast = allowed.attention is not None or device.type != "cpu"
        wanted = BatchLayout.flat if allowed.flattens and is_fast else BatchLayout.padded
    if wanted == BatchLayout.flat:
        loss.use_flat_batches()


def _narrow(hidden_states: torch.Tensor, head: nn.Module) -> torch.Tensor:
    """Hidden states as the head takes them: Mamba's are float32 over 16-bit weights."""
    is_wide = hidden_states.dtype.itemsize > head.weight.dtype.itemsize
    return hidden_states.to(head.weight.dtype) if is_wide else hidden_states


def _close(values: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """Whether the norm of the difference is small against the norm of the expected values."""
    return bool((values.float() - expected.float()).norm() <= tolerance * expected.float().norm())


def head_loss(head: nn.Module, hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed cross entropy of [N, d] hidden states against N token ids, in float32."""
    return cross_entropy(head(hidden_states).float(), targets, reduction="sum")
