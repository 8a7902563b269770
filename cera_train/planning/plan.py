"""A run's parameters, memory, updates, time and cost, before it runs.

No torch at module level: the size of the data is known, or refused, before torch is imported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cera_train.adapters.family import check_settings, with_kind
from cera_train.common.errors import UserError
from cera_train.common.imports import heavy_imports
from cera_train.model.precision import choose_precision
from cera_train.planning.answers import AnswerSize, sizes_of_samples, sizes_of_tasks, step_seconds
from cera_train.planning.data_size import DataSize, data_size
from cera_train.planning.devices import CPU_MFU, GPU_MFU, GPUS, USABLE, Device, this_cpu
from cera_train.settings.adapters import AdapterKind
from cera_train.settings.data import BatchLayout
from cera_train.settings.model import Dtype, Quantization, chunk_tokens
from cera_train.settings.planning import CompareAt
from cera_train.settings.run import Config, PlanRun
from cera_train.settings.training import OPTIMIZERS

if TYPE_CHECKING:
    from cera_train.planning.count import Parameters
    from cera_train.planning.measure import MicroBatch

ROW_SPREAD = 0.4
"""Standard deviation of the tokens in a row over their mean: 0.36 on GSM8K, 0.43 on OpenOrca. The largest of many
updates is taken to be three standard deviations above the mean."""

PROCESS_BYTES = 610_000_000
"""Resident memory of Python, torch, transformers, peft and pandas, a tokenizer loaded and no model (on Linux)."""

CUDA_BUILD_BYTES = 320_000_000
"""What a torch built for CUDA, as PyPI's is on x86-64, holds besides where there is no GPU."""

HEAP_SHARE = 0.45
"""On a CPU, freed blocks below 32 MB stay with the C library's heap, and its gaps add this share of the activations:
0.2 to 0.8 in runs of SmolLM2-135M, by the day; none where MALLOC_MMAP_THRESHOLD_ keeps it from holding blocks."""


OF_AN_ARM = ("adapter", "gradients", "optimizer")
"""Parts of a run's memory that every run has; the rest is shared."""

FULL = 1_000
"""So many sequences an update fill a micro-batch, as those of several runs do."""


@dataclass(frozen=True)
class RunTotals:
    """How much of the data a run goes through, without an early stop by `train.patience`."""

    updates: int
    rows: int
    """Training rows, as often as they are seen."""
    tokens: float
    evaluations: int
    eval_tokens: float
    """Tokens of all evaluations, and of the probes on which spectra are taken."""
    task_evaluations: int
    """Those at which `train.tasks` are answered."""
    sample_evaluations: int
    """Those with `train.samples`."""


@dataclass(frozen=True)
class Memory:
    """Bytes by part, of one process, at its two peaks: where an update's backward pass begins, and in an evaluation."""

    training: dict[str, float]
    evaluation: dict[str, float]

    @property
    def peak(self) -> float:
        return max(sum(self.training.values()), sum(self.evaluation.values()))


@dataclass(frozen=True)
class RunPlan:
    """A planned run."""

    config: PlanRun
    device: Device
    data: DataSize
    tasks: list[AnswerSize]
    """Answers of an evaluation to `train.tasks`."""
    samples: list[AnswerSize]
    parameters: Parameters
    totals: RunTotals
    memory: Memory
    other_activations: float
    """Bytes of the activations with gradient checkpointing where the run has none, and without where it has it."""
    flops: dict[str, float]
    """Floating-point operations of the run by part."""
    token_flops: float
    """Operations of a token in an evaluation."""
    mfu: float
    remedies: dict[str, RunPlan] = field(default_factory=dict)
    """For a plan that does not fit: an override, and the plan with it."""
    compared: list[RunPlan] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return self.memory.peak <= USABLE * self.device.memory

    @property
    def speed(self) -> float:
        """Operations a second in training."""
        return self.device.flops * self.mfu * self.config.plan.gpus

    @property
    def seconds(self) -> float:
        return sum(self.flops.values()) / self.speed + self.answer_seconds

    @property
    def update_seconds(self) -> float:
        """Seconds of an update, evaluations not counted."""
        return (self.flops["forward"] + self.flops["backward"]) / self.speed / self.totals.updates

    @property
    def answer_seconds(self) -> float:
        """Seconds of all answers and samples, if each is as long as it may be."""
        step = step_seconds(self.device, self.parameters.layers, self.parameters.weight_bytes)
        token = self.token_flops / (self.device.flops * self.mfu)

        def seconds(answers: Sequence[AnswerSize]) -> float:
            return sum(size.seconds(self.config.plan.gpus, step, token) for size in answers)

        totals = self.totals
        return totals.task_evaluations * seconds(self.tasks) + totals.sample_evaluations * seconds(self.samples)

    @property
    def gpu_hours(self) -> float:
        return self.seconds / 3600 * self.config.plan.gpus

    @property
    def cost(self) -> float | None:
        price = self.config.plan.price_per_hour
        return None if price is None else price * self.gpu_hours

    def until(self, pauses: Sequence[int], is_whole: bool) -> RunPlan:
        """The plan of this run with a pause at each of these updates, and of its start only where it ends with one."""
        totals = run_totals(self.config, self.data, pauses, is_whole)
        tokens, eval_tokens = totals.tokens / self.totals.tokens, totals.eval_tokens / (self.totals.eval_tokens or 1)
        shares = {"forward": tokens, "backward": tokens, "evaluations": eval_tokens}
        return replace(self, totals=totals, flops={part: shares[part] * flops for part, flops in self.flops.items()})


