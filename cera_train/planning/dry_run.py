"""An update of the run itself, without weights: its base on the meta device, which has shapes
alone, then the update on fake tensors, which have storages too and no memory.

Base, adapter, loss, layout and optimizer are those of training. The fake tensors lie on the CPU,
where torch takes them without a GPU; `choices_of_a_gpu` holds what a GPU does differently.
"""

import contextlib
import copy
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cera_train.adapters.build import (
    build,
    check_quantised,
    parameter_counts,
    parameter_groups,
)
from cera_train.cera.coverage import bypassed_projections, idle_projections
from cera_train.common.errors import UserError
from cera_train.common.files import config_dir
from cera_train.distributed.accelerator import quiet_libraries
from cera_train.model import language_model as language_models
from cera_train.model import layout as batch_layout
from cera_train.model.attention import attention_of
from cera_train.model.batches import Batch, predicted_places
from cera_train.model.folder import load_architecture
from cera_train.model.language_model import Allowed, LanguageModel, chunk_tokens
from cera_train.model.layout import choose_layout
from cera_train.model.lean import keep_less
from cera_train.model.precision import choose_precision
from cera_train.model.weights import (
    attention_for,
    auto_class,
    layer_classes,
    mixes_sequences,
)
from cera_train.planning.data_size import DataSize
from cera_train.planning.meter import Meter, Reading, allocated
from cera_train.settings.distributed import Strategy
from cera_train.settings.model import ModelConfig, Quantization
from cera_train.settings.run import Config, PlanRun
from cera_train.settings.training import BatchLayout
from cera_train.training.optimizer import build_optimizer

logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # it also raises

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Bits of a weight: 4, an 8-bit scale for 64 weights, and a 32-bit scale for 256 of those (double
quantisation)."""

ROW_SPREAD = 0.4
"""Standard deviation of the tokens in a row over their mean: 0.36 on GSM8K, 0.43 on OpenOrca. The
largest of many updates is taken to be three standard deviations above the mean."""

PROCESS_BYTES = 610_000_000
"""Resident memory of Python, torch, transformers, peft and pandas, a tokenizer loaded and no model
(on Linux)."""

CUDA_BUILD_BYTES = 320_000_000
"""Resident memory that a torch built for CUDA, as PyPI's is on x86-64, adds on a machine without a
GPU."""

# on a CPU, freed blocks below 32 MB stay with the C library's heap, and its gaps add about this
# share
HEAP_SHARE = 0.4


# --- the base -------------------------------------------------------------------------------------


def trainable_parameters(config: Config) -> int:
    with torch.device("meta"):
        return parameter_counts(build(build_base(config.model), config.adapter, idle=[]))[0]


def build_base(model: ModelConfig) -> PreTrainedModel:
    """The frozen base as `load_model` gives it, on the meta device."""
    quiet_libraries()
    architecture = architecture_of(model)
    if architecture.is_encoder_decoder:
        raise UserError(
            f"model.path={model.path} is an encoder-decoder ({architecture.model_type}), and "
            "cera-train trains decoder-only language models. Choose one of those."
        )
    # Flash kernels may need a package or a GPU that this machine lacks; sdpa keeps as much.
    wanted = "eager" if model.attn_implementation == "eager" else "sdpa"
    dtype = getattr(torch, choose_precision(model.dtype, cuda=False).value)
    with errors_of_architecture(model, architecture.model_type), torch.device("meta"):
        base = auto_class(architecture).from_config(
            architecture,
            dtype=dtype,
            attn_implementation=attention_for(architecture, wanted),
            trust_remote_code=model.trust_remote_code,
        )
    base.requires_grad_(False)
    keep_less(base)
    # Before the adapter: PEFT then lets gradients reach the first layer's input.
    if model.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    return base


def architecture_of(model: ModelConfig) -> PretrainedConfig:
    """The config.json of conf/model, else that of `model.path`."""
    if model.facts is not None and model.facts.config is not None:
        text = (config_dir("conf") / "model" / model.facts.config).read_text()
        return AutoConfig.for_model(**json.loads(text))
    return load_architecture(model)


@contextlib.contextmanager
def errors_of_architecture(model: ModelConfig, model_type: str) -> Iterator[None]:
    """Turns any error that the code of an architecture raises without weights into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split("\n")[0].split())
        raise UserError(
            f"model.path={model.path}: cera-plan cannot run a model of type {model_type} without "
            f"its weights ({type(error).__name__}: {reason})."
        ) from error


