"""Everything that an update, an evaluation and a checkpoint need, built once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method

from cera_train.adapters import build as adapters
from cera_train.adapters.config import Kernels
from cera_train.common.terminal import ProgressBar
from cera_train.config import Config
from cera_train.data.batches import MicroBatches, RowOrder
from cera_train.data.prepare import TokenizedData, prepare_data
from cera_train.distributed.accelerator import start_accelerator
from cera_train.distributed.sharding import load_optimizer_state
from cera_train.distributed.team import Team
from cera_train.evaluation.held_out import HeldOut
from cera_train.model.config import Dtype
from cera_train.model.loss import SupervisedLoss, choose_layout
from cera_train.model.precision import Precision, choose_precision
from cera_train.model.weights import check_length, fingerprint, load_model, load_tokenizer
from cera_train.runs.folder import Progress, RunFolder, environment, load_checkpoint
from cera_train.runs.recorded_config import load_config
from cera_train.runs.results import EvaluationMetrics, UpdateMetrics
from cera_train.training import console
from cera_train.training.optimizer import build_optimizer
from cera_train.training.tracking import Tracker, start_tracker


@dataclass
class Session:
    """A run while it trains. Built by `build`; used as a context manager, it closes what it opened."""

    config: Config
    folder: RunFolder
    data: TokenizedData
    tokenizer: Any
    team: Team
    model: Any
    """The model with its adapter."""
    loss: nn.Module
    """SupervisedLoss of `model`, under DDP or FSDP where there are several processes."""
    optimizer: torch.optim.Optimizer
    stepper: Any
    """Accelerate's view of the optimizer: it knows the gradient scaler."""
    batches: MicroBatches
    """Training rows as micro-batches."""
    held_out: HeldOut
    order: RowOrder
    updates: int
    """Updates of the whole run."""
    progress: Progress
    weights: list[nn.Parameter]
    """The trainable parameters."""
    counts: tuple[int, int]
    """Numbers of trainable and of all parameters."""
    tracker: Tracker
    bar: ProgressBar
    clock: console.Clock
    base_fingerprint: str
    goes_on_here: bool
    """It resumes from a checkpoint of its folder."""

    @property
    def accelerator(self) -> Accelerator:
        return self.team.accelerator

    @property
    def is_done(self) -> bool:
        """Whether the last update is done, or the last evaluations brought no lower perplexity."""
        return self.progress.update >= self.updates or self.progress.out_of_patience(self.config.train.patience)

    def is_due(self, every: int | None) -> bool:
        """Whether something is due after this update."""
        return every is not None and self.progress.update % every == 0

    def log(self, metrics: UpdateMetrics | EvaluationMetrics) -> None:
        """Writes a line of metrics.jsonl, and its mirror."""
        if self.team.is_main:
            line = metrics.to_json()
            self.folder.append_metrics(line)
            self.tracker.log({name: line[name] for name in line if "/" in name}, metrics.update)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for close in (self.team.close, self.bar.close, self.tracker.finish):
            close()


def settle(config: Config, folder: Path) -> tuple[Config, Precision]:
    """A config whose `auto` settings are decided: as the run in this folder was begun, else by this machine.

    Raises:
        UserError: the config.yaml of the folder is broken, or a setting cannot work here.
    """
    begun = load_config(folder / "config.yaml") if (folder / "config.yaml").is_file() else config
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = choose_precision(config.model.dtype)
    if config.model.dtype == Dtype.auto != begun.model.dtype:
        precision = Precision(begun.model.dtype, f"as {folder} was begun")
    adapter = config.adapter
    if adapter.kernels == Kernels.auto != begun.adapter.kernels:
        adapter = replace(adapter, kernels=begun.adapter.kernels)
    adapter = replace(adapter, kernels=adapters.choose_kernels(adapter, device, config.train.compile))
    return replace(config, model=replace(config.model, dtype=precision.dtype), adapter=adapter), precision