def make_plan(config: PlanRun, with_advice: bool = True) -> RunPlan:
    """Plans a run and the same run with each adapter of `plan.compare`; with advice also what would make it fit."""
    if not config.plan.on_gpu and config.plan.gpus > 1:
        raise UserError(
            f"plan.gpus={config.plan.gpus} with plan.gpu=cpu: there is one CPU, and a run takes all its threads. "
            "Leave plan.gpus at 1."
        )
    plan = plan_alone(config)
    compared = [plan_alone(_with_adapter(config, kind)) for kind in config.plan.compare]
    remedies = _remedies(config) if with_advice and not plan.fits else {}
    return replace(plan, compared=compared, remedies=remedies)


def shape_of(config: PlanRun) -> str:
    """What a plan depends on: runs that differ in their seed or learning rate have one plan."""
    train = replace(config.train, seed=0)
    return repr((config.model, config.adapter, config.data, train, config.optimizer.kind, config.plan))


def plan_alone(config: PlanRun, cpu_threads: int | None = None) -> RunPlan:
    """Plans one run; on a CPU with so many threads, or as many as torch takes."""
    on_gpu = config.plan.on_gpu
    if config.model.dtype == Dtype.auto:  # every GPU in devices.py multiplies bf16
        dtype = Dtype.bfloat16 if on_gpu else choose_precision(Dtype.auto, cuda=False).dtype
        config = replace(config, model=replace(config.model, dtype=dtype))
    model, adapter, data = config.model, config.adapter, data_size(config.data, config.plan.tokens_per_row)
    tasks = sizes_of_tasks(config, data)
    with heavy_imports():
        from cera_train.planning.count import count_parameters
        from cera_train.planning.measure import abilities, measure
    parameters = count_parameters(model, adapter)
    if parameters.positions is not None and config.data.max_length > parameters.positions:
        raise UserError(
            f"data.max_length={config.data.max_length} is beyond the {parameters.positions} positions of "
            f"{model.path}: lower it."
        )
    if model.quantization == Quantization.nf4:  # 4-bit linears save what 16-bit ones save
        model = replace(model, quantization=Quantization.none)
    plain, checkpointed = (replace(model, gradient_checkpointing=flag) for flag in (False, True))
    allowed = abilities(plain)
    layout = config.train.batch_layout
    if parameters.mixes_sequences and layout == BatchLayout.auto:
        layout = BatchLayout.padded
    laid_out = replace(config, train=replace(config.train, batch_layout=layout))
    largest, usual = micro_batches(laid_out, data, allowed.attention is not None)
    whole, layer_inputs = (
        measure(way, adapter, largest, way != model or usual != largest) for way in (plain, checkpointed)
    )
    logits = logits_bytes(config, data, parameters, largest.tokens, allowed.chunks_head)
    # The logits are gone where a layer is computed again.
    activations = [whole.saved_bytes, layer_inputs.saved_bytes + max(0, whole.layer_bytes - logits)]
    if model.gradient_checkpointing:
        activations.reverse()
    cost, totals = measure(model, adapter, usual, False), run_totals(config, data)
    return RunPlan(
        config=config,
        device=GPUS[config.plan.gpu] if on_gpu else this_cpu(is_16bit(config), cpu_threads),
        data=data,
        tasks=tasks,
        samples=sizes_of_samples(config, data, tasks),
        parameters=parameters,
        totals=totals,
        memory=memory_of(config, data, parameters, activations[0], logits, allowed.chunks_head),
        other_activations=activations[1],
        flops={
            "forward": cost.forward / usual.tokens * totals.tokens,
            "backward": cost.backward / usual.tokens * totals.tokens,
            "evaluations": cost.evaluation / usual.tokens * totals.eval_tokens,
        },
        token_flops=cost.evaluation / usual.tokens,
        mfu=config.plan.mfu or (GPU_MFU if on_gpu else CPU_MFU),
    )


