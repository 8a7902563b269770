"""Everything that an update, an evaluation and a checkpoint need, built once: a `Session` is what runs on one base
share, an `Arm` what belongs to one of them. Most sessions have one arm."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import PreTrainedModel

from cera_train.adapters import build as adapters
from cera_train.adapters.spectrum import ModuleSpectrum
from cera_train.adapters.together import JoinedAdapter, SharedLoss, twin
from cera_train.common.errors import UserError
from cera_train.common.terminal import ProgressBar, print_line
from cera_train.data.batches import MicroBatches, RowOrder, SharedMicroBatches
from cera_train.data.prepare import prepare_data
from cera_train.distributed.accelerator import start_accelerator, this_device
from cera_train.distributed.sharding import load_optimizer_state
from cera_train.distributed.signals import Interruption
from cera_train.distributed.team import Team
from cera_train.evaluation.held_out import HeldOut
from cera_train.model.loss import SupervisedLoss, choose_layout
from cera_train.model.precision import Precision, choose_precision
from cera_train.model.weights import check_length, fingerprint, load_model, load_tokenizer
from cera_train.runs.extension import keep_end
from cera_train.runs.folder import Progress, RunFolder, environment, load_checkpoint
from cera_train.runs.outcomes import TokenLosses
from cera_train.runs.recorded_config import load_config
from cera_train.runs.results import EvaluationMetrics, UpdateMetrics
from cera_train.runs.tracking import Tracker, start_tracker
from cera_train.settings.adapters import Kernels
from cera_train.settings.model import Dtype
from cera_train.settings.run import Config
from cera_train.training import console
from cera_train.training.optimizer import build_optimizer
from cera_train.training.start import load_start, settle_start
from cera_train.training.tasks import Exams
from cera_train.training.together import pass_tokens


def settle(config: Config, folder: Path) -> tuple[Config, Precision]:
    """A config whose `auto` settings are decided: as the run in this folder was begun, else by this machine. Raises
    UserError where a setting cannot work here."""
    adapters.check(config.adapter, config.train.compile)
    begun = load_config(folder / "config.yaml") if (folder / "config.yaml").is_file() else config
    precision = choose_precision(config.model.dtype)
    if config.model.dtype == Dtype.auto != begun.model.dtype:
        precision = Precision(begun.model.dtype, f"as {folder} was begun")
    adapter = config.adapter
    if adapter.kernels == Kernels.auto != begun.adapter.kernels:
        adapter = replace(adapter, kernels=begun.adapter.kernels)
    adapter = replace(adapter, kernels=adapters.choose_kernels(adapter, this_device(), config.train.compile))
    adapter = settle_start(adapter, begun.adapter)
    return replace(config, model=replace(config.model, dtype=precision.dtype), adapter=adapter), precision


@dataclass
class Run:
    """A run before a model is loaded for it, and what came of it."""

    config: Config
    """Settled."""
    precision: Precision
    folder: RunFolder
    """Open."""
    resume_from: Path | None = None
    """A checkpoint, as process 0 found it; None: a new run."""
    outcome: dict[str, Any] | Exception | None = None
    """The content of result.json, or why there is none. None: it is not over."""


class Session:
    """What runs on one base share while they train. Building it writes and prints nothing; as a context manager it
    closes what it opened.

    Args:
        runs: one, or several that `training.together` lets share a base. One that cannot be built gets its error as
            outcome, and no arm.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.config = config = runs[0].config  # of which only what they share is used here
        self.precision = runs[0].precision
        self.tokenizer = load_tokenizer(config.model)
        check_length(config.model, config.data.max_length, "data.max_length")
        self.data = prepare_data(config.data, self.tokenizer)  # before a process group and its time limit exist
        limit, strategy = config.distributed.timeout, config.distributed.strategy
        collective_limit = timedelta(seconds=2 * limit)  # the watchdog acts first, and names the process
        accelerator = start_accelerator(config.model, config.train.autocast, collective_limit, strategy)
        self.accelerator, self.team = accelerator, Team(accelerator, limit)
        (resume_from,) = broadcast_object_list([[run.resume_from for run in runs]])

        base = load_model(config.model, self.team.device, self.team.is_sharded)
        self.base_fingerprint = fingerprint(base)  # before DoRA adds its magnitudes
        self.is_joint = len(runs) > 1
        self.arms: list[Arm] = []
        """The runs that are not over."""
        self.losses_of_base: TokenLosses | None = None
        """On the held-out rows, once measured."""
        for run, checkpoint in zip(runs, resume_from, strict=True):
            with self.alone(run):
                self.arms.append(Arm(self, run, twin(base) if self.is_joint else base, checkpoint))
        if self.is_joint and self.arms:
            self.joined = SharedLoss(base, [arm.joined for arm in self.arms], accelerator.autocast)
            self.joined.take_layout_of(self.arms[0].local_loss)
            self.loss = accelerator.prepare(self.joined)
            self.batches = SharedMicroBatches(
                self.arms[0].batches.up_to(pass_tokens(config, self.team.device.type != "cpu"))
            )
        elif self.arms:
            self.loss, self.batches = self.arms[0].loss, self.arms[0].batches
        done = sum(arm.progress.update for arm in self.arms)
        self.bar = ProgressBar("update", sum(arm.updates for arm in self.arms), done, visible=self.team.is_main)
        self.interruption = Interruption()

    @contextlib.contextmanager
    def alone(self, run: Run) -> Iterator[None]:
        """Lets an error end one run, and none of the others."""
        try:
            yield
        except Exception as error:
            self.leave(run, error)

    def leave(self, run: Run, outcome: dict[str, Any] | Exception) -> None:
        """Goes on without a run that is over."""
        run.outcome = outcome
        for arm in [arm for arm in self.arms if arm.run is run]:
            self.arms.remove(arm)
            arm.tracker.finish()

    def passes(self, rows: list[list[int]]) -> list[tuple[Any, bool]]:
        """This process's micro-batches of each arm's rows, and whether each counts."""
        if self.is_joint:
            self.joined.arms = [arm.joined for arm in self.arms]
            return [(group, True) for group in self.batches.passes(rows)]
        (rows_of_arm,), team = rows, self.team
        return self.batches.passes(rows_of_arm, team.processes, team.process, in_step=team.is_sharded)

    def token_losses(self, arm: Arm) -> TokenLosses:
        """The held-out losses of an arm. Arms whose adapters add nothing yet have those of the base in common."""
        if not self.is_joint or arm.progress.update or not adapters.adds_nothing(arm.model, arm.config.adapter):
            return arm.held_out.token_losses()
        if self.losses_of_base is None:
            self.losses_of_base = arm.held_out.token_losses()
        return self.losses_of_base

    def seed_dropout(self) -> None:
        """Lets the dropout of the next update follow from each arm's seed alone."""
        torch.manual_seed(self.arms[0].seed())
        if self.is_joint:
            for arm in self.arms:
                arm.joined.random.manual_seed(arm.seed())

    def start(self) -> None:
        """Puts the models into training mode, and starts the clock."""
        self.loss.train()
        for arm in self.arms:
            arm.loss.train()
        self.started, self.done_before = time.perf_counter(), self.bar.done

    def seconds_left(self) -> float:
        """How long the rest takes at the pace since the start, evaluations and checkpoints included."""
        done = max(1, self.bar.done - self.done_before)
        left = sum(arm.updates - arm.progress.update for arm in self.arms)
        return (time.perf_counter() - self.started) / done * left

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        for close in (self.team.close, self.bar.close, *(arm.tracker.finish for arm in self.arms)):
            close()


