"""An update of the run itself on fake tensors, which have shapes, dtypes and storages and no
memory.

Base, adapter, loss, layout and optimizer are those of training. Counted are the bytes of all living
storages, and floating-point operations by torch's formulas. The tensors lie on the CPU, where torch
takes fake ones without a GPU; `choices_of_a_gpu` holds what a GPU does differently.
"""

import contextlib
import logging
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.nn.attention import varlen  # noqa: F401 - registers _varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry
from transformers.integrations import moe  # noqa: F401 - registers grouped_mm_fallback

from cera_train.adapters.build import build, parameter_counts, parameter_groups
from cera_train.model import head, layout
from cera_train.model.batches import Batch
from cera_train.model.head import chunk_tokens
from cera_train.model.language_model import LanguageModel
from cera_train.model.layout import Allowed, choose_layout
from cera_train.model.weights import mixes_sequences
from cera_train.planning.count import (
    build_base,
    errors_in_one_line,
    quantised_linears,
    stored_sizes,
)
from cera_train.settings.model import Quantization
from cera_train.settings.run import PlanRun
from cera_train.settings.training import BatchLayout
from cera_train.training.optimizer import build_optimizer

logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # logs what it raises


def allocated(size: float) -> int:
    """Bytes that torch's allocator for CUDA takes for so many."""
    return 512 * math.ceil(size / 512)


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one length."""

    rows: int
    length: int
    supervised: float  # share of the tokens whose prediction counts
    has_mask: bool  # attention gets a mask instead of running its causal path

    @property
    def tokens(self) -> int:
        return self.rows * self.length


class Part(NamedTuple):
    """A part of an update: the most bytes at once, and floating-point operations."""

    peak: float
    operations: int


class Cost(NamedTuple):
    """What one micro-batch takes."""

    forward: Part  # the loss takes the gradient at a frozen head in its forward pass
    backward: Part
    step: Part
    evaluation: Part

    @property
    def peak(self) -> float:
        """Bytes, in training."""
        return max(self.forward.peak, self.backward.peak, self.step.peak)


ALLOWED: dict[str, Allowed] = {}
"""What a base allows under a method, for this process: probing takes half of a dry run."""


class DryRun:
    """The model, loss and optimizer of a run.

    Args:
        config: with a decided `model.dtype`.
    """

    def __init__(self, config: PlanRun) -> None:
        self.config = config
        on_gpu = config.plan.on_gpu
        quantization = config.model.quantization
        self.base = build_base(config.model)
        sizes = stored_sizes(self.base, quantization)
        if quantization == Quantization.int8:
            for linear in quantised_linears(self.base, quantization):
                linear.register_forward_hook(keep_input)
        layers = [
            layer
            for layer in self.base.modules()
            if type(layer).__name__ in self.base._no_split_modules
        ]
        inside = sum(sizes[weight] for layer in layers for weight in layer.parameters())
        self.layer = inside / max(1, len(layers))
        self.outside = sum(sizes.values()) - inside
        """Bytes of the weights of a layer, and of those outside the layers."""
        batch_layout = config.train.batch_layout
        if batch_layout == BatchLayout.auto and mixes_sequences(self.base):
            batch_layout = BatchLayout.padded
        autocast = config.model.autocast_dtype(config.train.autocast, on_gpu)
        with torch.device("meta"):
            self.model = build(self.base, config.adapter, has_autocast=autocast is not None).train()
        self.trainable, self.total = parameter_counts(self.model)
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.meter = Meter()
        self._make_fake(sizes)
        self.trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        held = self.meter.alive
        adapter = sum(allocated(weight.nbytes) for weight in self.trained)
        # Paged states lie in memory that CUDA manages: as many bytes, whose functions need a GPU.
        kind = config.optimizer.kind.removeprefix("paged_")
        groups = parameter_groups(self.model, config.adapter)
        settings = replace(config.optimizer, kind=kind, lr=1.0)  # any rate: nothing is trained
        self.optimizer = build_optimizer(groups, settings, torch.device("cpu"))
        if on_gpu and "foreach" in self.optimizer.defaults:
            for group in self.optimizer.param_groups:
                group["foreach"] = True
        dtype = None if autocast is None else getattr(torch, autocast)
        self.language_model = LanguageModel(
            self.model, self.base, lambda: torch.autocast("cpu", dtype, enabled=dtype is not None)
        )
        with self.running():
            method = (config.adapter.kind, config.adapter.method, config.adapter.target_modules)
            probed = repr((config.model, method, on_gpu))
            choose_layout(
                batch_layout,
                self.language_model,
                torch.device("cuda" if on_gpu else "cpu"),
                ALLOWED.get(probed),
            )
            ALLOWED[probed] = self.language_model.allowed
            self._fill_gradients()
            self.optimizer.step()  # makes the optimizer's states
            self.optimizer.zero_grad()
        self.memory = {
            "weights": held - adapter,
            "adapter": adapter,
            "optimizer": self.meter.alive - held,
        }
        """Bytes by part that a process holds between updates."""

    def _make_fake(self, sizes: dict[nn.Parameter, float]) -> None:
        """Puts fake tensors in the place of the meta device's. A tied weight stays one."""
        fakes: dict[torch.Tensor, torch.Tensor] = {}
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            fake = FakeTensor(self.fake_mode, tensor.detach(), torch.device("cpu"))
            fakes[tensor] = (
                nn.Parameter(fake, tensor.requires_grad)
                if isinstance(tensor, nn.Parameter)
                else fake
            )
            self.meter.hold(fake, None if tensor.requires_grad else sizes.get(tensor))
        for module in self.model.modules():
            for tensors in (module._parameters, module._buffers):
                tensors.update({name: fakes.get(tensor) for name, tensor in tensors.items()})

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Runs the block on fake tensors, as on the planned device."""
        # transformers masks every fake tensor without reading it: let it read the meter's values.
        sees_values = patch("transformers.masking_utils.is_tracing", lambda tensor=None: False)
        device = choices_of_a_gpu() if self.config.plan.on_gpu else contextlib.nullcontext()
        errors = errors_in_one_line(self.config.model, self.base.config.model_type)
        with errors, sees_values, device, self.fake_mode, self.meter:
            yield

    def cost(self, batch: MicroBatch, accumulates: bool) -> Cost:
        """The cost of an update that ends with this micro-batch, and of its evaluation.

        Args:
            accumulates: the update has other micro-batches, whose gradients are there.
        """
        meter = self.meter
        with self.running():
            inputs = self._batch(batch)
            if accumulates:
                self._fill_gradients()
            meter.read()
            loss = self.language_model.train()(inputs).sum()
            forward = meter.read()
            loss.backward()
            del loss
            backward = meter.read()
            self.optimizer.step()
            self.optimizer.zero_grad()
            step = meter.read()
            with torch.no_grad():
                self.language_model.eval()(inputs).sum()
            return Cost(forward, backward, step, meter.read())

    def _fill_gradients(self) -> None:
        for weight in self.trained:
            weight.grad = torch.zeros_like(weight)

    def _batch(self, batch: MicroBatch) -> Batch:
        meter = self.meter
        meter.supervised = max(1, round(batch.tokens * batch.supervised))
        meter.skips_mask = not batch.has_mask
        shape = (1, batch.tokens) if self.language_model.is_flat else (batch.rows, batch.length)
        ids = torch.zeros(shape, dtype=torch.int64)
        places = torch.zeros(shape, dtype=torch.int64)
        mask = torch.zeros(shape, dtype=torch.bool)
        if self.language_model.is_flat:
            return Batch(
                ids, mask, position_ids=places, sequence_lengths=[batch.length] * batch.rows
            )
        return Batch(ids, mask, attention_mask=places if batch.has_mask else None)


# --- what is counted ------------------------------------------------------------------------------


class Meter(TorchDispatchMode):
    """Counts bytes of living storages and floating-point operations. Code that reads a value reads
    1.

    torch's FlopCounterMode hooks modules too, which fails where the loss takes a gradient in its
    forward pass, and its MemTracker fails on frozen weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, float] = {}
        self.alive = self.peak = 0.0
        self.operations = 0
        self.supervised = 1  # tokens that the mask of the loss selects: a fake one has no values
        self.skips_mask = True  # whether a look at a padding mask finds that nothing is masked

    def hold(self, tensor: torch.Tensor, size: float | None = None) -> None:
        """Counts a tensor's storage once, until it is freed.

        Args:
            size: bytes; None for those of the storage.
        """
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = size = allocated(storage.nbytes() if size is None else size)
            weakref.finalize(storage, self._free, key)
            self.alive += size
            self.peak = max(self.peak, self.alive)

    def read(self) -> Part:
        """What was counted since the last reading."""
        part = Part(self.peak, self.operations)
        self.peak = self.alive
        self.operations = 0
        return part

    def _free(self, key: int) -> None:
        self.alive -= self.sizes.pop(key)

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if operation is ATEN._local_scalar_dense.default:
            return self.skips_mask if args[0].dtype == torch.bool else 1
        if operation is ATEN.index.Tensor:
            args = (args[0], self._places(args[1]))
        is_grouped = operation is ATEN._grouped_mm.default
        output = grouped_shape(*args[:3]) if is_grouped else operation(*args, **kwargs)
        for tensor in [output] if isinstance(output, torch.Tensor) else tree_iter(output):
            if isinstance(tensor, torch.Tensor):
                self.hold(tensor)
        if (formula := FORMULAS.get(operation._overloadpacket)) is not None:
            self.operations += formula(*args, **kwargs, out_val=output)
        return output

    def _places(self, indices: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """The places that a mask selects in the place of the mask."""
        places: list[torch.Tensor | None] = []
        for index in indices:
            is_mask = index is not None and index.dtype == torch.bool
            places += (
                [index.new_empty(self.supervised, dtype=torch.int64) for _ in index.shape]
                if is_mask
                else [index]
            )
        return places


def half(formula: Callable) -> Callable:
    """The formula of a causal attention kernel, which skips what the mask takes out."""
    return lambda *args, **kwargs: formula(*args, **kwargs) // 2


def half_if_causal(formula: Callable) -> Callable:
    return lambda *args, **kwargs: formula(*args, **kwargs) // (1 + any(it is True for it in args))


def grouped_flops(a: torch.Tensor, b: torch.Tensor, *args: Any, **kwargs: Any) -> int:
    """Operations of a grouped product: [S, in] with [E, in, out], or in backward [in, S] with [S,
    out]."""
    return 2 * a.numel() * b.shape[-1]


def grouped_shape(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """What a grouped product returns. torch computes it for 32 bits too, but has the shapes for
    bfloat16 alone."""
    return (
        a.new_empty(a.shape[0], b.shape[-1])
        if b.ndim == 3
        else a.new_empty(len(ends), a.shape[0], b.shape[-1])
    )


ATEN = torch.ops.aten
VARLEN = torch.ops.torch_attn
MOE = torch.ops.transformers
FLASH = "_scaled_dot_product_flash_attention"
FORMULAS = flop_registry | {
    ATEN.addmm_: flop_registry[ATEN.addmm],
    ATEN._grouped_mm: grouped_flops,
    MOE.grouped_mm_fallback: grouped_flops,
}
"""torch's formulas by operation: two operations for a multiply and add."""
for end in ("", "_backward"):
    FORMULAS[getattr(ATEN, f"{FLASH}_for_cpu{end}")] = half_if_causal(
        flop_registry[getattr(ATEN, FLASH + end)]
    )
    FORMULAS[getattr(VARLEN, f"_varlen_attn{end}")] = half(
        flop_registry[getattr(VARLEN, f"_varlen_attn{end}")]
    )
if hasattr(MOE, "grouped_mm_fallback_backward"):  # transformers 5.10 has none
    FORMULAS[MOE.grouped_mm_fallback_backward] = lambda a, b, *args, **kwargs: (
        2 * grouped_flops(a, b)
    )


# --- what a GPU does differently ------------------------------------------------------------------


@contextlib.contextmanager
def choices_of_a_gpu() -> Iterator[None]:
    """Larger chunks of logits, FlashAttention's variable-length kernel in 16 bits, and dropout's
    masks in bytes."""
    with (
        patch.object(head, "chunk_tokens", lambda on_gpu: chunk_tokens(on_gpu=True)),
        patch.object(layout, "kernel_may_run", lambda device, dtype: dtype.itemsize == 2),
        patch("torch.nn.functional.dropout", gpu_dropout),
    ):
        yield


def gpu_dropout(
    x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    """A GPU keeps a dropout's mask in bytes, a CPU as numbers of what it drops."""
    return torch.native_dropout(x, p, training)[0] if p and training else x


def keep_input(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
    """bitsandbytes' 8-bit linears keep what they read until the graph goes."""
    if output.grad_fn is not None:
        output.grad_fn.metadata["input"] = inputs[0]
