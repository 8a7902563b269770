"""A run's parameters, activations and floating-point operations, measured on the real model without its weights.

The model and its adapter are built on the meta device and counted there. A micro-batch then goes through the real loss
on fake tensors: they have the shapes, dtypes and storages of a CPU's, and no memory. Their hooks show what autograd
saves, and every operation is counted by torch's own formulas.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.pytorch_utils import Conv1D

from cera_train.attention import BY_SEQUENCE
from cera_train.config import AdapterConfig, Dtype, ModelConfig, Quantization
from cera_train.data.batches import Batch
from cera_train.errors import UserError
from cera_train.loss import SupervisedLoss
from cera_train.model import add_adapter, positions_of
from cera_train.planning.config_json import read_config
from cera_train.runtime import quiet_libraries

aten = torch.ops.aten
logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # logs what it raises

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Bits of a weight: 4, an 8-bit scale for 64 weights, and a 32-bit scale for 256 of those (double quantisation)."""

FORMULAS = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}
"""torch's formulas by operation: two operations for a multiply and add, the whole square of causal attention."""

CACHE: dict[str, Any] = {}


def remembered(function: Callable) -> Callable:
    """Keeps results by the text of the arguments: the jobs of a sweep and the remedies of a plan share most of them."""

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        key = f"{function.__name__}{arguments!r}"
        if key not in CACHE:
            CACHE[key] = function(*arguments)
        return CACHE[key]

    return call


# --- parameters ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameters:
    frozen: dict[str, int]
    """Parameters of the base by kind of module."""
    adapter: dict[str, int]
    """Trainable parameters by target."""
    trainable_tensors: list[int]
    weight_bytes: float
    """The base's weights at their precision."""
    vocab_size: int
    """Rows of the head."""
    trains_head: bool
    positions: int | None
    """Tokens that the model has places for. None: no limit."""

    @property
    def trainable(self) -> int:
        return sum(self.trainable_tensors)

    @property
    def share(self) -> float:
        """Trainable parameters as a share of all."""
        return self.trainable / (self.trainable + sum(self.frozen.values()))


@remembered
def count_parameters(model: ModelConfig, adapter: AdapterConfig) -> Parameters:
    """Builds the base and the adapter on the meta device and counts them.

    Raises:
        UserError: the architecture is unknown or no causal language model, or a target matches no module.
    """
    base = build_base(model)
    frozen, weight_bytes = frozen_parameters(base), base_bytes(base, model.quantization)
    vocab_size = base.get_output_embeddings().weight.shape[0]
    adapted = build_adapter(base, adapter)
    tensors = [parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad]
    trains_head = any(parameter.requires_grad for parameter in base.get_output_embeddings().parameters())
    return Parameters(
        frozen=frozen,
        adapter=trainable_by_target(adapted),
        trainable_tensors=tensors,
        weight_bytes=weight_bytes,
        vocab_size=vocab_size,
        trains_head=trains_head,
        positions=positions_of(base.config),
    )


def build_base(model: ModelConfig) -> PreTrainedModel:
    """The base model on the meta device, frozen."""
    quiet_libraries()
    config = read_config(model)
    if config.is_encoder_decoder:
        raise UserError(
            f"model.path={model.path} is an encoder-decoder ({config.model_type}): cera-train trains decoder-only "
            "language models. Choose one of those."
        )
    # Any other implementation may need a package or a GPU that this machine lacks; `attention_of` stands in for it.
    attention = "eager" if model.attn_implementation == "eager" else "sdpa"
    try:
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, model.dtype), attn_implementation=attention
            )
    except Exception as error:  # whatever the code of an architecture raises
        if "attention implementation" in str(error):
            raise UserError(
                f"model.attn_implementation={model.attn_implementation}: a model of type {config.model_type} does not "
                "support it. Set model.attn_implementation=eager."
            ) from error
        raise cannot_run(model, config.model_type, "built", error) from error
    base.requires_grad_(False)
    if model.gradient_checkpointing:  # before the adapter, as in training: PEFT then lets gradients reach the input
        base.gradient_checkpointing_enable({"use_reentrant": False})
    return base


def build_adapter(base: PreTrainedModel, adapter: AdapterConfig) -> nn.Module:
    with torch.device("meta"):
        return add_adapter(base, adapter).train()


