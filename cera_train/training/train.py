"""A training run, top to bottom: decide every `auto`, open the folder, build the rows, the model
and its evaluation; then update, evaluate, save; then write what the next command needs."""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from cera_train.adapters.build import rank
from cera_train.adapters.spectrum import ModuleSpectrum, spectrum_metrics
from cera_train.common.errors import UserError
from cera_train.common.files import write_text
from cera_train.common.signals import Interrupted, Interruption, first_heard
from cera_train.common.terminal import counted, print_line, time_left
from cera_train.distributed.accelerator import peak_memory, prepare_memory, quiet_libraries
from cera_train.distributed.processes import in_processes, is_main_process
from cera_train.evaluation.held_out import probe_spectra, token_losses
from cera_train.evaluation.task_evaluation import TaskResults
from cera_train.model.compiled import count_graphs
from cera_train.model.language_model import perplexity
from cera_train.runs.card import push, write_card
from cera_train.runs.folder import Progress, RunFolder
from cera_train.runs.results import (
    LOSSES_AFTER,
    LOSSES_BEFORE,
    SAMPLES,
    SPECTRA,
    SPECTRUM,
    EvaluationMetrics,
    RunResult,
    UpdateMetrics,
    describe_rank,
    figure,
    is_task_figure,
    write_grades,
)
from cera_train.runs.subject import digest_of
from cera_train.runs.tracking import check_trackers
from cera_train.settings.run import Config
from cera_train.settings.training import TrainConfig
from cera_train.training import console
from cera_train.training.build import (
    Data,
    Evaluator,
    Model,
    build_data,
    build_evaluator,
    build_model,
)
from cera_train.training.log import Log, open_log
from cera_train.training.objectives import build_objective
from cera_train.training.objectives.objective import Objective, Update
from cera_train.training.optimizer import learning_rate, set_learning_rate
from cera_train.training.resolve import resolve
from cera_train.training.timetable import Timetable

Spectra = dict[str, ModuleSpectrum]


def launch(config: Config) -> dict[str, Any]:
    """Runs `train` in `launch.processes` processes, one a GPU, then uploads the adapter to
    `hub.push`."""
    result = in_processes(train, config)
    if is_main_process():
        push(config)
    return result


def train(config: Config) -> dict[str, Any]:
    """Fine-tunes an adapter by the config, or resumes where an earlier call stopped.

    Returns:
        The content of result.json: `eval/perplexity`, `perplexity_before`,
        `spectrum/effective_rank/mean`, ...

    Raises:
        UserError: the config, the data or the run's folder is not usable; the message says how to
            fix it.
        Interrupted: by SIGINT, SIGTERM, SIGUSR1 or SIGUSR2, after the update in progress was saved.
    """
    quiet_libraries()
    prepare_memory()
    path = Path(config.output_dir) / config.name
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(RunFolder.open(path, is_main_process()))
        resolved = resolve(config, path)
        config = resolved.config
        # The folder's contents decide whether there is anything to do.
        if (result := folder.result()) is not None:
            if folder.is_main:
                reached = f"perplexity {figure(result.perplexity, 2)}"
                print_line("finished", f"{path}: {reached}. Its result stands.")
            return result.replace(folder=str(path)).to_json()  # it may have been moved
        checkpoint = folder.newest_checkpoint() if folder.is_main else None

        check_trackers(config.tracker)
        # Everything that an update and an evaluation need.
        data, model, progress, evaluator, objective = build_parts(config, folder, checkpoint)
        stack.enter_context(contextlib.closing(evaluator.sampler))
        timetable = Timetable.of(config, data.updates)

        # From here on a signal waits for the end of an update.
        interruption = stack.enter_context(Interruption())
        log = stack.enter_context(open_log(resolved, folder, data, model, progress))
        console.print_start(resolved, folder.path, data, model, evaluator, progress)
        spectra: Spectra = {}
        if progress.update == 0 or progress.evaluation_pending:
            spectra = evaluate(model, evaluator, objective, timetable, progress, log)
        model.wrapped.train()
        while not timetable.is_done(progress):
            metrics, signal = update(config, data, model, objective, progress, folder, interruption)
            log_update(metrics, objective.headline(metrics), data.updates, log)
            is_last_update = progress.update == data.updates
            progress.evaluation_pending = timetable.evaluates(progress.update)
            if signal is not None and not is_last_update:
                # No evaluation: the sender may not wait for it.
                save_and_stop(signal, model, progress, log, config.train)
            if progress.evaluation_pending:
                with saved_on_error(model, progress, folder, config.train):
                    spectra = evaluate(model, evaluator, objective, timetable, progress, log)
            if timetable.saves(progress.update) and not timetable.is_done(progress):
                save_checkpoint(model, progress, folder, config.train)
        # A run that resumes after its last evaluation has no spectra yet.
        if not spectra:
            spectra = probe_spectra(model.language_model, evaluator.held_out, model.accelerator)
        return finish(config, data, model, progress, log, spectra)