def run_totals(config: Config, size: DataSize, pauses: Sequence[int] = (), is_whole: bool = True) -> RunTotals:
    """The totals of a run that pauses at these updates, and ends with the last of them unless it `is_whole`."""
    train = config.train
    updates_per_epoch = math.ceil(size.train_rows / train.batch_size)
    updates = (train.max_updates or train.epochs * updates_per_epoch) if is_whole else pauses[-1]

    def times(every: int | None) -> int:
        """Before the first update, after the last of the whole run, and every so many between."""
        return 1 + is_whole + ((updates - is_whole) // every if every else 0)

    epochs, rest = divmod(updates, updates_per_epoch)
    rows = epochs * size.train_rows + min(rest * train.batch_size, size.train_rows)
    eval_tokens, with_spectra = size.eval_rows * size.tokens_per_eval_row, times(train.eval_every)
    at_pauses = sum(not train.eval_every or pause % train.eval_every > 0 for pause in pauses)  # a loss alone
    probes = (with_spectra + is_whole) * min(train.probe_tokens, eval_tokens)
    return RunTotals(
        updates=updates,
        rows=rows,
        tokens=rows * size.tokens_per_row,
        evaluations=with_spectra + at_pauses,
        eval_tokens=(with_spectra + at_pauses) * eval_tokens + probes,
        task_evaluations=(times(train.tasks_every) if train.tasks_every else int(is_whole)) if train.tasks else 0,
        sample_evaluations=with_spectra if train.samples else 0,
    )


def micro_batches(config: PlanRun, size: DataSize, by_sequence: bool) -> tuple[MicroBatch, MicroBatch]:
    """The largest micro-batch of one process, which needs the most memory, and a usual one, which takes the time.
    `by_sequence`: the model's attention may run over each sequence of a flat row by itself."""
    from cera_train.planning.measure import MicroBatch

    train, attention, on_gpu = config.train, config.model.attn_implementation, config.plan.on_gpu
    has_flash = attention.startswith("flash") or "/" in attention
    by_sequence = by_sequence or has_flash
    is_flat = on_gpu or by_sequence if train.batch_layout == BatchLayout.auto else train.batch_layout == "flat"
    is_masked = not by_sequence if is_flat else not (size.is_even or has_flash)
    has_mask = is_masked or attention == "eager"

    rows = math.ceil(train.batch_size / config.plan.gpus)
    spread = 0 if size.is_even else 3 * ROW_SPREAD / math.sqrt(rows)
    usual_tokens = min(train.micro_batch_tokens, rows * size.tokens_per_row)
    most_tokens = rows * min(size.tokens_per_row * (1 + spread), config.data.max_length)
    longest = size.tokens_per_row if is_flat or size.is_even else config.data.max_length

    def batch(tokens: float, length: float) -> MicroBatch:
        rows = max(1, round(tokens / length))
        length = max(2, round(tokens / rows))
        return MicroBatch(rows, length, size.supervised, is_flat, has_mask, _autocast(config), on_gpu)

    largest = batch(min(train.micro_batch_tokens, most_tokens), longest)
    # Without a mask a token costs the same in every micro-batch: one is enough.
    return largest, batch(usual_tokens, size.tokens_per_row) if has_mask else largest


def _autocast(config: PlanRun) -> Dtype | None:
    return config.model.autocast_dtype(config.train.autocast, config.plan.on_gpu)


def is_16bit(config: PlanRun) -> bool:
    """Whether products are computed in 16 bits."""
    return (_autocast(config) or config.model.dtype) != Dtype.float32


def logits_bytes(config: PlanRun, size: DataSize, parameters: Parameters, tokens: int, chunks_head: bool) -> float:
    """What the loss of a micro-batch holds beside its activations: of one chunk, where the head takes chunks."""
    # Frozen head: the logits, a float32 copy of 16-bit ones, and its log-softmax, which becomes its gradient.
    # Trained: the log-softmax that was saved, its gradient, and that of the logits, in float32.
    each = 12 if parameters.trains_head else 10 if is_16bit(config) else 8
    return each * parameters.vocab_size * chunk_of(config, size, tokens, chunks_head)


def chunk_of(config: PlanRun, size: DataSize, tokens: float, chunks_head: bool) -> float:
    """Positions of so many tokens whose logits are in memory at once."""
    return min(chunk_tokens(config.plan.on_gpu) if chunks_head else tokens, max(1, tokens * size.supervised))


def memory_of(
    config: PlanRun, size: DataSize, parameters: Parameters, activations: float, logits: float, chunks_head: bool
) -> Memory:
    """The memory of one process: on a GPU what torch allocates, on a CPU what is resident. `activations` and `logits`
    are those of the largest micro-batch."""
    on_gpu, processes = config.plan.on_gpu, config.plan.gpus
    always = {
        "weights": parameters.weight_bytes,
        "adapter": 4 * parameters.trainable,
        "optimizer": sum(map(OPTIMIZERS[config.optimizer.kind].state_bytes, parameters.trainable_tensors)),
    }
    if not on_gpu:
        import torch

        libraries = PROCESS_BYTES + (CUDA_BUILD_BYTES if torch.version.cuda else 0)
        always |= {"libraries": libraries, "heap's gaps": HEAP_SHARE * activations}
    eval_tokens = min(config.train.micro_batch_tokens, size.eval_rows / processes * size.tokens_per_eval_row)
    training = {
        # DDP holds gradients a second time, in the buckets it sends.
        "gradients": 4 * parameters.trainable * (2 if processes > 1 else 1),
        "activations": activations,
        "logits": logits,
    }
    # float32 logits and their log-softmax. A CPU's heap has not given back what training took.
    evaluation = {"logits": 8 * parameters.vocab_size * chunk_of(config, size, eval_tokens, chunks_head)}
    return Memory(always | training, always | evaluation | ({} if on_gpu else {"activations": activations}))


# --- the same run, changed -------------------------------------------------------------------------------------------


def _with_adapter(config: PlanRun, kind: AdapterKind) -> PlanRun:
    """The run with another adapter, at the same rank or the same number of parameters."""
    adapter = with_kind(config.adapter, kind)
    check_settings(adapter)
    if config.plan.compare_at == CompareAt.budget:
        from cera_train.planning.count import count_parameters

        ranks = (config.adapter, replace(adapter, r=1), replace(adapter, r=2))
        budget, one, two = (count_parameters(config.model, own).trainable for own in ranks)
        adapter = replace(adapter, r=max(1, 1 + round((budget - one) / (two - one))))
    return replace(config, adapter=adapter)


def _remedies(config: PlanRun) -> dict[str, RunPlan]:
    """What lowers the peak, each by itself and all together: an override and the plan with it."""
    model, train = config.model, config.train
    fewer = max(config.data.max_length, train.micro_batch_tokens // 4)
    # nf4 does not compute in float16.
    quantized = model if model.dtype == Dtype.float16 else replace(model, quantization=Quantization.nf4)
    shorter = replace(train, micro_batch_tokens=fewer)
    changed = {
        "model.gradient_checkpointing=true": replace(config, model=replace(model, gradient_checkpointing=True)),
        "model.quantization=nf4": replace(config, model=quantized),
        f"train.micro_batch_tokens={fewer}": replace(config, train=shorter),
        "all of these": replace(config, model=replace(quantized, gradient_checkpointing=True), train=shorter),
    }
    changed = {override: other for override, other in changed.items() if other != config}
    if len(changed) == 2:  # one, and all of one
        del changed["all of these"]
    return {override: plan_alone(other) for override, other in changed.items()}
