"""The parts of a run: its rows, its model, and its evaluation. Nothing here writes a file."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from cera_train.adapters import build as adapters
from cera_train.adapters.builders import ADAPTER
from cera_train.adapters.probe import check_effect
from cera_train.adapters.saved import is_adapter, load, read
from cera_train.cera.coverage import Coverage
from cera_train.common.errors import UserError, errors_at
from cera_train.data.prepare import TokenizedData, TokenizedRows, prepare_data, training_questions
from cera_train.data.reader import Question
from cera_train.distributed.accelerator import start_accelerator
from cera_train.distributed.sharding import load_optimizer_state
from cera_train.evaluation.engine import Sampler
from cera_train.evaluation.task_evaluation import TaskEvaluations
from cera_train.evaluation.tasks.jsonl import gold_answer
from cera_train.model.batches import MicroBatches, RowOrder
from cera_train.model.compiled import compile_layers
from cera_train.model.folder import check_length, load_tokenizer
from cera_train.model.identity import BaseIdentity, identity_of
from cera_train.model.language_model import LanguageModel
from cera_train.model.layout import choose_layout, pass_padded
from cera_train.model.weights import load_model
from cera_train.runs.folder import Progress, check_base, load_checkpoint
from cera_train.runs.subject import find_start, run_of
from cera_train.settings.adapters import AdapterConfig, AdapterKind
from cera_train.settings.run import Config
from cera_train.training.optimizer import build_optimizer
from cera_train.training.resolve import choose_template_settings
from cera_train.training.rewards import GRADER

# --- rows -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """Rows as token ids and masks, and which of them each update takes."""

    tokenizer: Any
    rows: TokenizedData
    order: RowOrder
    updates: int
    questions: list[Question]
    """Questions of an epoch, for an objective that samples answers; `order` numbers them."""


def build_data(config: Config) -> Data:
    """Reads and tokenises the rows, before there is a process group with its time limit."""
    tokenizer = load_tokenizer(config.model)
    check_length(config.model, config.data.max_length, "data.max_length")
    rows = prepare_data(config.data, tokenizer)
    count = len(rows.train) // config.data.sequences
    questions = []
    if not config.learns_answers:
        questions = training_questions(config.data, tokenizer)
        count = len(questions)
    for question in questions:
        if config.grpo.grader is not None:
            with errors_at(question.place):
                gold_answer(question.gold, config.grpo.grader, GRADER)
    order = RowOrder(count, config.train.batch_size, config.train.seed, config.data.sequences)
    updates = config.train.max_updates or config.train.epochs * order.updates_per_epoch
    return Data(tokenizer, rows, order, updates, questions)


def look_at_data(config: Config) -> tuple[Config, Data]:
    """The rows as a new run would read them, after the config in which it decided how."""
    settings = choose_template_settings(config).value
    config = replace(config, data=replace(config.data, template_settings=settings))
    return config, build_data(config)


# --- model ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """The base with its adapter, and what trains it."""

    accelerator: Accelerator
    adapted: nn.Module
    """transformers' model with the adapter inside."""
    language_model: LanguageModel
    """`adapted` as a function from a micro-batch to token losses."""
    wrapped: nn.Module
    """`language_model` under DDP or FSDP, for passes whose gradients the processes share."""
    optimizer: AcceleratedOptimizer
    trained: list[nn.Parameter]
    micro_batch_tokens: int
    trainable_count: int
    total_count: int
    base: BaseIdentity

    def micro_batches(self, rows: TokenizedRows) -> MicroBatches:
        """Micro-batches of rows in the layout that the model takes."""
        is_flat = self.language_model.is_flat
        return MicroBatches(rows, is_flat, self.micro_batch_tokens, self.accelerator.device)


def build_model(config: Config, data: Data, checkpoint: Path | None) -> tuple[Model, Progress]:
    """Joins the processes, loads the base and adds a fresh adapter, or that of a checkpoint. Passes
    prove that it is a language model, in its layout, and that the whole adapter learns.

    Args:
        checkpoint: as process 0 found it; None for a new run.
    """
    accelerator = start_accelerator(config.model, config.train.autocast, config.distributed)
    [checkpoint] = broadcast_object_list([checkpoint])
    base = load_model(config.model, accelerator.device, accelerator.is_fsdp2)
    identity = identity_of(config.model)
    check_trained_base(config, checkpoint, identity)

    torch.manual_seed(config.train.seed)
    on_gpu = accelerator.device.type == "cuda"
    autocast = config.model.autocast_dtype(config.train.autocast, on_gpu)
    adapted = adapters.build(base, config.adapter, has_autocast=autocast is not None)
    if is_adapter(adapted):  # PEFT knows the name of the base alone
        adapted.peft_config[ADAPTER].revision = config.model.revision
    trainable_count, total_count = adapters.parameter_counts(adapted)
    progress, moments = load_weights(adapted, config, data.rows, checkpoint)

    groups = adapters.parameter_groups(adapted, config.adapter)
    optimizer = build_optimizer(groups, config.optimizer, accelerator.device)
    language_model = LanguageModel(adapted, base, autocast, accelerator.device)
    is_ours = config.adapter.kind != AdapterKind.peft and not config.adapter.settings
    if config.train.check_coverage and not (is_ours or accelerator.is_fsdp2):
        check_effect(adapted, base, config.adapter, functools.partial(pass_padded, language_model))
    share_frozen_weights(language_model)
    wrapped, optimizer = accelerator.prepare(language_model, optimizer)
    language_model = accelerator.unwrap_model(wrapped)
    if moments is not None:
        # After prepare: sharding replaces the parameters.
        load_optimizer_state(optimizer, moments, accelerator.scaler)

    if accelerator.is_fsdp2:
        # Sharded weights are whole only inside such methods.
        register_fsdp_forward_method(language_model, "with_whole_weights")
    language_model.with_whole_weights(choose_layout)
    if config.train.compile:
        compile_layers(language_model)
    model = Model(
        accelerator,
        adapted,
        language_model,
        wrapped,
        optimizer,
        # Those of the optimizer: after the probe, `adapted` has whole copies of the weights that
        # FSDP shards outside the layers.
        [weight for group in optimizer.param_groups for weight in group["params"]],
        config.train.micro_batch_tokens,
        trainable_count,
        total_count,
        identity,
    )
    if config.train.check_coverage:
        prove_coverage(model, data.rows.train)
    return model, progress


