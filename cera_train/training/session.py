"""Everything that an update, an evaluation and a checkpoint need, built once: a `Session` is what runs on one base
share, an `Arm` what belongs to one of them. Most sessions have one arm."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import PreTrainedModel

from cera_train.adapters import build as adapters
from cera_train.adapters.config import Kernels
from cera_train.adapters.together import JoinedAdapter, SharedLoss, twin
from cera_train.common.terminal import ProgressBar
from cera_train.config import Config
from cera_train.data.batches import MicroBatches, RowOrder, SharedMicroBatches
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
from cera_train.training.optimizer import build_optimizer
from cera_train.training.tasks import Exams
from cera_train.training.tracking import Tracker, start_tracker


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
    return replace(config, model=replace(config.model, dtype=precision.dtype), adapter=adapter), precision


Result = TypeVar("Result")


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
        runs: one, or several that `training.together.may_share` a base. One that cannot be built gets its error as
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
        for run, checkpoint in zip(runs, resume_from, strict=True):
            with self.alone(run):
                self.arms.append(Arm(self, run, twin(base) if self.is_joint else base, checkpoint))
        self.lanes = shared_lanes(self, base) if self.is_joint else [Lane(arm) for arm in self.arms]
        self.threads = threads_of(self.lanes)
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
        for number, arm in enumerate(self.arms):
            if arm.run is run:
                del self.arms[number]
                arm.tracker.finish()

    def shares(self) -> list[tuple[Lane, list[Arm]]]:
        """The lanes of an update, each with the arms that it takes."""
        count = min(len(self.lanes), len(self.arms))
        return [(lane, self.arms[number::count]) for number, lane in enumerate(self.lanes[:count])]

    def in_threads(self, act: Callable[..., Result], calls: Sequence[tuple]) -> list[Callable[[], Result]]:
        """Calls an action with each of these arguments, in a thread where there are several. Returns what gives the
        results, or raises the errors."""
        if self.threads is None or len(calls) < 2:
            return [functools.partial(act, *arguments) for arguments in calls]
        return [self.threads.submit(act, *arguments).result for arguments in calls]

    def start(self) -> None:
        """Puts the models into training mode, and starts the clock."""
        for trained in (*self.lanes, *self.arms):
            trained.loss.train()
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
        if self.threads is not None:
            self.threads.shutdown()


class Lane:
    """The way of one run's sequences through the base."""

    def __init__(self, arm: Arm) -> None:
        self.loss, self.batches, self.team = arm.loss, arm.batches, arm.session.team

    def passes(self, arms: list[Arm], rows: list[list[int]]) -> list[tuple[Any, bool]]:
        """This process's micro-batches of each arm's rows, and whether each counts."""
        (rows_of_arm,), team = rows, self.team
        return self.batches.passes(rows_of_arm, team.processes, team.process, in_step=team.is_sharded)


class SharedLane(Lane):
    """The way of the sequences of any of the arms through their base. A thread has one for itself."""

    def __init__(self, session: Session, base: PreTrainedModel, max_tokens: int) -> None:
        first, self.team = session.arms[0], session.team
        loss = SharedLoss(base, [arm.joined for arm in session.arms], session.accelerator.autocast)
        loss.take_layout_of(first.local_loss)
        self.loss = session.accelerator.prepare(loss)
        self.batches = SharedMicroBatches(first.batches.up_to(max_tokens))

    def passes(self, arms: list[Arm], rows: list[list[int]]) -> list[tuple[Any, bool]]:
        self.loss.arms = [arm.joined for arm in arms]
        return [(group, True) for group in self.batches.passes(rows)]


def shared_lanes(session: Session, base: PreTrainedModel) -> list[Lane]:
    """One for each core of a CPU, while there are arms for it: an arm is to a core what threads are to an update of one
    run, without their waiting for each other. A GPU takes all arms in one lane."""
    config, arms = session.config, session.arms
    cores = torch.get_num_threads() if session.team.device.type == "cpu" else 1
    count = min(cores, len(arms))
    tokens = max(config.train.micro_batch_tokens // max(1, count), config.data.max_length)  # of all lanes together
    return [SharedLane(session, twin(base), tokens) for _ in range(count)]


def threads_of(lanes: list[Lane]) -> ThreadPoolExecutor | None:
    """A thread for each of several lanes, with its share of the cores."""
    if len(lanes) < 2:
        return None
    cores = torch.get_num_threads()
    pool = ThreadPoolExecutor(len(lanes), "lane", torch.set_num_threads, (max(1, cores // len(lanes)),))
    barrier = threading.Barrier(len(lanes) + 1)
    for _ in lanes:  # starts all of them
        pool.submit(barrier.wait)
    barrier.wait()
    torch.set_num_threads(cores)  # of this thread, and of those that others start
    return pool


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
        self.trainable_count, self.total_count = adapters.parameter_counts(self.model)

        self.goes_on_here = resume_from is not None and folder.holds(resume_from)
        self.progress, moments = Progress(), None
        if resume_from is not None:
            self.progress, moments = load_checkpoint(resume_from, self.model, session.data.train.digest)
            if not self.goes_on_here:
                self.progress.forget_best()  # that adapter lies in another folder

        groups = adapters.parameter_groups(self.model, config.adapter)
        self.optimizer = build_optimizer(groups, config.optimizer, team.device)
        loss = SupervisedLoss(self.model, base, accelerator.autocast)
        # `loss` under DDP or FSDP, and an optimizer that knows the gradient scaler
        self.loss, self.stepper = accelerator.prepare(loss, self.optimizer)
        if moments is not None:
            load_optimizer_state(self.optimizer, moments)  # after prepare: sharding replaces the parameters
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
        self.exams = Exams(config, session.tokenizer, self.local_loss, team)
        self.order = RowOrder(len(data.train), config.train.batch_size, config.train.seed)
        self.updates = config.train.max_updates or config.train.epochs * self.order.updates_per_epoch
        self.rows: list[int] = []
        """Of the update in progress."""
        self.tracker = Tracker()
        if session.is_joint:
            self.joined = JoinedAdapter.of(self.model, config.adapter)

    def begin(self) -> None:
        """Writes the config and the machine, and starts the tracker."""
        session, folder, done = self.session, self.folder, self.progress.update
        if not session.team.is_main:
            return
        folder.rewind(done if self.goes_on_here else None)
        precision, fingerprint = self.run.precision, session.base_fingerprint
        folder.write_config(environment(session.team.processes, fingerprint, self.updates, precision))
        self.tracker = start_tracker(self.config.tracker, folder.config, self.config.name, folder.path, done)

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

    def seed_dropout(self) -> None:
        """Lets the dropout of the next update follow from seed, update and process: a resumed run draws what an
        uninterrupted one draws."""
        seed = (self.config.train.seed * 1_000_003 + self.progress.update) * 1_009 + self.session.team.process
        torch.manual_seed(seed)
        if self.session.is_joint:
            self.joined.random.manual_seed(seed)

    def note(self, text: str) -> None:
        """A line above the progress bar."""
        self.session.bar.note(f"{self.config.name}: {text}" if self.session.is_joint else text)

    def log(self, metrics: UpdateMetrics | EvaluationMetrics) -> None:
        """Writes a line of metrics.jsonl, and its mirror."""
        if self.session.team.is_main:
            line = metrics.to_json()
            self.folder.append_metrics(line)
            self.tracker.log({name: line[name] for name in line if "/" in name}, metrics.update)
