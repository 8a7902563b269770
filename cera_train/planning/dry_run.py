"""An update of the run itself, without weights: its base on the meta device, which has shapes
alone, then the update on fake tensors, which have storages too and no memory.

Base, adapter, loss, layout and optimizer are those of training. The fake tensors lie on the CPU,
where torch takes them without a GPU; what a GPU does differently follows from the planned device.
"""

import contextlib
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from transformers import (
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from cera_train.adapters.build import build, parameter_counts, parameter_groups
from cera_train.common.errors import UserError
from cera_train.common.files import config_dir
from cera_train.distributed.accelerator import quiet_libraries
from cera_train.model.batches import Batch, flat_batch, padded_batch
from cera_train.model.folder import load_architecture
from cera_train.model.language_model import LanguageModel
from cera_train.model.layout import choose_layout
from cera_train.model.precision import choose_precision
from cera_train.model.weights import (
    attention_for,
    auto_class,
    freeze,
    layer_classes,
    mixes_sequences,
    unquantised,
)
from cera_train.planning.data_size import DataSize
from cera_train.planning.meter import Meter, Reading, allocated
from cera_train.settings.distributed import Strategy
from cera_train.settings.model import ModelConfig, Quantization
from cera_train.settings.run import Config, PlanRun
from cera_train.training.optimizer import build_optimizer

logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # it also raises

CPU = torch.device("cpu")

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Bits of a weight: 4, an 8-bit scale for 64 weights, and a 32-bit scale for 256 of those (double
quantisation)."""

SCANNED = 32
"""Longest planned row of a model that loops over tokens in Python: as many tokens in more rows
cost the same, and a plan takes seconds instead of minutes."""

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
    # Flash kernels may need a package or a GPU that this machine lacks; sdpa keeps as much.
    dtype = getattr(torch, choose_precision(model.dtype, CPU).value)
    with errors_without_weights(model), torch.device("meta"):
        base = auto_class(architecture).from_config(
            architecture,
            dtype=dtype,
            attn_implementation=attention_for(architecture),
            trust_remote_code=model.trust_remote_code,
        )
    freeze(base, model)
    return base


def architecture_of(model: ModelConfig) -> PretrainedConfig:
    """The config.json of conf/model, else that of `model.path`."""
    if model.facts is not None and model.facts.config is not None:
        text = (config_dir("conf") / "model" / model.facts.config).read_text()
        return AutoConfig.for_model(**json.loads(text))
    return load_architecture(model)


@contextlib.contextmanager
def errors_without_weights(model: ModelConfig) -> Iterator[None]:
    """Turns any error that the code of an architecture raises without weights into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split("\n")[0].split())
        raise UserError(
            f"model.path={model.path}: cera-plan cannot run this model without its weights "
            f"({type(error).__name__}: {reason})."
        ) from error


def stored_sizes(base: PreTrainedModel, quantization: Quantization) -> dict[nn.Parameter, float]:
    """Bytes of each weight of the base as it is stored."""
    sizes: dict[nn.Parameter, float] = {weight: weight.nbytes for weight in base.parameters()}
    if quantization == Quantization.nf4:
        left = unquantised(base)
        for name, module in base.named_modules():
            is_left = name in left or name.rpartition(".")[2] in left
            if isinstance(module, nn.Linear | Conv1D) and not is_left:
                sizes[module.weight] = module.weight.numel() * NF4_BITS / 8
    return sizes


# --- the update -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one length."""

    rows: int
    length: int
    supervised: float  # share of the tokens whose prediction counts

    @property
    def tokens(self) -> int:
        return self.rows * self.length


