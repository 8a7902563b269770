"""Next-token loss on supervised tokens only, - sum over supervised t of log p(x_t | x_<t), and
perplexity = exp(loss / supervised tokens): every token weighs the same, whatever the batch.

Only the hidden states that predict a supervised token go through the LM head, in chunks, so the
logits of a long sequence over a large vocabulary are never in memory as a whole.
"""

import contextlib
import functools
import math
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._triton import has_triton
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel

from cera_train.common.errors import UserError
from cera_train.model.attention import BY_SEQUENCE, VARLEN, Sequences, kernel_may_run
from cera_train.model.batches import Batch, flat_batch, padded_batch
from cera_train.settings.training import BatchLayout

PYTHON_HEADER = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
"""Where Triton and torch's inductor look for it: what they generate includes it."""


@dataclass(frozen=True)
class Allowed:
    """What a model allows."""

    chunks_head: bool = False
    """Its head can be applied apart from its forward: what it does to the logits afterwards is in
    `finish_logits`."""
    flattens: bool = False
    """Sequences can lie end to end in one row: it neither ignores position ids nor carries a state
    across."""
    attention: str | None = (
        None  # name of the fastest attention by sequence that works here, for flat rows
    )


class SupervisedLoss(nn.Module):
    """A causal language model as a function from a micro-batch to its summed loss, so that DDP or
    FSDP wrap it whole. `model` is `causal_lm` with an adapter inside it."""

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

    def forward(self, batch: Batch, by_token: bool = False) -> Tensor:
        """The loss summed over the supervised tokens of a micro-batch, a float32 scalar; or
        `by_token`, the loss of each, [N], in the order of the micro-batch."""
        losses = self._token_losses(batch)
        return losses if by_token else losses.sum()

    def _token_losses(self, batch: Batch) -> Tensor:
        is_supervised = batch.loss_mask[:, 1:]
        targets = batch.input_ids[:, 1:][is_supervised]
        with self.autocast():
            if not self.allowed.chunks_head:
                logits = self.causal_lm(**self._inputs(batch)).logits[:, :-1][is_supervised]
                return cross_entropy(logits.float(), targets, reduction="none")

            head = self.causal_lm.get_output_embeddings()
            decoder = self._parts["decoder"]
            hidden_states = _narrow(
                decoder(**self._inputs(batch)).last_hidden_state[:, :-1][is_supervised], head
            )
            if torch.is_grad_enabled() and not any(
                weight.requires_grad for weight in head.parameters()
            ):
                return FrozenHeadLoss.apply(hidden_states, targets, self._logits)
            size = chunk_tokens(hidden_states.is_cuda)
            chunks = zip(hidden_states.split(size), targets.split(size), strict=True)
            # An adapted head: the backward pass makes each chunk's logits again.
            return torch.cat(
                [checkpoint(self._losses, *chunk, use_reentrant=False) for chunk in chunks]
            )

    def _losses(self, hidden_states: Tensor, targets: Tensor) -> Tensor:
        """[N, d], [N] -> [N], in float32."""
        return cross_entropy(self._logits(hidden_states).float(), targets, reduction="none")

    def _logits(self, hidden_states: Tensor) -> Tensor:
        """[N, d] -> [N, V]."""
        return finish_logits(
            self.causal_lm.get_output_embeddings()(hidden_states), self.causal_lm.config
        )

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        # transformers sees that a row is flat only where it uses no cache
        inputs = batch.inputs | {"use_cache": False}
        if batch.sequence_lengths is not None and self.causal_lm.config._attn_implementation in (
            BY_SEQUENCE,
            VARLEN,
        ):
            inputs["sequences"] = Sequences(batch.sequence_lengths)
        return inputs

    @contextlib.contextmanager
    def generating(self) -> Iterator[PreTrainedModel]:
        """The transformers model as generation needs it: in eval mode, padded rows, layers that are
        not compiled. What is changed for that, its generation_config too, is put back."""
        causal_lm = self.causal_lm
        was_training = self.training
        attention = causal_lm.config._attn_implementation
        settings = causal_lm.generation_config
        self.eval()
        if attention in (BY_SEQUENCE, VARLEN):
            causal_lm.set_attn_implementation("sdpa")  # which `probe` found there
        try:
            with self.autocast(), self.uncompiled():
                yield causal_lm
        finally:
            causal_lm.generation_config = settings
            if attention in (BY_SEQUENCE, VARLEN):
                causal_lm.set_attn_implementation(attention)
            self.train(was_training)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model inside `model`."""
        return self._parts["causal_lm"]

    # --- what the model allows --------------------------------------------------------------------

    @torch.no_grad()
    def probe(self) -> Allowed:
        """Finds out by trying what this architecture allows, and keeps it in `allowed`. Sharded
        weights have to be whole here, as in `forward`: see `register_fsdp_forward_method`."""
        causal_lm = self.causal_lm
        decoder = self._parts["decoder"]
        vocabulary = causal_lm.config.get_text_config().vocab_size
        first, second, third = (
            [(7 * i + offset) % vocabulary for i in range(1, 9)] for offset in (0, 3, 5)
        )
        masks = [[False] + [True] * 7] * 2
        was_training = self.training
        self.eval()  # dropout would make any two passes differ
        # In 16 bits, where an adapter may need autocast; else without it, to compare to more
        # digits.
        is_wide = causal_lm.dtype.itemsize >= 4
        with torch.autocast(causal_lm.device.type, enabled=False) if is_wide else self.autocast():
            apart = self._inputs(padded_batch([first, second], masks).to(causal_lm.device))
            expected = causal_lm(**apart).logits
            states = getattr(
                decoder(**apart), "last_hidden_state", None
            )  # Llama 4's decoder gives logits
            head = causal_lm.get_output_embeddings()
            chunks_head = states is not None and _close(
                self._logits(_narrow(states, head)), expected, tolerance=1e-3
            )
            flat = [
                flat_batch(rows, masks).to(causal_lm.device)
                for rows in ([first, second], [third, second])
            ]
            self.allowed = Allowed(chunks_head, *self._probe_flat(*flat, expected))
        self.train(was_training)
        return self.allowed

    def _probe_flat(self, flat: Batch, other: Batch, expected: Tensor) -> tuple[bool, str | None]:
        """Whether sequences that share a row get the logits they get apart, and by which attention
        of ours. In `other` the first sequence is another one: the second's logits must stay, since
        a state that crosses over can move them less than another mask does in 16 bits."""
        causal_lm = self.causal_lm
        # 16-bit attention rounds differently under another mask; a leak between sequences is far
        # larger.
        tolerance = 1e-3 if causal_lm.dtype == torch.float32 else 0.05

        def agrees() -> bool:
            logits, moved = (
                causal_lm(**self._inputs(rows)).logits.view_as(expected) for rows in (flat, other)
            )
            return _close(logits, expected, tolerance) and _close(
                moved[1], logits[1], tolerance / 10
            )

        before = causal_lm.config._attn_implementation
        if before != "sdpa":  # chosen by the user
            return agrees(), None
        names = [VARLEN] * kernel_may_run(flat.input_ids.device, causal_lm.dtype) + [BY_SEQUENCE]
        try:  # the model's sdpa would make a T x T mask for a flat row
            for name in names:
                causal_lm.set_attn_implementation(name)
                if (
                    causal_lm.config._attn_implementation != name
                ):  # a model of a kind that takes no other
                    break
                # Its attention needs arguments that ours does not take, or the kernel refuses this
                # GPU or head width.
                with contextlib.suppress(NotImplementedError, ImportError, RuntimeError, TypeError):
                    if agrees():
                        return True, name
        finally:
            causal_lm.set_attn_implementation(before)
        return agrees(), None

    def use_flat_batches(self) -> None:
        """Takes flat batches from now on, with the fastest attention by sequence that the model
        allows."""
        self.is_flat = True
        if self.allowed.attention is not None:
            self.causal_lm.set_attn_implementation(self.allowed.attention)

    # --- compiled layers --------------------------------------------------------------------------

    def compile_layers(self, backend: str | Callable = "inductor") -> None:
        """Compiles the layers: the same graphs for all of them, every length and every number of
        sequences. Raises UserError without a compiler."""
        causal_lm = self.causal_lm
        if not can_compile(causal_lm.device):
            raise UserError(
                "train.compile=true needs a C++ compiler on a CPU, such as g++; on CUDA a C "
                "compiler, such as gcc, and "
                f"Triton; on both Python's headers ({PYTHON_HEADER}), such as python3-dev: "
                f"install what is missing, or "
                "set train.compile=false."
            )
        torch.compiler.reset()  # an earlier run's layers count towards the limit of variants
        refused_variants().clear()
        torch.compiler.set_stance("default")
        compiled = functools.cache(functools.partial(torch.compile, dynamic=True, backend=backend))
        kinds = set(self._no_split_modules or ())
        for layer in causal_lm.modules():
            if kinds.isdisjoint(
                kind.__name__ for kind in type(layer).__mro__
            ):  # FSDP2 gives layers a class of its own
                continue
            if getattr(layer, "gradient_checkpointing", False):
                checkpoint_layer = functools.partial(
                    _checkpoint_compiled, layer._gradient_checkpointing_func, compiled
                )
                layer._gradient_checkpointing_func = checkpoint_layer
            else:
                layer.compile(dynamic=True, backend=backend)
        self.is_compiled = True

    def stop_compiling(self) -> bool:
        """Whether torch has just refused one more variant of a layer. Then all layers run eagerly
        from now on."""
        if self.is_compiled and any("recompile limit" in reason for reason in refused_variants()):
            torch.compiler.set_stance("force_eager")
            self.is_compiled = False
            return True
        return False

    def uncompiled(self) -> contextlib.AbstractContextManager:
        """Passes inside it do without compiled layers, which call no hooks."""
        return (
            torch.compiler.set_stance("force_eager")
            if self.is_compiled
            else contextlib.nullcontext()
        )


class FrozenHeadLoss(torch.autograd.Function):
    """Cross entropy of [N, d] hidden states under a frozen head, [N]. The gradient of each chunk is
    computed in the forward pass, while its logits are in memory: they are computed once, and only
    one chunk's exist at a time."""

    @staticmethod
    def forward(
        ctx: Any, hidden_states: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor]
    ) -> Tensor:
        gradients = []
        losses = []
        size = chunk_tokens(hidden_states.is_cuda)
        for hidden, wanted in zip(
            hidden_states.split(size), targets[:, None].split(size), strict=True
        ):
            with torch.enable_grad():
                hidden = hidden.detach().requires_grad_()
                logits = head(hidden)
            wide = torch.promote_types(logits.dtype, torch.float32)
            log_p = torch.log_softmax(logits.detach(), -1, dtype=wide)
            losses.append(-log_p.gather(1, wanted)[:, 0])
            # d loss / d logits = p - 1 at the wanted token, in place of log p.
            grad_logits = log_p.exp_().scatter_add_(1, wanted, log_p.new_full(wanted.shape, -1.0))
            gradients += torch.autograd.grad(logits, hidden, grad_logits.to(logits.dtype))
            del logits, log_p, grad_logits  # else the next chunk's would be in memory beside these
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor, None, None]:
        (grad_hidden_states,) = ctx.saved_tensors
        return (grad_losses[:, None] * grad_hidden_states).to(grad_hidden_states.dtype), None, None


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has the compiler and the headers that it needs."""
    if not PYTHON_HEADER.is_file():
        return False
    if device.type == "cuda":
        return has_triton() and any(map(shutil.which, ("gcc", "clang", "cc")))
    return any(map(shutil.which, ("g++", "clang++", "cl")))


def refused_variants() -> dict[str, int]:
    """How often torch.compile has run code as it is written, by the reason."""
    from torch._dynamo.utils import counters  # takes a second

    return counters["unimplemented"]


def _checkpoint_compiled(
    checkpoint: Callable, compiled: Callable, layer: functools.partial, *args: Any
) -> Any:
    """Checkpoints a compiled layer. torch.compile runs a layer that holds a checkpoint eagerly."""
    return checkpoint(functools.partial(compiled(layer.func), *layer.args, **layer.keywords), *args)


def chunk_tokens(on_gpu: bool) -> int:
    """Supervised tokens whose logits are in memory at once: enough to keep a GPU busy, few enough
    for CPU caches."""
    return 1024 if on_gpu else 128


def finish_logits(logits: Tensor, config: PretrainedConfig) -> Tensor:
    """What an architecture does to the logits of its head, by its config: a soft cap c tanh(logits
    / c) (Gemma), or a factor (Cohere, Granite). Only `SupervisedLoss.probe` verifies this."""
    config = config.get_text_config()
    if cap := getattr(config, "final_logit_softcapping", None):
        return torch.tanh(logits / cap) * cap
    if isinstance(factor := getattr(config, "logit_scale", None), float):  # MPT's may be a word
        return logits * factor
    if divisor := getattr(config, "logits_scaling", None):
        return logits / divisor
    return logits


def _narrow(hidden_states: Tensor, head: nn.Module) -> Tensor:
    """Hidden states as the head takes them: Mamba's are float32 over 16-bit weights."""
    is_wide = hidden_states.dtype.itemsize > head.weight.dtype.itemsize
    return hidden_states.to(head.weight.dtype) if is_wide else hidden_states


def _close(values: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether the norm of the difference is small against the norm of the expected values."""
    return bool((values.float() - expected.float()).norm() <= tolerance * expected.float().norm())


def choose_layout(
    wanted: BatchLayout, loss: SupervisedLoss, device: torch.device, known: Allowed | None = None
) -> None:
    """Probes the model, unless it is `known` what it allows, and makes the loss take flat batches
    where that is correct and fast. Raises UserError where flat is wanted, and this model would let
    sequences see each other."""
    allowed = loss.allowed = known or loss.probe()
    if wanted == BatchLayout.flat and not allowed.flattens:
        raise UserError(
            "train.batch_layout=flat: this model mixes sequences that share a row. Use padded or "
            "auto."
        )
    # On a CPU, attention over one long row under a mask costs more than the padding of rows of
    # near-equal length.
    is_fast = allowed.attention is not None or device.type != "cpu"
    if wanted == BatchLayout.flat or (wanted == BatchLayout.auto and allowed.flattens and is_fast):
        loss.use_flat_batches()


def perplexity(mean_loss: float) -> float:
    """exp of a mean loss in nats; infinite where a float has no room for it."""
    return math.exp(mean_loss) if mean_loss < 700 else math.inf