def cannot_run(model: ModelConfig, model_type: str, what: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split("\n")[0].split())
    return UserError(
        f"model.path={model.path}: a model of type {model_type} cannot be {what} without its weights "
        f"({type(error).__name__}: {reason}). cera-plan cannot plan it."
    )


def frozen_parameters(base: PreTrainedModel) -> dict[str, int]:
    """The base's parameters by kind of module. A tied head has none: they count as the embeddings'."""
    counts: Counter[str] = Counter()
    seen: set[int] = set()
    for name, module in base.named_modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                counts[_kind(name, module, base)] += parameter.numel()
    return dict(counts) | {"head": counts["head"]}


def _kind(name: str, module: nn.Module, base: PreTrainedModel) -> str:
    """A row of the table for a module: what it is where that is common to all architectures, else its name."""
    *path, last = name.split(".")
    if module is base.get_output_embeddings():
        return "head"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if "norm" in type(module).__name__.lower():
        return "norms"
    if any(part in ("mlp", "experts", "feed_forward") for part in (*path, last)):
        return "MLP"
    return f"attention {last}" if any("attn" in part or "attention" in part for part in path) else last


def trainable_by_target(adapted: nn.Module) -> dict[str, int]:
    """Trainable parameters by the last name of the module they adapt, or are in."""
    targets = {name for name, module in adapted.named_modules() if isinstance(module, BaseTunerLayer)}
    counts: Counter[str] = Counter()
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            owners = [name[:end] for end in range(len(name)) if name[end] == "."]
            owner = next((owner for owner in reversed(owners) if owner in targets), owners[-1])
            counts[owner.rpartition(".")[2]] += parameter.numel()
    return dict(counts)


def quantised_linears(base: PreTrainedModel) -> list[nn.Module]:
    """The linears that bitsandbytes quantises: all but the head."""
    head = base.get_output_embeddings()
    return [module for module in base.modules() if isinstance(module, (nn.Linear, Conv1D)) and module is not head]


def base_bytes(base: PreTrainedModel, quantization: Quantization) -> float:
    whole = sum(parameter.numel() * parameter.element_size() for parameter in base.parameters())
    weights = [module.weight for module in quantised_linears(base)]
    unquantised = whole - sum(weight.numel() * weight.element_size() for weight in weights)
    numbers = sum(weight.numel() for weight in weights)
    if quantization == Quantization.nf4:
        return unquantised + numbers * NF4_BITS / 8
    if quantization == Quantization.int8:  # a float32 scale for every row
        return unquantised + numbers + 4 * sum(weight.shape[0] for weight in weights)
    return whole


# --- a micro-batch ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch of rows of one length, and how it is computed."""

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
    saved_bytes: float
    """What autograd holds between forward and backward, frozen weights not counted."""
    forward: float
    """Floating-point operations. The loss takes the gradient at a frozen head in its forward pass."""
    backward: float
    largest_layer_bytes: float
    """The part of `saved_bytes` that one layer holds. With checkpointing it is there while the layer is recomputed."""


class Pass(NamedTuple):
    has_gradient: bool = True
    has_backward: bool = False


def measure(model: ModelConfig, adapter: AdapterConfig, batch: MicroBatch, wanted: Pass) -> Cost:
    """The cost of one micro-batch in the whole model.

    Layers that are alike cost alike: one of each kind runs, and one more of each kind shows what it adds.

    Raises:
        UserError: the model's code needs the values of a tensor.
    """
    is_alike = model.quantization == Quantization.nf4  # 4-bit linears save what 16-bit ones save
    return _measure(replace(model, quantization=Quantization.none) if is_alike else model, adapter, batch, wanted)


@remembered
def _measure(model: ModelConfig, adapter: AdapterConfig, batch: MicroBatch, wanted: Pass) -> Cost:
    runner = Runner(model, adapter)
    try:
        return runner.in_all_layers(lambda: runner.run(batch, wanted))
    except Exception as error:  # whatever the code of an architecture raises
        raise cannot_run(model, runner.base.config.model_type, "run", error) from error


class Abilities(NamedTuple):
    attends_by_sequence: bool
    """Attention may run over each sequence of a flat row by itself."""
    chunks_head: bool
    """The logits are what the head gives, unchanged: the loss may apply the head itself, to a chunk at a time."""