def build_parts(
    config: Config, folder: RunFolder, checkpoint: Path | None = None
) -> tuple[Data, Model, Progress, Evaluator, Objective]:
    """The parts of a run whose `auto` settings are decided.

    Args:
        folder: of the run; only DPO writes into it, for its reference.
        checkpoint: to resume from; None for a new run.
    """
    data = build_data(config)
    model, progress = build_model(config, data, checkpoint)
    evaluator = build_evaluator(config, data, model, progress, folder.path)
    objective = build_objective(config, data, model, evaluator, folder, progress)
    return data, model, progress, evaluator, objective


# --- an update ------------------------------------------------------------------------------------


def update(
    config: Config,
    data: Data,
    model: Model,
    objective: Objective,
    progress: Progress,
    folder: RunFolder,
    interruption: Interruption,
) -> tuple[UpdateMetrics, int | None]:
    """An update on `train.batch_size` rows: one step of the optimizer.

    Returns:
        Its metrics, and a signal that one of the processes received meanwhile: all of them stop
        after the same update.
    """
    started = time.perf_counter()
    accelerator = model.accelerator
    sequences = data.order.sequences(progress.update)
    lr = begin_update(config, model, progress, data.updates)
    with saved_on_error(model, progress, folder, config.train):
        drawn = objective.draw(sequences)
        part = backward(model, drawn)
    loss, signal = reduce_loss(part, interruption, accelerator)
    grad_norm = clip_gradients(model, config.optimizer.max_grad_norm)
    if has_diverged(loss, grad_norm, accelerator.scaler):
        rows = f"(training rows {sequences})"
        what = f"the loss of update {progress.update + 1} or its gradient is not finite {rows}"
        raise_diverged(what, folder)
    model.optimizer.step()
    model.optimizer.zero_grad()

    seconds = time.perf_counter() - started
    progress.updated(drawn.tokens, seconds, data.order.updates_per_epoch)
    metrics = UpdateMetrics(
        update=progress.update,
        epoch=progress.epoch,
        loss=loss,
        perplexity=perplexity(loss),
        grad_norm=grad_norm,
        lr=lr,
        tokens_per_s=drawn.tokens / seconds,
        seconds=progress.seconds,
        **drawn.figures,
    )
    return metrics, signal


def begin_update(config: Config, model: Model, progress: Progress, updates: int) -> float:
    """Seeds dropout and sets the learning rate; returns the rate."""
    process = model.accelerator.process_index
    torch.manual_seed(seed_of(config.train.seed, progress.update, process))
    lr = learning_rate(config.optimizer, progress.update, updates)
    set_learning_rate(model.optimizer, lr)
    return lr


def backward(model: Model, drawn: Update) -> torch.Tensor:
    """Accumulates the gradient of an update; returns this process's part of the loss, a scalar."""
    accelerator = model.accelerator
    total = torch.zeros((), device=accelerator.device)
    micro_batches = drawn.batches.of_process(accelerator, drawn.sequences)
    for number, (group, is_real) in enumerate(micro_batches, start=1):
        reduces = number == len(micro_batches)  # the gradients over the processes
        with contextlib.nullcontext() if reduces else accelerator.no_sync(model.wrapped):
            log_p = -model.wrapped(drawn.batches.load(group))
            loss = drawn.loss(log_p, group) if is_real else 0 * log_p.sum()
            accelerator.backward(loss)
        total += loss.detach()
    return total


def reduce_loss(
    part: torch.Tensor, interruption: Interruption, accelerator: Accelerator
) -> tuple[float, int | None]:
    """The loss over all processes, and a signal that one of them received: in one tensor, since
    reading another would wait for the GPU once more."""
    heard = torch.tensor(interruption.heard(), device=accelerator.device)
    loss, *heard = accelerator.reduce(torch.cat([part[None], heard]), reduction="mean").tolist()
    return loss, first_heard(heard)