class DryRun:
    """The model, loss and optimizer of a run.

    Args:
        config: with a decided `model.dtype`.
    """

    def __init__(self, config: PlanRun) -> None:
        self.config = config
        self.device = torch.device("cuda" if config.plan.on_gpu else "cpu")
        self.base = build_base(config.model)
        stored = stored_sizes(self.base, config.model.quantization)
        classes = layer_classes(self.base)
        layers = [module for module in self.base.modules() if type(module).__name__ in classes]
        inside = sum(stored[weight] for layer in layers for weight in layer.parameters())
        self.layer_bytes = inside / max(1, len(layers))
        self.outside_bytes = sum(stored.values()) - inside
        self.is_scanned = mixes_sequences(self.base)

        autocast = config.model.autocast_dtype(config.train.autocast, config.plan.on_gpu)
        builds = errors_without_weights(config.model)
        with torch.device("meta"), builds, Meter(config.plan.on_gpu):
            self.model = build(self.base, config.adapter, None, autocast is not None).train()
        self.trainable, self.total = parameter_counts(self.model)
        self.meter = Meter(config.plan.on_gpu)
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._make_fake(stored)
        self.trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        model_bytes = self.meter.alive

        self.optimizer = self._build_optimizer()
        self.language_model = LanguageModel(self.model, self.base, autocast, self.device)
        with self.counted():
            # Without numbers any logits agree.
            choose_layout(self.language_model, may_flatten=not self.is_scanned)
            for weight in self.trained:
                weight.grad = torch.zeros_like(weight)
            self.optimizer.step()  # makes the optimizer's states
            self.optimizer.zero_grad()
        adapter = sum(allocated(weight.nbytes) for weight in self.trained)
        self.memory = {
            "weights": model_bytes - adapter,
            "adapter": adapter,
            "optimizer": self.meter.alive - model_bytes,
        }
        """Bytes by part that a process holds between updates."""

    def _make_fake(self, stored: dict[nn.Parameter, float]) -> None:
        """Puts fake tensors in the place of the model's. A tied weight stays one."""
        fakes: dict[torch.Tensor, torch.Tensor] = {}
        for module in self.model.modules():
            parameters = module.named_parameters(recurse=False)
            buffers = module.named_buffers(recurse=False)
            for name, tensor in [*parameters, *buffers]:
                if tensor not in fakes:
                    # A few buffers are on the CPU even of a model on the meta device.
                    meta = tensor.detach().to("meta")
                    fake = FakeTensor(self.fake_mode, meta, CPU)
                    self.meter.hold(fake, None if tensor.requires_grad else stored.get(tensor))
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, tensor.requires_grad)
                    fakes[tensor] = fake
                setattr(module, name, fakes[tensor])

    def _build_optimizer(self) -> torch.optim.Optimizer:
        kind = self.config.optimizer.kind
        if self.config.plan.on_gpu:  # paged states take as many bytes
            kind = kind.removeprefix("paged_")
        # Nothing is trained: any rate will do.
        settings = replace(self.config.optimizer, kind=kind, lr=1.0)
        groups = parameter_groups(self.model, self.config.adapter)
        optimizer = build_optimizer(groups, settings, self.device)
        if self.config.plan.on_gpu:
            for group in optimizer.param_groups:
                group["foreach"] = True
        return optimizer

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Runs the block on fake tensors, and counts."""
        with errors_without_weights(self.config.model), self.fake_mode, self.meter:
            yield

    def update(self, batch: MicroBatch) -> Reading:
        """What an update of this micro-batch takes."""
        with self.counted():
            inputs = self._inputs(batch)
            self.meter.read()
            self.language_model.train()(inputs).sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            return self.meter.read()

    def evaluation(self, batch: MicroBatch) -> Reading:
        """What a micro-batch of held-out rows takes."""
        with self.counted(), torch.no_grad():
            inputs = self._inputs(batch)
            self.meter.read()
            self.language_model.eval()(inputs).sum()
            return self.meter.read()

    def _inputs(self, batch: MicroBatch) -> Batch:
        make = flat_batch if self.language_model.is_flat else padded_batch
        rows = [[0] * batch.length] * batch.rows
        inputs = make(rows, [[False] * batch.length] * batch.rows)
        count = max(1, round(batch.tokens * batch.supervised))
        inputs.predicted = torch.zeros(count, dtype=torch.int64)
        return inputs


def rows_of_process(config: PlanRun, size: DataSize) -> int:
    """The most sequences of an update that one process takes."""
    rows = min(config.train.batch_size, size.train_rows)
    return math.ceil(config.sequences * rows / config.plan.gpus)


def largest_micro_batch(run: DryRun, size: DataSize) -> MicroBatch:
    """The largest micro-batch of one process, which needs the most memory.

    Args:
        size: of what updates train on.
    """
    config = run.config
    rows = rows_of_process(config, size)
    max_length = config.data.max_length + config.work.answer_tokens
    # Of many updates, the largest is taken to be three standard deviations above the mean.
    longest_mean = size.tokens_per_row * (1 + 3 * size.spread / math.sqrt(rows))
    tokens = min(rows * min(longest_mean, max_length), config.train.micro_batch_tokens)
    length = size.tokens_per_row
    if not run.language_model.is_flat:
        length = min(length * (1 + 3 * size.spread), max_length)
    length = min(length, SCANNED) if run.is_scanned else length
    rows = max(1, round(tokens / length))
    return MicroBatch(rows, max(2, round(tokens / rows)), size.supervised)


def memory_by_part(run: DryRun, peak: float) -> dict[str, float]:
    """Bytes of one process at the peak of an update: on a GPU what torch allocates, on a CPU what
    is resident."""
    processes = run.config.plan.gpus
    activations = peak - sum(run.memory.values())
    parts = dict(run.memory)
    if processes > 1 and run.config.distributed.strategy == Strategy.fsdp:
        parts = {name: size / processes for name, size in parts.items()}
        # FSDP2 keeps what is outside the layers, and gathers the next layer beside the present one.
        parts["gathered"] = run.outside_bytes + 2 * run.layer_bytes
    elif processes > 1:
        parts["buckets"] = parts["adapter"]  # gradients a second time, as DDP sends them
    if not run.config.plan.on_gpu:
        parts["libraries"] = PROCESS_BYTES
        if torch.version.cuda:
            parts["libraries"] += CUDA_BUILD_BYTES
        parts["heap's gaps"] = HEAP_SHARE * activations
    parts["gradients, activations"] = activations
    return parts
