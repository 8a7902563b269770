"""The activations and floating-point operations of a micro-batch, measured on the real model without its weights.

The model, its adapter and the real loss run on fake tensors, which have the shapes, dtypes and storages of a CPU's and
no memory: hooks see what autograd saves, and torch's formulas count each operation.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations import moe  # noqa: F401 - registers grouped_mm_fallback
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from cera_train.model.attention import BY_SEQUENCE
from cera_train.model.batches import Batch
from cera_train.model.loss import Allowed, SupervisedLoss, finish_logits
from cera_train.planning.count import build_adapter, build_base, failing_in_one_line, quantised_linears, remembered
from cera_train.settings.adapters import AdapterConfig
from cera_train.settings.model import Dtype, ModelConfig, Quantization

logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # logs what it raises


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one length, and how they are computed."""

    rows: int
    length: int
    supervised: float
    """Share of the tokens whose prediction counts."""
    is_flat: bool
    has_mask: bool
    """Attention gets a mask instead of running its causal path."""
    autocast: Dtype | None
    on_gpu: bool

    @property
    def tokens(self) -> int:
        return self.rows * self.length


class Cost(NamedTuple):
    saved_bytes: float = 0.0
    """What autograd holds between forward and backward, frozen weights not counted."""
    forward: float = 0.0
    """Floating-point operations. The loss takes the gradient at a frozen head in its forward pass."""
    backward: float = 0.0
    evaluation: float = 0.0
    """Floating-point operations of a forward pass without gradients."""
    layer_bytes: float = 0.0
    """The most that one layer adds to `saved_bytes`: with checkpointing, what its recomputation brings back."""


@remembered
def measure(model: ModelConfig, adapter: AdapterConfig, batch: MicroBatch, forward_only: bool = False) -> Cost:
    """The cost of one micro-batch in the whole model; with `forward_only` backward and evaluation are left at 0."""
    runner = Runner(model, adapter)
    runner.allowed = abilities(model)
    with failing_in_one_line(model, runner.base.config.model_type):
        return in_all_layers(runner.base, lambda: runner.run(batch, forward_only))


@remembered
def abilities(model: ModelConfig) -> Allowed:
    """What the loss would find out about an architecture by trying."""
    runner, found = Runner(model, None), {}

    def run() -> Cost:
        found["chunks_head"] = runner.applies_head_alone()
        return runner.run(MicroBatch(2, 8, 1.0, is_flat=True, has_mask=False, autocast=None, on_gpu=False), True)

    more_than_causal = contextlib.suppress(NotImplementedError, ImportError, TypeError)  # or it takes no lengths
    with failing_in_one_line(model, runner.base.config.model_type), more_than_causal:
        in_all_layers(runner.base, run)
        if runner.base.config._attn_implementation == BY_SEQUENCE and model.attn_implementation != "eager":
            found["attention"] = BY_SEQUENCE
    return Allowed(**found)