def clip_gradients(model: Model, max_norm: float) -> float:
    """Scales the gradients down to this norm; returns the norm that they had."""
    model.accelerator.unscale_gradients()  # Accelerate's own clipping does so twice under FSDP
    return float(torch.nn.utils.clip_grad_norm_(model.trained, max_norm))


def seed_of(seed: int, update: int, process: int) -> int:
    """Seed of an update's dropout: a resumed run draws what an uninterrupted one draws."""
    return (seed * 1_000_003 + update) * 1_009 + process


def has_diverged(loss: float, grad_norm: float, scaler: Any) -> bool:
    """Whether the loss or its gradient is not finite.

    A gradient scaler (float16) skips an update whose gradient overflows, and halves its scale.
    Below 1, scaling cannot be the cause.
    """
    is_skipped = scaler is not None and scaler.get_scale() >= 1
    return not math.isfinite(loss) or not (math.isfinite(grad_norm) or is_skipped)


def log_update(metrics: UpdateMetrics, headline: str, updates: int, log: Log) -> None:
    """Writes the metrics of an update and its progress line."""
    log.metrics(metrics)
    speed = f"{figure(metrics.tokens_per_s, 0)} tokens/s"
    left = time_left(metrics.seconds / metrics.update * (updates - metrics.update))
    log.bar.step(f"{headline}  {speed}{left}")


class Diverged(UserError):
    """Training has diverged: what the model is now is not saved."""


def raise_diverged(what: str, folder: RunFolder) -> None:
    """Records that training has diverged, and raises Diverged. `what` is not finite."""
    checkpoints = folder.checkpoints()
    kept = "There was no checkpoint yet"
    if checkpoints:
        kept = f"The last checkpoint, {checkpoints[-1]}, is kept"
    message = (
        f"{what}. {kept}. Lower optimizer.lr, add optimizer.warmup_ratio, or look at these rows."
    )
    folder.mark_diverged(message)
    raise Diverged(message)


# --- beside the updates ---------------------------------------------------------------------------


def evaluate(
    model: Model,
    evaluator: Evaluator,
    objective: Objective,
    timetable: Timetable,
    progress: Progress,
    log: Log,
) -> Spectra:
    """Logs the loss on the held-out rows, the spectra of the adapter and the accuracy on the tasks
    that are due. Keeps the adapter if it is the best so far. Before the first update and after the
    last, also writes the loss of every token, which studies compare.

    Returns:
        The spectra, by the name of the projection.
    """
    folder = log.folder
    measured = (model.language_model, evaluator.held_out, model.accelerator)
    rows = counted(len(evaluator.held_out.lengths), "held-out row")
    log.bar.show_work(f"measures perplexity on {rows}")
    losses, judged = objective.judge(token_losses(*measured))
    loss = losses.mean
    was_finite = math.isfinite(progress.perplexity_before or math.inf)
    if was_finite and not math.isfinite(loss):
        raise_diverged(f"the held-out loss after update {progress.update} is not finite", folder)
    spectra = probe_spectra(*measured)
    since_best = progress.since_best(perplexity(loss))
    ends_run = timetable.ends_after(progress, since_best)
    answered = evaluator.tasks.run(progress.update, ends_run, log.bar.show_work)
    keep_answers(answered, ends_run, progress.update, log)

    figures = spectrum_metrics(spectra)
    figures |= judged | answered.figures
    if folder.is_main and progress.update == 0:
        losses.write(folder.path / LOSSES_BEFORE)
    if folder.is_main and ends_run:
        losses.write(folder.path / LOSSES_AFTER)
    metrics = EvaluationMetrics(progress.update, progress.epoch, loss, perplexity(loss), **figures)
    log.metrics(metrics)
    if folder.is_main and spectra:
        modules = {name: spectrum.figures() for name, spectrum in spectra.items()}
        folder.append(SPECTRA, {"update": progress.update, "modules": modules})
    if since_best == 0:
        best = EvaluationMetrics(progress.update, perplexity=metrics.perplexity)
        folder.save_best(model.adapted, best)
    # Last: a run that resumes after an error repeats an evaluation that was not counted.
    progress.evaluated(perplexity(loss), figures.get("spectrum/linear_share/mean"))
    progress.tasks |= {name: value for name, value in figures.items() if is_task_figure(name)}
    numbers = f"perplexity {figure(metrics.perplexity)}"
    if effective_rank := describe_rank(metrics.spectrum):
        numbers += f", effective rank {effective_rank}"
    log.bar.note(f"evaluation at update {progress.update}: {numbers}")
    return spectra