def build(config: Config, folder: RunFolder, resume_from: Path | None = None) -> Session:
    """Builds everything, the rows before a process group exists. Writes and prints nothing.

    Args:
        config: settled settings.
        resume_from: a checkpoint, as process 0 found it; None: a new run.

    Raises:
        UserError: the data, the model or the checkpoint is not usable.
    """
    tokenizer = load_tokenizer(config.model)
    check_length(config.model, config.data.max_length, "data.max_length")
    data = prepare_data(config.data, tokenizer)
    team = join_team(config)
    (resume_from,) = broadcast_object_list([resume_from])

    base = load_model(config.model, team.device, team.is_sharded)
    base_fingerprint = fingerprint(base)  # before DoRA adds its magnitudes
    torch.manual_seed(config.train.seed)
    model = adapters.build(base, config.adapter)
    adapters.use_kernels(model, config.adapter.kernels)
    counts = adapters.parameter_counts(model)
    progress, moments = restore(folder, resume_from, model, data.train.digest)

    optimizer = build_optimizer(adapters.parameter_groups(model, config.adapter), config.optimizer, team.device)
    loss, stepper = team.accelerator.prepare(SupervisedLoss(model, base, team.accelerator.autocast), optimizer)
    if moments is not None:
        load_optimizer_state(optimizer, moments)  # after prepare: sharding replaces the parameters
    local_loss = team.accelerator.unwrap_model(loss)
    prepare_loss(local_loss, config, team)

    order = RowOrder(len(data.train.rows), config.train.batch_size, config.train.seed)
    updates = config.train.max_updates or config.train.epochs * order.updates_per_epoch
    micro_batch_tokens, probe_tokens = config.train.micro_batch_tokens, config.train.probe_tokens
    return Session(
        config=config,
        folder=folder,
        data=data,
        tokenizer=tokenizer,
        team=team,
        model=model,
        loss=loss,
        optimizer=optimizer,
        stepper=stepper,
        batches=MicroBatches(data.train, local_loss.is_flat, micro_batch_tokens, team.device),
        held_out=HeldOut(model, local_loss, data.evaluation, team, micro_batch_tokens, probe_tokens),
        order=order,
        updates=updates,
        progress=progress,
        weights=trainable_parameters(model),
        counts=counts,
        tracker=Tracker(),
        bar=ProgressBar("update", updates, progress.update, visible=team.is_main),
        clock=console.Clock(progress.update, updates),
        base_fingerprint=base_fingerprint,
        goes_on_here=resume_from is not None and folder.holds(resume_from),
    )


def restore(
    folder: RunFolder, checkpoint: Path | None, model: nn.Module, data_digest: str
) -> tuple[Progress, dict[str, Any] | None]:
    """The progress and the optimizer's state to begin with; loads the weights of a checkpoint into the model."""
    if checkpoint is None:
        return Progress(), None
    progress, moments = load_checkpoint(checkpoint, model, data_digest)
    if not folder.holds(checkpoint):
        progress.forget_best()  # that adapter lies in another folder
    return progress, moments


def begin(session: Session, precision: Precision) -> None:
    """Writes the config and the machine, starts the tracker, and prints what the run is about to do."""
    if not session.team.is_main:
        return
    config, folder, done = session.config, session.folder, session.progress.update
    folder.rewind(done if session.goes_on_here else None)
    folder.write_config(environment(session.team.processes, session.base_fingerprint, session.updates, precision))
    session.tracker = start_tracker(config.tracker, folder.config, config.name, folder.path, done)
    console.print_start(session, precision)


def join_team(config: Config) -> Team:
    """The processes of this run, with a watchdog that allows for the communication library's time limit."""
    limit = config.distributed.timeout
    accelerator = start_accelerator(
        config.model, config.train.autocast, timedelta(seconds=2 * limit), config.distributed.strategy
    )
    return Team(accelerator, limit)


def prepare_loss(loss: SupervisedLoss, config: Config, team: Team) -> None:
    """Chooses the layout of the batches, and compiles the layers where that is asked for."""
    if team.is_sharded:
        register_fsdp_forward_method(loss, "probe")  # the weights are whole only inside such methods
    choose_layout(config.train.batch_layout, loss, team.device)
    if config.train.compile:
        loss.compile_layers()


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