class Runner:
    """The real model and adapter on fake tensors."""

    def __init__(self, model: ModelConfig, adapter: AdapterConfig | None) -> None:
        self.base = build_base(model)
        self.attention = self.base.config._attn_implementation
        # bitsandbytes saves what an 8-bit linear reads.
        self.keep_their_inputs = quantised_linears(self.base) if model.quantization == Quantization.int8 else []
        self.model = self.base if adapter is None else build_adapter(self.base, adapter)
        self.allowed = Allowed(chunks_head=True)
        self.fake_mode = FakeTensorMode()
        made: dict[torch.Tensor, torch.Tensor] = {}  # a tied weight stays one
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            made[tensor] = FakeTensor(self.fake_mode, tensor.detach(), torch.device("cpu"))
            if isinstance(tensor, nn.Parameter):
                made[tensor] = nn.Parameter(made[tensor], tensor.requires_grad)
        for module in self.model.modules():
            for tensors in (module._parameters, module._buffers):
                tensors.update({name: made.get(tensor) for name, tensor in tensors.items()})
        self.weights = set(map(storage_of, made.values()))

    def run(self, batch: MicroBatch, forward_only: bool = False) -> Cost:
        """Forward, backward and evaluation with the layers that are there now."""
        attention = (IN_ONE_CALL if batch.on_gpu else BY_SEQUENCE) if batch.is_flat else WITHOUT_MASK
        self.base.set_attn_implementation(self.attention if batch.has_mask else attention)
        dtype = batch.autocast and getattr(torch, batch.autocast)
        loss = SupervisedLoss(self.model, self.base, lambda: torch.autocast("cpu", dtype, enabled=dtype is not None))
        loss.allowed = self.allowed
        for module in self.model.modules():
            if batch.on_gpu and type(module) is nn.Dropout:
                module.__class__ = GpuDropout
        with self.fake_mode, Operations() as operations:
            inputs = self._inputs(batch)
            with Saved(self.keep_their_inputs) as saved:
                value = loss.train()(inputs)
            forward, saved_bytes = operations.flops, saved.bytes_without(self.weights)
            if forward_only:
                return Cost(saved_bytes, forward)
            if value.requires_grad:
                value.backward()
                self.model.zero_grad()
            trained = operations.flops
            with torch.no_grad():
                loss.eval()(inputs)
        return Cost(saved_bytes, forward, trained - forward, operations.flops - trained)

    def _inputs(self, batch: MicroBatch) -> Batch:
        rows, length = (1, batch.tokens) if batch.is_flat else (batch.rows, batch.length)
        mask = None
        if batch.has_mask:  # four-dimensional, as transformers would make it by looking at values
            dtype = self.base.dtype if self.attention == "eager" else torch.bool
            mask = torch.zeros(rows, 1, length, length, dtype=dtype)
            if self.base.config.model_type == "bloom":  # counts positions by the mask as the user gives it
                mask = torch.ones(rows, length)
        return FakeBatch(
            torch.zeros(rows, length, dtype=torch.int64),
            Places(max(1, round(batch.tokens * batch.supervised))),
            torch.zeros(rows, length, dtype=torch.int64) if batch.is_flat else None,
            mask,
            [batch.length] * batch.rows if batch.is_flat and not batch.has_mask else None,
        )

    def applies_head_alone(self) -> bool:
        """Whether the model's logits are what its head gives, but for what `finish_logits` does."""
        self.base.set_attn_implementation(self.attention)
        given: list[torch.Tensor] = []
        head = self.base.get_output_embeddings()
        hook = head.register_forward_hook(lambda module, inputs, output: given.append(output))
        with self.fake_mode, Operations(), torch.no_grad():
            logits = self.base(input_ids=torch.zeros(1, 8, dtype=torch.int64), use_cache=False).logits
            is_finished = bool(given) and finish_logits(given[-1], self.base.config) is not given[-1]
        hook.remove()
        is_apart = self.base.get_decoder() is not self.base  # Llama 4's is the whole model
        return is_apart and bool(given) and (is_finished or storage_of(given[-1]) == storage_of(logits))


# --- all layers from a few -------------------------------------------------------------------------------------------


def in_all_layers(base: PreTrainedModel, run: Callable[[], Cost]) -> Cost:
    """The cost with every layer: one layer of each kind runs, and one more of a kind shows what each of them adds."""
    parent, name, layers = find_layers(base)
    kinds = layer_kinds(layers)
    counts = Counter(kinds)
    chosen = [kinds.index(kind) for kind in counts]
    several = [kind for kind in counts if counts[kind] > 1]

    def run_with(indices: list[int]) -> Cost:
        if layers:
            setattr(parent, name, nn.ModuleList([layers[index] for index in indices]))
        return run()

    if (1 + len(several)) * (len(chosen) + 1) > len(layers):
        cost = run_with(list(range(len(layers))))
        return cost._replace(layer_bytes=cost.saved_bytes / max(1, len(layers)))
    once = total = run_with(chosen)
    layer_bytes = 0.0
    for kind in several:
        second = kinds.index(kind, kinds.index(kind) + 1)  # not the first again: its 16-bit weights would be shared
        twice = run_with(sorted([*chosen, second]))
        added = Cost(*(more - less for more, less in zip(twice, once, strict=True)))
        total = Cost(*(value + (counts[kind] - 1) * more for value, more in zip(total, added, strict=True)))
        layer_bytes = max(layer_bytes, added.saved_bytes)
    return total._replace(layer_bytes=layer_bytes)


def find_layers(base: PreTrainedModel) -> tuple[nn.Module, str, list[nn.Module]]:
    """The decoder's list of layers: the module it is an attribute of, its name there, and the layers."""
    count = base.config.get_text_config().num_hidden_layers
    for parent in base.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return parent, name, list(child)
    return base, "", []


def layer_kinds(layers: list[nn.Module]) -> list[Any]:
    """What tells layers apart: their modules and shapes, and whether gradients end there, before it or after it."""
    trained = [any(weight.requires_grad for weight in layer.parameters()) for layer in layers]
    first = trained.index(True) if any(trained) else len(layers)

    def structure(layer: nn.Module) -> tuple:
        windows = [getattr(module, "sliding_window", None) for module in layer.modules()]
        weights = [(name, tuple(weight.shape), weight.requires_grad) for name, weight in layer.named_parameters()]
        return tuple(windows), tuple(weights)

    return [((index > first) - (index < first), structure(layer)) for index, layer in enumerate(layers)]


# --- fake tensors ----------------------------------------------------------------------------------------------------


def storage_of(tensor: torch.Tensor) -> int:
    """Tells storages apart: a fake one has no address."""
    return tensor.untyped_storage()._cdata