def share_frozen_weights(module: nn.Module) -> None:
    """Keeps DDP from writing process 0's frozen weights over those of `module`. Every process has
    read the same files, and on a CPU the processes of a machine share the memory that maps them."""
    frozen = [name for name, weight in module.named_parameters() if not weight.requires_grad]
    # DDP's constructor has no argument for it.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, frozen)


def prove_coverage(model: Model, rows: TokenizedRows) -> None:
    """Runs one forward and backward pass over a short row for each process, without side effects.

    Raises:
        UserError: an adapter did not run, or the loss does not depend on it.
    """
    coverage = Coverage.of_adapters(model.adapted)
    if not coverage.layers:  # full fine-tuning has no adapters
        return
    accelerator = model.accelerator
    batches = model.micro_batches(rows)
    # About 64 tokens: cheap, and long enough for q and k to get a gradient.
    sequences = sorted(
        range(len(batches.lengths)), key=lambda sequence: abs(batches.lengths[sequence] - 64)
    )
    one_each = sequences[: accelerator.num_processes]
    model.wrapped.train()
    with model.language_model.uncompiled(), coverage.watch():
        for group, _ in batches.of_process(accelerator, one_each):
            supervised = sum(batches.supervised[sequence] for sequence in group)
            loss = model.wrapped(batches.load(group)).sum() / supervised
            accelerator.backward(loss)
    model.optimizer.zero_grad()
    if (failure := coverage.problem()) is not None:
        raise UserError(
            f"adapter.target_modules: {failure} Leave them out, with all-linear by "
            "adapter.settings.exclude_modules=[...], or set train.check_coverage=false."
        )


def check_trained_base(config: Config, checkpoint: Path | None, identity: BaseIdentity) -> None:
    """Raises UserError where the checkpoint to resume from, or the adapter to start from, was
    trained on another base."""
    if checkpoint is not None:
        run = checkpoint.parent.parent
        fix = "Restore it, or choose another name=... for a new run."
        check_base(checkpoint, run, config.model, identity, fix)
    elif config.adapter.start_from is not None:
        run = run_of(find_start(config.adapter))
        if run is not None:
            fix = f"Set model as in {run}/config.yaml, or start from another adapter."
            place = f"adapter.start_from={config.adapter.start_from}"
            check_base(place, run, config.model, identity, fix)


def load_weights(
    adapted: nn.Module, config: Config, rows: TokenizedData, checkpoint: Path | None
) -> tuple[Progress, dict[str, Any] | None]:
    """Loads the weights of a checkpoint, or of an adapter to start from, into a fresh adapter.

    Returns:
        How far the run is, and the optimizer's state; None where it begins.

    Raises:
        UserError: the weights belong to another adapter or rows.
    """
    digests = (rows.train.digest, rows.evaluation.digest)
    if checkpoint is not None:
        return load_checkpoint(checkpoint, adapted, *digests)
    if config.adapter.start_from is not None:
        load_start(adapted, config.adapter)
    return Progress(data_digest=digests[0], held_out_digest=digests[1]), None


def load_start(model: nn.Module, config: AdapterConfig) -> None:
    """Loads the weights that `adapter.start_from` names into a fresh adapter."""
    with errors_at(f"adapter.start_from={config.start_from}"):
        load(model, read(find_start(config)))


# --- evaluation -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluator:
    """What measures the model while it trains."""

    held_out: MicroBatches
    sampler: Sampler
    tasks: TaskEvaluations


def build_evaluator(
    config: Config, data: Data, model: Model, progress: Progress, folder: Path
) -> Evaluator:
    """
    Args:
        progress: its update tells a sampler's server when its adapter is out of date.
        folder: the run's.
    """
    held_out = model.micro_batches(data.rows.evaluation)
    sampler = Sampler(
        config, data.tokenizer, model.language_model, model.accelerator, progress, folder / "served"
    )
    return Evaluator(held_out, sampler, TaskEvaluations(config, sampler))