def keep_answers(results: TaskResults, ends_run: bool, update: int, log: Log) -> None:
    """Writes samples, and the grades after the last update, to the run's folder."""
    if log.folder.is_main:
        if ends_run:
            for name, problems in results.graded.items():
                write_grades(log.folder.path, name, problems)
        for sample in results.samples:
            log.folder.append(SAMPLES, sample.to_json())
    if results.notes:
        log.bar.note(f"answers at update {update}: {'; '.join(results.notes)}")


def save_checkpoint(
    model: Model, progress: Progress, folder: RunFolder, config: TrainConfig
) -> None:
    """Saves a checkpoint of this update."""
    scaler = model.accelerator.scaler
    folder.save_checkpoint(model.adapted, model.optimizer, progress, config.keep, scaler)


@contextlib.contextmanager
def saved_on_error(
    model: Model, progress: Progress, folder: RunFolder, config: TrainConfig
) -> Iterator[None]:
    """Saves the updates so far when an error ends the run between two of them, such as a failing
    reward or a row that needs too much memory."""
    try:
        yield
    except Diverged:
        raise
    except Exception as error:
        # Sharded weights are saved by all processes, and only a UserError is raised in all.
        can_save = isinstance(error, UserError) or not model.accelerator.is_fsdp2
        if progress.update > 0 and can_save:
            with contextlib.suppress(Exception):  # the cause counts, such as a full disk
                save_checkpoint(model, progress, folder, config)
        raise


def save_and_stop(
    signal: int, model: Model, progress: Progress, log: Log, config: TrainConfig
) -> None:
    """Saves and ends the run: always raises Interrupted."""
    save_checkpoint(model, progress, log.folder, config)
    log.bar.close()
    if log.folder.is_main:
        saved = f"after update {progress.update}, saved"
        print_line("stopped", f"{saved}. The same command resumes it.")
    log.tracker.finish()
    model.accelerator.wait_for_everyone()  # a launcher ends all processes as soon as one has ended
    raise Interrupted(signal)


def finish(
    config: Config,
    data: Data,
    model: Model,
    progress: Progress,
    log: Log,
    spectra: Spectra,
) -> dict[str, Any]:
    """The final adapter, its spectrum and card, and result.json, which marks the run as
    finished."""
    folder = log.folder
    log.bar.close()
    save_checkpoint(model, progress, folder, config.train)
    result = RunResult(
        **progress.model_dump(include={*RunResult.model_fields}),
        adapter_kind=config.adapter.kind.value,
        adapter_r=rank(model.adapted),
        trainable_parameters=model.trainable_count,
        trainable_share=model.trainable_count / model.total_count,
        updates=progress.update,
        epochs=progress.update / data.order.updates_per_epoch,
        tokens_per_s=progress.tokens / progress.seconds,
        peak_memory_bytes=peak_memory(model.accelerator.device),
        attention=model.language_model.attention,
        compiled_graphs=count_graphs() if config.train.compile else 0,
        fallbacks=[*model.language_model.allowed.refused],
        folder=str(folder.path),
        **spectrum_metrics(spectra) | progress.tasks,
    )
    folder.save_final(model.adapted, data.tokenizer)
    if folder.is_main:
        if spectra:  # a method may have no spectra
            write_spectrum(folder.path / SPECTRUM, spectra)
        write_card(folder.path, result, model.adapted.config)
        result = result.replace(adapter_digest=digest_of(folder.path / "adapter"))
        result.write(folder.path / "result.json")  # the last file: it marks the run as finished
        console.print_result(result, config)
    model.accelerator.wait_for_everyone()  # a study looks for result.json in every process
    return result.to_json()


def write_spectrum(path: Path, spectra: Spectra) -> None:
    """The figures and the singular values of every projection."""
    modules = {
        name: spectrum.figures() | {"singular_values": spectrum.singular_values.tolist()}
        for name, spectrum in spectra.items()
    }
    write_text(path, json.dumps(modules, indent=2) + "\n")