def half_if_causal(formula: Callable) -> Callable:
    """The formula of an attention kernel, which skips what a causal mask takes out."""
    return lambda *arguments, **settings: formula(*arguments, **settings) // (1 + any(it is True for it in arguments))


def grouped_flops(a: torch.Tensor, b: torch.Tensor, *arguments: Any, **settings: Any) -> int:
    """Operations of a grouped product: [S, in] with [E, in, out], or in backward [in, S] with [S, out]."""
    return 2 * a.numel() * b.shape[-1]


def both_gradients(a: torch.Tensor, b: torch.Tensor, *arguments: Any, **settings: Any) -> int:
    return 2 * grouped_flops(a, b)


def grouped_shape(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """What a grouped product returns. torch computes it for 32 bits too, but has the shapes for bfloat16 alone."""
    return a.new_empty(a.shape[0], b.shape[-1]) if b.ndim == 3 else a.new_empty(len(ends), a.shape[0], b.shape[-1])


ATEN = torch.ops.aten
FLASH = "_scaled_dot_product_flash_attention"
FORMULAS = flop_registry | {
    ATEN.addmm_: flop_registry[ATEN.addmm],
    ATEN._grouped_mm: grouped_flops,
    torch.ops.transformers.grouped_mm_fallback: grouped_flops,
}
if hasattr(torch.ops.transformers, "grouped_mm_fallback_backward"):  # transformers 5.10 has none
    FORMULAS[torch.ops.transformers.grouped_mm_fallback_backward] = both_gradients
FORMULAS |= {
    getattr(ATEN, f"{FLASH}_for_cpu{end}"): half_if_causal(flop_registry[getattr(ATEN, FLASH + end)])
    for end in ("", "_backward")
}
"""torch's formulas by operation: two operations for a multiply and add."""


class Operations(TorchDispatchMode):
    """Counts floating-point operations. A value that code reads is 0, such as a seed.

    torch's FlopCounterMode hooks modules too, which fails where the loss takes a gradient in its forward pass.
    """

    flops = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if operation is ATEN._local_scalar_dense.default:
            return 0
        is_grouped = operation is ATEN._grouped_mm.default
        output = grouped_shape(*args[:3]) if is_grouped else operation(*args, **(kwargs or {}))
        if (formula := FORMULAS.get(operation._overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=output)
        return output


class GpuDropout(nn.Dropout):
    """A GPU keeps a dropout's mask in bytes, a CPU as numbers of what it drops."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.native_dropout(x, self.p, self.training)[0] if self.p else x


@dataclass(eq=False)
class Held:
    """A tensor for as long as autograd holds it: the tensor itself may live on elsewhere."""

    tensor: torch.Tensor


class Saved(contextlib.ExitStack):
    """What autograd saves in the block, and the inputs of some modules. What is let go of in it does not count."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.held: weakref.WeakSet[Held] = weakref.WeakSet()
        self.inputs: list[Held] = []
        self.enter_context(torch.autograd.graph.saved_tensors_hooks(self._hold, lambda held: held.tensor))
        for module in modules:
            hook = module.register_forward_pre_hook(lambda module, inputs: self.inputs.append(self._hold(inputs[0])))
            self.callback(hook.remove)

    def _hold(self, tensor: torch.Tensor) -> Held:
        self.held.add(held := Held(tensor))
        return held

    def bytes_without(self, weights: set[int]) -> int:
        sizes = {storage_of(held.tensor): held.tensor.untyped_storage().nbytes() for held in self.held}
        return sum(size for storage, size in sizes.items() if storage not in weights)


class Places:
    """In place of a mask: the places of its True values. A fake mask has none, so nothing could be selected by it."""

    def __init__(self, count: int) -> None:
        self.places = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)

    def __getitem__(self, index: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self.places


class FakeBatch(Batch):
    """A batch that hands over its sequences' lengths under whatever name attention runs."""

    @property
    def inputs(self) -> dict[str, Any]:
        return super().inputs | ({"sequence_lengths": self.sequence_lengths} if self.sequence_lengths else {})


def attend_in_one_call(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None, **settings: Any
) -> tuple[torch.Tensor, None]:
    """FlashAttention as on a GPU over sequences of one length: it saves its inputs, its output and a number a token."""
    count, scale = len(settings["sequence_lengths"]), settings.get("scaling")
    rows = [heads[0].unflatten(1, (count, -1)).transpose(0, 1) for heads in (query, key, value)]
    output = nn.functional.scaled_dot_product_attention(*rows, is_causal=True, scale=scale, enable_gqa=True)
    return output.transpose(1, 2).flatten(0, 1)[None], None


IN_ONE_CALL, WITHOUT_MASK = "planned_in_one_call", "planned_without_mask"
"""Names under which transformers makes no mask. Under its names it looks at values, and masks whatever is fake."""

AttentionInterface.register(IN_ONE_CALL, attend_in_one_call)
AttentionInterface.register(WITHOUT_MASK, sdpa_attention_forward)
