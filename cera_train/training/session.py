"""Everything that an update, an evaluation and a checkpoint need, built once."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from torch.distributed.fsdp import register_fsdp_forward_method

from cera_train.adapters import build as adapters
from cera_train.adapters.config import Kernels
from cera_train.common.terminal import ProgressBar
from cera_train.config import Config
from cera_train.data.batches import MicroBatches, RowOrder
from cera_train.data.prepare import prepare_data
from cera_train.distributed.accelerator import start_accelerator
from cera_train.distributed.sharding import load_optimizer_state
from cera_train.distributed.signals import Interruption
from cera_train.distributed.team import Team
from cera_train.evaluation.held_out import HeldOut
from cera_train.model.config import Dtype
from cera_train.model.loss import SupervisedLoss, choose_layout
from cera_train.model.precision import Precision, choose_precision
from cera_train.model.weights import check_length, fingerprint, load_model, load_tokenizer
from cera_train.runs.folder import Progress, RunFolder, environment, load_checkpoint
from cera_train.runs.recorded_config import load_config
from cera_train.runs.results import EvaluationMetrics, UpdateMetrics
from cera_train.runs.tracking import Tracker, start_tracker
from cera_train.training import console
from cera_train.training.optimizer import build_optimizer
from cera_train.training.start import load_start, settle_start


def settle(config: Config, folder: Path) -> tuple[Config, Precision]:
    """A config whose `auto` settings are decided: as the run in this folder was begun, else by this machine. Raises
    UserError where a setting cannot work here."""
    adapters.check(config.adapter)
    begun = load_config(folder / "config.yaml") if (folder / "config.yaml").is_file() else config
    precision = choose_precision(config.model.dtype)
    if config.model.dtype == Dtype.auto != begun.model.dtype:
        precision = Precision(begun.model.dtype, f"as {folder} was begun")
    adapter = config.adapter
    if adapter.kernels == Kernels.auto != begun.adapter.kernels:
        adapter = replace(adapter, kernels=begun.adapter.kernels)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    adapter = replace(adapter, kernels=adapters.choose_kernels(adapter, device, config.train.compile))
    adapter = settle_start(adapter, begun.adapter)
    return replace(config, model=replace(config.model, dtype=precision.dtype), adapter=adapter), precision


class Session:
    """A run while it trains. Building it writes and prints nothing; as a context manager it closes what it opened.

    Args:
        config: settled settings.
        resume_from: a checkpoint, as process 0 found it; None: a new run.
    """

    def __init__(self, config: Config, folder: RunFolder, resume_from: Path | None = None) -> None:
        self.config, self.folder = config, folder
        self.tokenizer = load_tokenizer(config.model)
        check_length(config.model, config.data.max_length, "data.max_length")
        self.data = prepare_data(config.data, self.tokenizer)  # before a process group and its time limit exist
        limit, strategy = config.distributed.timeout, config.distributed.strategy
        collective_limit = timedelta(seconds=2 * limit)  # the watchdog acts first, and names the process
        accelerator = start_accelerator(config.model, config.train.autocast, collective_limit, strategy)
        self.accelerator, self.team = accelerator, Team(accelerator, limit)
        (resume_from,) = broadcast_object_list([resume_from])

        base = load_model(config.model, self.team.device, self.team.is_sharded)
        self.base_fingerprint = fingerprint(base)  # before DoRA adds its magnitudes
        torch.manual_seed(config.train.seed)
        self.model = adapters.build(base, config.adapter)
        adapters.use_kernels(self.model, config.adapter.kernels)
        self.trainable_count, self.total_count = adapters.parameter_counts(self.model)

        self.goes_on_here = resume_from is not None and folder.holds(resume_from)
        self.progress, moments = Progress(), None
        if resume_from is not None:
            self.progress, moments = load_checkpoint(resume_from, self.model, self.data.train.digest)
            if not self.goes_on_here:
                self.progress.forget_best()  # that adapter lies in another folder
        elif config.adapter.start_from is not None:
            load_start(self.model, config.adapter)

        groups = adapters.parameter_groups(self.model, config.adapter)
        self.optimizer = build_optimizer(groups, config.optimizer, self.team.device)
        loss = SupervisedLoss(self.model, base, accelerator.autocast)
        # `loss` under DDP or FSDP, and an optimizer that knows the gradient scaler
        self.loss, self.stepper = accelerator.prepare(loss, self.optimizer)
        if moments is not None:
            load_optimizer_state(self.optimizer, moments)  # after prepare: sharding replaces the parameters
        self.weights = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

        local_loss = accelerator.unwrap_model(self.loss)
        if self.team.is_sharded:
            register_fsdp_forward_method(local_loss, "probe")  # the weights are whole only inside such methods
        choose_layout(config.train.batch_layout, local_loss, self.team.device)
        if config.train.compile:
            local_loss.compile_layers()

        tokens = config.train.micro_batch_tokens
        self.batches = MicroBatches(self.data.train, local_loss.is_flat, tokens, self.team.device)
        self.held_out = HeldOut(
            self.model, local_loss, self.data.evaluation, self.team, tokens, config.train.probe_tokens
        )
        self.order = RowOrder(len(self.data.train.rows), config.train.batch_size, config.train.seed)
        self.updates = config.train.max_updates or config.train.epochs * self.order.updates_per_epoch
        self.bar = ProgressBar("update", self.updates, self.progress.update, visible=self.team.is_main)
        self.tracker = Tracker()
        self.interruption = Interruption()

    def begin(self, precision: Precision) -> None:
        """Writes the config and the machine, starts the tracker, and prints what the run is about to do."""
        if not self.team.is_main:
            return
        folder, done = self.folder, self.progress.update
        folder.rewind(done if self.goes_on_here else None)
        folder.write_config(environment(self.team.processes, self.base_fingerprint, self.updates, precision))
        self.tracker = start_tracker(self.config.tracker, folder.config, self.config.name, folder.path, done)
        console.print_start(self, precision)

    def start(self) -> None:
        """Puts the model into training mode, and starts the clock."""
        self.loss.train()
        self.started, self.first_update = time.perf_counter(), self.progress.update

    @property
    def is_done(self) -> bool:
        """Whether the last update is done, or the last evaluations brought no lower perplexity."""
        return self.progress.update >= self.updates or self.progress.out_of_patience(self.config.train.patience)

    def is_due(self, every: int | None) -> bool:
        """Whether something is due after this update."""
        return every is not None and self.progress.update % every == 0

    def seconds_left(self) -> float:
        """How long the rest takes at the pace since the start, evaluations and checkpoints included."""
        done = self.progress.update - self.first_update
        return (time.perf_counter() - self.started) / done * (self.updates - self.progress.update)

    def log(self, metrics: UpdateMetrics | EvaluationMetrics) -> None:
        """Writes a line of metrics.jsonl, and its mirror."""
        if self.team.is_main:
            line = metrics.to_json()
            self.folder.append_metrics(line)
            self.tracker.log({name: line[name] for name in line if "/" in name}, metrics.update)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        for close in (self.team.close, self.bar.close, self.tracker.finish):
            close()