@remembered
def abilities(model: ModelConfig) -> Abilities:
    """What the loss would find out about an architecture by trying.

    Raises:
        UserError: the model's code needs the values of a tensor.
    """
    runner = Runner(model, None)
    try:
        chunks_head = runner.applies_head_alone()
        # As in training: its attention is more than causal, or takes no lengths.
        with contextlib.suppress(NotImplementedError, ImportError, TypeError):
            runner.run(MicroBatch(2, 8, 1.0, True, False, None, False), Pass(has_gradient=False))
            is_set = runner.base.config._attn_implementation == BY_SEQUENCE
            return Abilities(is_set and model.attn_implementation != "eager", chunks_head)
    except Exception as error:  # whatever the code of an architecture raises
        raise cannot_run(model, runner.base.config.model_type, "run", error) from error
    return Abilities(False, chunks_head)


class Runner:
    """The real model and adapter on fake tensors."""

    def __init__(self, model: ModelConfig, adapter: AdapterConfig | None) -> None:
        self.keeps_inputs = model.quantization == Quantization.int8
        self.base = build_base(model)
        self.linears = quantised_linears(self.base)
        self.model = self.base if adapter is None else build_adapter(self.base, adapter)
        self.attention = self.base.config._attn_implementation
        self.fake_mode = FakeTensorMode()
        self._make_fake()
        self.weights = {id_of(tensor) for tensor in (*self.model.parameters(), *self.model.buffers())}
        self.chunks_head = adapter is None or abilities(model).chunks_head

    def _make_fake(self) -> None:
        made: dict[int, torch.Tensor] = {}  # a tied weight stays one

        def fake(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in made:
                made[id(tensor)] = FakeTensor(self.fake_mode, tensor.detach(), torch.device("cpu"))
                if isinstance(tensor, nn.Parameter):
                    made[id(tensor)] = nn.Parameter(made[id(tensor)], tensor.requires_grad)
            return made[id(tensor)]

        originals = [*self.model.parameters(), *self.model.buffers()]  # none may be freed, or its id comes again
        for module in self.model.modules():
            for tensors in (module._parameters, module._buffers):
                tensors.update({name: fake(tensor) for name, tensor in tensors.items() if tensor is not None})
        del originals

    def run(self, batch: MicroBatch, wanted: Pass) -> Cost:
        """Forward and backward with the layers that are there now."""
        attention = (IN_ONE_CALL if batch.on_gpu else BY_SEQUENCE) if batch.is_flat else WITHOUT_MASK
        self.base.set_attn_implementation(self.attention if batch.has_mask else attention)
        self.model.train(wanted.has_gradient)
        dtype = batch.autocast and getattr(torch, batch.autocast)
        loss = SupervisedLoss(self.model, self.base, lambda: torch.autocast("cpu", dtype, enabled=dtype is not None))
        loss.chunks_head = self.chunks_head
        on_device = GpuDropout() if batch.on_gpu else contextlib.nullcontext()
        with self.fake_mode, Operations() as operations, on_device, torch.set_grad_enabled(wanted.has_gradient):
            with Saved(self.linears if self.keeps_inputs else []) as saved:
                value = loss(self.inputs(batch))
            forward, saved_bytes = operations.flops, saved.bytes_without(self.weights)
            if wanted.has_backward:
                value.backward()
                self.model.zero_grad()
        return Cost(saved_bytes, forward, operations.flops - forward, 0.0)

    def inputs(self, batch: MicroBatch) -> Batch:
        rows, length = (1, batch.tokens) if batch.is_flat else (batch.rows, batch.length)
        mask = None
        if batch.has_mask:  # four-dimensional, as transformers' own code would make it by looking at values
            is_eager = self.attention == "eager"
            mask = torch.zeros(rows, 1, length, length, dtype=self.base.dtype if is_eager else torch.bool)
        return FakeBatch(
            torch.zeros(rows, length, dtype=torch.int64),
            Places(max(1, round(batch.tokens * batch.supervised))),
            torch.zeros(rows, length, dtype=torch.int64) if batch.is_flat else None,
            mask,
            [batch.length] * batch.rows if batch.is_flat and not batch.has_mask else None,
        )

    def applies_head_alone(self) -> bool:
        """Whether the model returns what its head gives."""
        given: list[torch.Tensor] = []
        head = self.base.get_output_embeddings()
        hook = head.register_forward_hook(lambda module, inputs, output: given.append(output))
        with self.fake_mode, Operations(), torch.no_grad():
            logits = self.base(input_ids=torch.zeros(1, 8, dtype=torch.int64), use_cache=False).logits
        hook.remove()
        return bool(given) and id_of(given[-1]) == id_of(logits)

    def in_all_layers(self, run: Callable[[], Cost]) -> Cost:
        """The cost with every layer, from runs with a few."""
        parent, name, layers = find_layers(self.base)
        kinds = layer_kinds(layers)
        counts = Counter(kinds)
        chosen = [kinds.index(kind) for kind in counts]
        several = [kind for kind in counts if counts[kind] > 1]

        def run_with(indices: list[int]) -> Cost:
            setattr(parent, name, nn.ModuleList([layers[index] for index in indices]))
            return run()

        if (1 + len(several)) * (len(chosen) + 1) > len(layers):
            cost = run_with(list(range(len(layers))))
            return cost._replace(largest_layer_bytes=cost.saved_bytes / max(1, len(layers)))
        once = run_with(chosen)
        total, largest = list(once), 0.0
        for kind in several:
            twice = run_with(sorted([*chosen, kinds.index(kind)]))
            added = [more - less for more, less in zip(twice, once, strict=True)]
            total = [value + (counts[kind] - 1) * add for value, add in zip(total, added, strict=True)]
            largest = max(largest, added[0])
        return Cost(*total)._replace(largest_layer_bytes=largest)


def find_layers(base: PreTrainedModel) -> tuple[nn.Module, str, list[nn.Module]]:
    """The decoder's list of layers: the module it is an attribute of, its name there, and the layers."""
    count = base.config.get_text_config().num_hidden_layers
    for parent in base.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return parent, name, list(child)
    return nn.Module(), "layers", []


def layer_kinds(layers: list[nn.Module]) -> list[Any]:
    """What tells layers apart: their modules and shapes, and whether gradients end there, before it or after it."""
    trained = [any(weight.requires_grad for weight in layer.parameters()) for layer in layers]
    first = trained.index(True) if any(trained) else len(layers)

    def structure(layer: nn.Module) -> tuple:
        config = getattr(layer, "layer_type", getattr(layer, "attention_type", None))
        windows = [getattr(module, "sliding_window", None) for module in layer.modules()]
        weights = [(name, tuple(weight.shape), weight.requires_grad) for name, weight in layer.named_parameters()]
        return (config, tuple(windows), tuple(weights))

    return [((index > first) - (index < first), structure(layer)) for index, layer in enumerate(layers)]


# --- fake tensors ----------------------------------------------------------------------------------------------------


def id_of(tensor: torch.Tensor) -> int:
    """Tells storages apart. A fake one has no address."""
    return tensor.untyped_storage()._cdata


class Operations(TorchDispatchMode):
    """Counts floating-point operations. A value that code reads is 0: a seed, or whether a mask may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if operation is aten._local_scalar_dense.default:
            return 0
        output = operation(*args, **(kwargs or {}))
        formula = FORMULAS.get(operation._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=output)
        return output


class GpuDropout(TorchFunctionMode):
    """A GPU keeps a dropout's mask in bytes, a CPU as numbers of what it drops."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is nn.functional.dropout and (kwargs or {}).get("training", True):
            return torch.native_dropout(args[0], (kwargs or {}).get("p", args[1] if len(args) > 1 else 0.5), True)[0]
        return function(*args, **(kwargs or {}))


class Held:
    """A tensor that autograd holds."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


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

    def bytes_without(self, storages: set[int]) -> int:
        sizes = {id_of(held.tensor): held.tensor.untyped_storage().nbytes() for held in self.held}
        return sum(size for storage, size in sizes.items() if storage not in storages)


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
        lengths = {} if self.sequence_lengths is None else {"sequence_lengths": self.sequence_lengths}
        return super().inputs | lengths


IN_ONE_CALL, WITHOUT_MASK = "planned_in_one_call", "planned_without_mask"
"""Names under which transformers makes no mask. For its own it looks at values, and a fake tensor always gets one."""


def attend_in_one_call(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    sequence_lengths: list[int],
    scaling: float | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """FlashAttention as on a GPU over sequences of one length: it saves its inputs, its output and a sum a token."""
    rows = [heads[0].unflatten(1, (len(sequence_lengths), -1)).transpose(0, 1) for heads in (query, key, value)]
    output = nn.functional.scaled_dot_product_attention(*rows, is_causal=True, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2).flatten(0, 1)[None], None


AttentionInterface.register(IN_ONE_CALL, attend_in_one_call)
AttentionInterface.register(WITHOUT_MASK, sdpa_attention_forward)
