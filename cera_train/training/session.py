"""Everything that an update, an evaluation and a checkpoint need, built once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method

from cera_train.adapters import build as adapters
from cera_train.adapters.saved import load, read
from cera_train.adapters.spectrum import ModuleSpectrum
from cera_train.common.errors import UserError, errors_at
from cera_train.common.settings import AUTO
from cera_train.common.terminal import ProgressBar
from cera_train.common.trust import redact_tree
from cera_train.data.prepare import prepare_data
from cera_train.data.sources import decide_layouts
from cera_train.distributed.accelerator import start_accelerator, this_device
from cera_train.distributed.sharding import load_optimizer_state, share_frozen_weights
from cera_train.distributed.signals import Interruption
from cera_train.evaluation.engine import Sampler
from cera_train.evaluation.exams import Exams
from cera_train.evaluation.held_out import HeldOut
from cera_train.model.batches import MicroBatches, RowOrder
from cera_train.model.folder import check_length, load_tokenizer
from cera_train.model.loss import SupervisedLoss, can_compile, choose_layout
from cera_train.model.precision import Precision, choose_precision
from cera_train.model.weights import fingerprint, load_model, sample_digest
from cera_train.runs.folder import Progress, RunFolder, load_checkpoint
from cera_train.runs.records import load_config
from cera_train.runs.results import DIVERGED, METRICS, Environment, EvaluationMetrics, UpdateMetrics
from cera_train.runs.subject import digest_of, find_start, run_of
from cera_train.runs.tracking import Tracker, start_tracker
from cera_train.settings.adapters import AdapterConfig
from cera_train.settings.data import Layout
from cera_train.settings.model import Dtype
from cera_train.settings.run import Config
from cera_train.settings.training import ObjectiveKind, Resume
from cera_train.training.objectives import Sft
from cera_train.training.objectives.dpo import Dpo
from cera_train.training.objectives.grpo import Grpo
from cera_train.training.optimizer import Rate, auto_rate, build_optimizer

OBJECTIVES = {ObjectiveKind.sft: Sft, ObjectiveKind.dpo: Dpo, ObjectiveKind.grpo: Grpo}


class Settled(NamedTuple):
    """A config whose `auto` settings are decided, and where two of them come from."""

    config: Config
    precision: Precision
    rate: Rate


def settle(config: Config, folder: Path) -> Settled:
    """A config whose `auto` settings are decided: as in the run that this folder holds, else by
    this machine and the model. Raises UserError where a setting cannot work here."""
    adapters.check(config.adapter)
    config = replace(config, data=decide_layouts(config.data))
    begun = config if starts_anew(config, folder) else load_config(folder / "config.yaml")
    precision = choose_precision(config.model.dtype)
    if config.model.dtype == Dtype.auto != begun.model.dtype:
        precision = Precision(begun.model.dtype, f"as {folder} was begun")
    compiles = begun.train.compile if config.train.compile is None else config.train.compile
    if compiles is None:
        # whose every layer would be compiled anew
        device = this_device()
        is_dora = config.adapter.kind == "dora"
        compiles = device.type == "cuda" and not is_dora and can_compile(device)
    rate = Rate(config.optimizer.lr, "")
    if AUTO == config.optimizer.lr != begun.optimizer.lr:
        rate = Rate(begun.optimizer.lr, f"as {folder} was begun")
    elif rate.value == AUTO:
        rate = auto_rate(config.model, config.adapter, config.train.objective)
    adapter = config.adapter
    if adapter.start_from is not None:
        # The digest of a resumed run is the recorded one: the weights that it started from may be
        # gone.
        recorded = (
            begun.adapter.start_digest if adapter.start_from == begun.adapter.start_from else None
        )
        adapter = replace(adapter, start_digest=recorded or digest_of(find_start(adapter)))
    model = replace(config.model, dtype=precision.dtype)
    training = replace(config.train, compile=compiles)
    optimizer = replace(config.optimizer, lr=rate.value)
    # Files that are gone, as those of a finished run may be, leave their layout undecided.
    is_undecided = any(part.layout == Layout.auto for _, part in config.data.parts())
    files, begun_files = (
        [part.train_files for _, part in each.data.parts()] for each in (config, begun)
    )
    data = config.data
    if is_undecided and redact_tree(files) == begun_files:
        names = ("layout", "prompt", "completion", "rejected", "turns", "mix")
        data = replace(data, **{name: getattr(begun.data, name) for name in names})
    config = replace(
        config, model=model, adapter=adapter, data=data, optimizer=optimizer, train=training
    )
    return Settled(config, precision, rate)


def starts_anew(config: Config, folder: Path) -> bool:
    """Whether there is nothing to resume: no run in the folder, or one that diverged before its
    first checkpoint."""
    is_lost = (folder / DIVERGED).exists() and not any((folder / "checkpoints").glob("*"))
    return is_lost or config.train.resume == Resume.never or not (folder / "config.yaml").is_file()


def load_start(model: nn.Module, config: AdapterConfig, base_fingerprint: str) -> None:
    """Loads the weights that `adapter.start_from` names into a fresh adapter. Raises UserError
    where they are not those of the digest, or were trained on another base."""
    place = f"adapter.start_from={config.start_from}"
    folder = find_start(config)
    if (digest := digest_of(folder)) != config.start_digest:
        raise UserError(
            f"{place}: its weights have the digest {digest} now, and this run was begun with "
            f"{config.start_digest}. "
            "Restore them, or choose another name=... for a run from the new ones."
        )
    run = run_of(folder)
    record = run / "environment.json" if run is not None else Path()
    if record.is_file() and Environment.read(record).base_fingerprint not in (
        None,
        base_fingerprint,
    ):
        raise UserError(
            f"{place} was trained on other base weights than these: set model.path to its base "
            f"({load_config(run / 'config.yaml').model.path}), or start from another adapter."
        )
    with errors_at(place):
        load(model, read(folder))


class Session:
    """Everything that an update, an evaluation and a checkpoint of one run need. Building it writes
    nothing but DPO's reference; as a context manager it closes what it opened.

    Args:
        folder: open.
        resume_from: a checkpoint, as process 0 found it; None for a new run.
    """

    def __init__(self, settled: Settled, folder: RunFolder, resume_from: Path | None) -> None:
        self.config = config = settled.config
        self.precision = settled.precision
        self.rate = settled.rate
        self.folder = folder
        self.tokenizer = load_tokenizer(config.model)
        check_length(config.model, config.data.max_length, "data.max_length")
        self.data = prepare_data(
            config.data, self.tokenizer
        )  # before a process group and its time limit exist
        if (
            config.train.objective == ObjectiveKind.grpo
        ):  # part of a right answer would be another one
            self.data.train = self.data.train.uncut()
        self.accelerator = accelerator = start_accelerator(
            config.model, config.train.autocast, config.distributed
        )
        (resume_from,) = broadcast_object_list([resume_from])

        base = load_model(config.model, accelerator.device, accelerator.is_fsdp2)
        # before DoRA adds to it
        self.base_fingerprint = fingerprint(base)
        self.base_digest = sample_digest(base)
        torch.manual_seed(config.train.seed)
        has_autocast = accelerator.mixed_precision != "no"
        self.model = adapters.build(base, config.adapter, accelerator.is_fsdp2, has_autocast)
        self.trainable_count, self.total_count = adapters.parameter_counts(self.model)

        self.resumes = resume_from is not None
        self.progress = Progress(data_digest=self.data.train.digest)
        moments = None
        if resume_from is not None:
            self.progress, moments = load_checkpoint(
                resume_from, self.model, self.data.train.digest
            )
        elif config.adapter.start_from is not None:
            load_start(self.model, config.adapter, self.base_fingerprint)

        groups = adapters.parameter_groups(self.model, config.adapter)
        self.optimizer = build_optimizer(groups, config.optimizer, accelerator.device)
        loss = SupervisedLoss(self.model, base, accelerator.autocast)
        share_frozen_weights(loss)
        # `loss` under DDP or FSDP, and an optimizer that knows the gradient scaler
        self.loss, self.stepper = accelerator.prepare(loss, self.optimizer)
        self.local_loss = accelerator.unwrap_model(self.loss)
        if moments is not None:
            # After prepare: sharding replaces the parameters.
            load_optimizer_state(self.optimizer, moments, accelerator.scaler)
        self.weights = [
            parameter for parameter in self.model.parameters() if parameter.requires_grad
        ]
        if accelerator.is_fsdp2:
            register_fsdp_forward_method(
                self.local_loss, "probe"
            )  # the weights are whole only inside such methods
        choose_layout(config.train.batch_layout, self.local_loss, accelerator.device)
        if config.train.compile:
            self.local_loss.compile_layers()

        tokens = config.train.micro_batch_tokens
        self.batches = MicroBatches(
            self.data.train, self.local_loss.is_flat, tokens, accelerator.device
        )
        self.held_out = HeldOut(
            self.local_loss, self.data.evaluation, accelerator, tokens, config.train.probe_tokens
        )
        self.sampler = Sampler(
            config,
            self.tokenizer,
            self.local_loss,
            accelerator,
            self.progress,
            folder.path / "served",
        )
        self.exams = Exams(config, self.sampler)
        together = config.data.sequences
        self.order = RowOrder(
            len(self.data.train) // together, config.train.batch_size, config.train.seed, together
        )
        self.updates = (
            config.train.max_updates or config.train.epochs * self.order.updates_per_epoch
        )
        self.objective = OBJECTIVES[config.train.objective](self)
        self.tracker = Tracker()
        self.bar = ProgressBar(
            "update", self.updates, self.progress.update, visible=accelerator.is_main_process
        )
        self.interruption = Interruption()
        self.spectra: dict[str, ModuleSpectrum] = {}  # at the last evaluation

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        self.tracker.finish()
        self.sampler.close()

    def begin(self) -> None:
        """Writes the config and the machine, and starts the tracker."""
        folder = self.folder
        done = self.progress.update
        if not self.accelerator.is_main_process:
            return
        folder.rewind(self.progress if self.resumes else None)
        rows = {"train": self.data.train.digest, "held_out": self.data.evaluation.digest}
        processes = self.accelerator.num_processes
        folder.write_config(processes, self.base_fingerprint, rows, self.updates, self.precision)
        self.tracker = start_tracker(
            self.config.tracker, folder.config, self.config.name, folder.path, done
        )

    @property
    def is_done(self) -> bool:
        """Whether the last update and the evaluations so far end the run."""
        return self.ends_after(self.progress.evaluations_since_best)

    def ends_after(self, evaluations_since_best: int) -> bool:
        """Whether the last update is done, or so many evaluations brought no lower perplexity."""
        # Rewards rise where the perplexity of the rows' answers does not fall.
        patience = None if self.config.work.answers else self.config.train.patience
        is_out = patience is not None and evaluations_since_best >= patience
        return self.progress.update >= self.updates or is_out

    def is_due(self, every: int | None) -> bool:
        """Whether something is due after this update."""
        return every is not None and self.progress.update % every == 0

    def seed(self) -> int:
        """Seed of the next update's dropout: a resumed run draws what an uninterrupted one
        draws."""
        return (
            self.config.train.seed * 1_000_003 + self.progress.update
        ) * 1_009 + self.accelerator.process_index

    def log(self, metrics: UpdateMetrics | EvaluationMetrics) -> None:
        """Writes a line of metrics.jsonl, and its mirror."""
        if self.accelerator.is_main_process:
            line = metrics.to_json()
            self.folder.append(METRICS, line)
            self.tracker.log({name: line[name] for name in line if "/" in name}, metrics.update)