class Arm:
    """One run of a session, from its first update to its last.

    Args:
        base: what the adapter goes into; in a session of several arms, a twin of the base.
    """

    def __init__(self, session: Session, run: Run, base: PreTrainedModel, resume_from: Path | None) -> None:
        self.session, self.run, self.config, self.folder = session, run, run.config, run.folder
        config, folder, team, accelerator = run.config, run.folder, session.team, session.accelerator
        torch.manual_seed(config.train.seed)
        self.model = adapters.build(base, config.adapter)
        adapters.use_kernels(self.model, config.adapter.kernels)
        self.joined = JoinedAdapter.of(self.model, config.adapter) if session.is_joint else None
        self.trainable_count, self.total_count = adapters.parameter_counts(self.model)

        self.goes_on_here = resume_from is not None and folder.holds(resume_from)
        self.progress, moments = Progress(), None
        if resume_from is not None:
            self.progress, moments = load_checkpoint(resume_from, self.model, session.data.train.digest)
            if not self.goes_on_here:
                self.progress.forget_best()  # that adapter lies in another folder
        elif config.adapter.start_from is not None:
            load_start(self.model, config.adapter)

        groups = adapters.parameter_groups(self.model, config.adapter)
        self.optimizer = build_optimizer(groups, config.optimizer, team.device)
        loss = SupervisedLoss(self.model, base, accelerator.autocast)
        # `loss` under DDP or FSDP, and an optimizer that knows the gradient scaler
        self.loss, self.stepper = accelerator.prepare(loss, self.optimizer)
        if moments is not None:
            # After prepare: sharding replaces the parameters.
            load_optimizer_state(self.optimizer, moments, accelerator.scaler)
        self.weights = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

        self.local_loss = accelerator.unwrap_model(self.loss)
        if team.is_sharded:
            register_fsdp_forward_method(self.local_loss, "probe")  # the weights are whole only inside such methods
        if session.arms:
            self.local_loss.take_layout_of(session.arms[0].local_loss)
        else:
            choose_layout(config.train.batch_layout, self.local_loss, team.device)
        if config.train.compile:
            self.local_loss.compile_layers()

        data, tokens = session.data, config.train.micro_batch_tokens
        self.batches = MicroBatches(data.train, self.local_loss.is_flat, tokens, team.device)
        self.held_out = HeldOut(self.model, self.local_loss, data.evaluation, team, tokens, config.train.probe_tokens)
        self.exams = Exams(config, session.tokenizer, self.local_loss, team, [arm.exams for arm in session.arms])
        self.order = RowOrder(len(data.train), config.train.batch_size, config.train.seed)
        self.updates = config.train.max_updates or config.train.epochs * self.order.updates_per_epoch
        if resume_from is not None and not self.goes_on_here and self.progress.update >= self.updates:
            raise UserError(
                f"train.resume={resume_from} leaves nothing to do: this run ends at update {self.updates:,}. Set a "
                "larger train.max_updates or train.epochs."
            )
        self.tracker = Tracker()
        self._spectra: tuple[int, dict[str, ModuleSpectrum]] | None = None  # the update, and what was measured after it

    def begin(self) -> None:
        """Writes the config and the machine, and starts the tracker."""
        session, folder, done = self.session, self.folder, self.progress.update
        if not session.team.is_main:
            return
        if folder.result() is not None:  # by train.extend: else there would be nothing to begin
            print_line("extend", console.describe_extension(self))
            keep_end(folder.path)
        folder.rewind(done if self.goes_on_here else None)
        precision, fingerprint = self.run.precision, session.base_fingerprint
        folder.write_config(environment(session.team.processes, fingerprint, self.updates, precision))
        self.tracker = start_tracker(self.config.tracker, folder.config, self.config.name, folder.path, done)

    def spectra(self) -> dict[str, ModuleSpectrum]:
        """Those of the adapter as it is, measured once after an update."""
        if self._spectra is None or self._spectra[0] != self.progress.update:
            self._spectra = self.progress.update, self.held_out.spectra()
        return self._spectra[1]

    @property
    def is_done(self) -> bool:
        """Whether the last update is done, or the last evaluations brought no lower perplexity."""
        return self.progress.update >= self.updates or self.progress.out_of_patience(self.config.train.patience)

    @property
    def is_paused(self) -> bool:
        """Whether `train.stop_at` is reached before the end."""
        stop_at = self.config.train.stop_at
        return stop_at is not None and self.progress.update >= stop_at and not self.is_done

    def is_due(self, every: int | None) -> bool:
        """Whether something is due after this update."""
        return every is not None and self.progress.update % every == 0

    def seed(self) -> int:
        """What the dropout of the next update follows from, so that a resumed run draws what an uninterrupted one
        draws."""
        return (self.config.train.seed * 1_000_003 + self.progress.update) * 1_009 + self.session.team.process

    def note(self, text: str) -> None:
        """A line above the progress bar."""
        self.session.bar.note(f"{self.config.name}: {text}" if self.session.is_joint else text)

    def log(self, metrics: UpdateMetrics | EvaluationMetrics) -> None:
        """Writes a line of metrics.jsonl, and its mirror."""
        if self.session.team.is_main:
            line = metrics.to_json()
            self.folder.append_metrics(line)
            self.tracker.log({name: line[name] for name in line if "/" in name}, metrics.update)