def stored_sizes(base: PreTrainedModel, quantization: Quantization) -> dict[nn.Parameter, float]:
    """Bytes of each weight of the base as it is stored."""
    sizes: dict[nn.Parameter, float] = {weight: weight.nbytes for weight in base.parameters()}
    for linear in quantised_linears(base, quantization):
        numbers = linear.weight.numel()
        if quantization == Quantization.nf4:
            sizes[linear.weight] = numbers * NF4_BITS / 8
        else:  # a byte a weight, and a float32 scale a row
            sizes[linear.weight] = numbers + 4 * len(linear.weight)
    return sizes


def quantised_linears(base: PreTrainedModel, quantization: Quantization) -> list[nn.Module]:
    """The linears that bitsandbytes quantises: all but the head and those whose weights the model
    reads directly."""
    if quantization == Quantization.none:
        return []
    head = base.get_output_embeddings()
    bypassed = {name.rpartition(".")[2] for name in bypassed_projections(base)}
    return [
        module
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not head
        and name.rpartition(".")[2] not in bypassed
    ]


# --- the update -----------------------------------------------------------------------------------


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


class Cost(NamedTuple):
    """What one micro-batch takes, by stage of an update."""

    forward: Reading  # with the gradient at a frozen head, which the loss takes here
    backward: Reading
    step: Reading
    evaluation: Reading

    @property
    def peak(self) -> float:
        """Bytes, in training."""
        return max(self.forward.peak, self.backward.peak, self.step.peak)


ALLOWED: dict[str, Allowed] = {}
"""What each base allows under a method, once a process: probing takes half of a dry run."""


class DryRun:
    """The model, loss and optimizer of a run.

    Args:
        config: with a decided `model.dtype`.
    """

    def __init__(self, config: PlanRun) -> None:
        self.config = config
        check_quantised(config.adapter, config.model.quantization, config.plan.on_gpu)
        self.base = build_base(config.model)
        stored = stored_sizes(self.base, config.model.quantization)
        self.layer_bytes, self.outside_bytes = sizes_by_place(self.base, stored)
        """Bytes of the weights of a layer, and of those outside the layers."""
        if config.model.quantization == Quantization.int8:
            for linear in quantised_linears(self.base, config.model.quantization):
                linear.register_forward_hook(keep_input)
        layout = config.train.batch_layout
        if layout == BatchLayout.auto and mixes_sequences(self.base):
            layout = BatchLayout.padded

        autocast = config.model.autocast_dtype(config.train.autocast, config.plan.on_gpu)
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.meter = Meter()
        idle = self._idle_projections()
        with torch.device("meta"):
            self.model = build(self.base, config.adapter, idle, autocast is not None).train()
        self.trainable, self.total = parameter_counts(self.model)
        self.meter = Meter()
        self._make_fake(self.model, stored)
        self.trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        model_bytes = self.meter.alive

        self.optimizer = self._build_optimizer()
        dtype = None if autocast is None else getattr(torch, autocast)
        self.language_model = LanguageModel(
            self.model, self.base, lambda: torch.autocast("cpu", dtype, enabled=dtype is not None)
        )
        with self.running():
            self._choose_layout(layout)
            self._fill_gradients()
            self.optimizer.step()  # makes the optimizer's states
            self.optimizer.zero_grad()
        adapter = sum(allocated(weight.nbytes) for weight in self.trained)
        self.memory = {
            "weights": model_bytes - adapter,
            "adapter": adapter,
            "optimizer": self.meter.alive - model_bytes,
        }
        """Bytes by part that a process holds between updates."""

    def _idle_projections(self) -> list[str]:
        """Those of a copy of the base, since PEFT moves no fake weights."""
        if self.config.adapter.target_modules != "all-linear":
            return []
        base = copy.deepcopy(self.base)
        self._make_fake(base, {})
        with self.running():
            return idle_projections(base)

    def _make_fake(self, model: nn.Module, stored: dict[nn.Parameter, float]) -> None:
        """Puts fake tensors in the place of a model's. A tied weight stays one."""
        fakes: dict[torch.Tensor, torch.Tensor] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            # A few buffers are on the CPU even of a model on the meta device.
            fake = FakeTensor(self.fake_mode, tensor.detach().to("meta"), torch.device("cpu"))
            if isinstance(tensor, nn.Parameter):
                fakes[tensor] = nn.Parameter(fake, tensor.requires_grad)
            else:
                fakes[tensor] = fake
            self.meter.hold(fake, None if tensor.requires_grad else stored.get(tensor))
        for module in model.modules():
            parameters = module.named_parameters(recurse=False, remove_duplicate=False)
            buffers = module.named_buffers(recurse=False, remove_duplicate=False)
            for name, tensor in [*parameters, *buffers]:
                setattr(module, name, fakes[tensor])

    def _build_optimizer(self) -> torch.optim.Optimizer:
        kind = self.config.optimizer.kind
        if self.config.plan.on_gpu:  # paged states take as many bytes
            kind = kind.removeprefix("paged_")
        any_rate = 1.0  # nothing is trained
        settings = replace(self.config.optimizer, kind=kind, lr=any_rate)
        groups = parameter_groups(self.model, self.config.adapter)
        optimizer = build_optimizer(groups, settings, torch.device("cpu"))
        if self.config.plan.on_gpu and "foreach" in optimizer.defaults:
            for group in optimizer.param_groups:
                group["foreach"] = True
        return optimizer

    def _choose_layout(self, wanted: BatchLayout) -> None:
        on_gpu = self.config.plan.on_gpu
        adapter = self.config.adapter
        method = (adapter.kind, adapter.method, adapter.target_modules)
        probed = repr((self.config.model, method, on_gpu))
        device = torch.device("cuda" if on_gpu else "cpu")
        choose_layout(wanted, self.language_model, device, ALLOWED.get(probed))
        ALLOWED[probed] = self.language_model.allowed

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Runs the block on fake tensors, as on the planned device."""
        # transformers masks every fake tensor without reading it: let it read the meter's values.
        sees_values = patch("transformers.masking_utils.is_tracing", lambda tensor=None: False)
        device = choices_of_a_gpu() if self.config.plan.on_gpu else contextlib.nullcontext()
        errors = errors_of_architecture(self.config.model, self.base.config.model_type)
        with errors, sees_values, device, self.fake_mode, self.meter:
            yield

    def cost(self, batch: MicroBatch, accumulates: bool) -> Cost:
        """The cost of an update that ends with this micro-batch, and of its evaluation.

        Args:
            accumulates: earlier micro-batches of the update have left gradients.
        """
        meter = self.meter
        with self.running():
            inputs = self._inputs(batch)
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
            return Cost(forward, backward, step, self._evaluate(inputs))

    def evaluation(self, batch: MicroBatch) -> Reading:
        """What a micro-batch of held-out rows takes."""
        with self.running():
            inputs = self._inputs(batch)
            self.meter.read()
            return self._evaluate(inputs)

    def _evaluate(self, inputs: Batch) -> Reading:
        with torch.no_grad():
            self.language_model.eval()(inputs).sum()
        return self.meter.read()

    def _fill_gradients(self) -> None:
        for weight in self.trained:
            weight.grad = torch.zeros_like(weight)

    def _inputs(self, batch: MicroBatch) -> Batch:
        self.meter.supervised = max(1, round(batch.tokens * batch.supervised))
        self.meter.skips_mask = not batch.has_mask
        shape = (1, batch.tokens) if self.language_model.is_flat else (batch.rows, batch.length)
        ids = torch.zeros(shape, dtype=torch.int64)
        ones = torch.zeros(shape, dtype=torch.int64)
        loss_mask = torch.zeros(shape, dtype=torch.bool)
        predicted = predicted_places(loss_mask)
        if self.language_model.is_flat:
            lengths = [batch.length] * batch.rows
            return Batch(ids, loss_mask, predicted, position_ids=ones, sequence_lengths=lengths)
        mask = ones if batch.has_mask else None
        return Batch(ids, loss_mask, predicted, attention_mask=mask)


def sizes_by_place(base: PreTrainedModel, stored: dict[nn.Parameter, float]) -> tuple[float, float]:
    """Bytes of the weights of a layer, in the mean, and of all weights outside the layers."""
    classes = layer_classes(base)
    layers = [module for module in base.modules() if type(module).__name__ in classes]
    inside = sum(stored[weight] for layer in layers for weight in layer.parameters())
    return inside / max(1, len(layers)), sum(stored.values()) - inside


def rows_of_process(config: PlanRun, size: DataSize) -> int:
    """The most sequences of an update that one process takes."""
    rows = min(config.train.batch_size, size.train_rows)
    return math.ceil(config.sequences * rows / config.plan.gpus)


def micro_batches(run: DryRun, size: DataSize) -> tuple[MicroBatch, MicroBatch]:
    """The largest micro-batch of one process, which needs the most memory, and a usual one, which
    takes the time.

    Args:
        size: of what updates train on.
    """
    config = run.config
    train = config.train
    is_flat = run.language_model.is_flat
    has_mask = run.language_model.allowed.attention is None if is_flat else not size.is_even
    if attention_of(run.base.config) == "eager":
        has_mask = True

    rows = rows_of_process(config, size)
    max_length = config.data.max_length + config.work.answer_tokens
    spread = 0.0 if size.is_even else 3 * ROW_SPREAD / math.sqrt(rows)
    most_tokens = rows * min(size.tokens_per_row * (1 + spread), max_length)
    longest = size.tokens_per_row if is_flat or size.is_even else max_length

    def batch(tokens: float, length: float) -> MicroBatch:
        tokens = min(tokens, train.micro_batch_tokens)
        rows = max(1, round(tokens / length))
        return MicroBatch(rows, max(2, round(tokens / rows)), size.supervised, has_mask)

    return batch(most_tokens, longest), batch(rows * size.tokens_per_row, size.tokens_per_row)


def filled(batch: MicroBatch, tokens: int) -> MicroBatch:
    """The micro-batch with as many more of its rows as these tokens hold."""
    return replace(batch, rows=max(batch.rows, tokens // batch.length))


def memory_by_part(run: DryRun, peak: float) -> dict[str, float]:
    """Bytes of one process at the peak of an update: on a GPU what torch allocates, on a CPU what
    is resident."""
    processes = run.config.plan.gpus
    activations = peak - sum(run.memory.values())
    parts = dict(run.memory)
    if processes > 1 and run.config.distributed.strategy == Strategy.fsdp:
        parts = {name: size / processes for name, size in parts.items()}
        # FSDP2 gathers into a buffer and copies from there: as the first layer begins, what is
        # outside the layers is in memory twice. Later the buffer holds the next layer.
        twice = max(0, run.outside_bytes - activations)
        parts["gathered"] = run.outside_bytes + 2 * run.layer_bytes + twice
    elif processes > 1:
        parts["buckets"] = parts["adapter"]  # gradients a second time, as DDP sends them
    if not run.config.plan.on_gpu:
        parts["libraries"] = PROCESS_BYTES
        if torch.version.cuda:
            parts["libraries"] += CUDA_BUILD_BYTES
        parts["heap's gaps"] = HEAP_SHARE * activations
    parts["gradients, activations"] = activations
    return parts


# --- what a GPU does differently ------------------------------------------------------------------


@contextlib.contextmanager
def choices_of_a_gpu() -> Iterator[None]:
    """Larger chunks of logits, FlashAttention's variable-length kernel in 16 bits, and dropout
    masks in bytes."""
    with (
        patch.object(language_models, "chunk_tokens", lambda on_gpu: chunk_tokens(on_gpu=True)),
        patch.object(batch_layout, "kernel_may_run", lambda device, dtype: dtype.itemsize == 2),
        patch("torch.nn.functional.dropout", gpu_dropout),
    ):
        yield


def gpu_dropout(
    x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    """A GPU keeps a dropout mask in bytes, a CPU in numbers of the input's dtype."""
    return torch.native_dropout(x, p, training)[0] if p and training else x


def keep_input(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
    """bitsandbytes' 8-bit linears keep their inputs until the graph is freed."""
    if output.grad_fn is not None:
        output.grad_fn.metadata["input"] = inputs[0]
