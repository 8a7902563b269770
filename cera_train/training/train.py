"""The training loop, top to bottom: build everything, then update, evaluate, save; then leave what the next command
needs."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cera_train.adapters.spectrum import ModuleSpectrum, spectrum_metrics
from cera_train.common.errors import UserError
from cera_train.common.files import find_damage
from cera_train.common.settings import to_plain
from cera_train.common.terminal import print_line
from cera_train.distributed.accelerator import forget_earlier_runs, peak_memory, quiet_libraries
from cera_train.distributed.processes import is_main_process
from cera_train.distributed.signals import Interrupted, first_heard
from cera_train.model.loss import perplexity
from cera_train.runs import results
from cera_train.runs.card import write_card
from cera_train.runs.folder import RunFolder
from cera_train.runs.lines import describe_evaluation
from cera_train.runs.outcomes import LOSSES_AFTER, LOSSES_BEFORE
from cera_train.runs.results import (
    EvaluationMetrics,
    ModuleSpectrumRecord,
    RunResult,
    SpectrumSummary,
    TaskFigures,
    UpdateMetrics,
)
from cera_train.settings.run import Config
from cera_train.training import console
from cera_train.training.coverage import prove_coverage
from cera_train.training.optimizer import learning_rate, set_learning_rate
from cera_train.training.picture import draw_run
from cera_train.training.session import Arm, Run, Session, settle
from cera_train.training.tasks import evaluate_tasks
from cera_train.training.together import shared_settings


def train(config: Config) -> dict[str, Any]:
    """Fine-tunes an adapter by the config, or goes on where an earlier call was cut.

    Returns:
        The content of result.json: `eval/perplexity`, `perplexity_before`, `spectrum/effective_rank/mean`, ...; of a
        run that pauses at `train.stop_at`, `update` and `eval/perplexity`.

    Raises:
        UserError: the config, the data or the run's folder is not usable; the message has the mend.
        Interrupted: by SIGINT, SIGTERM, SIGUSR1 or SIGUSR2, after the update in progress was saved.
    """
    (outcome,) = train_together([config])
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def train_together(configs: Sequence[Config]) -> list[dict[str, Any] | Exception]:
    """`train` for several runs on one base, each with the numbers it would have alone. Returns what each call would
    return or raise. `training.together` chooses runs that can share a base."""
    quiet_libraries()
    forget_earlier_runs()
    with contextlib.ExitStack() as folders:
        found = [find(config, folders) for config in configs]
        runs = [run for run in found if isinstance(run, Run)]
        for run in [run for run in runs if shared_settings(run.config) != shared_settings(runs[0].config)]:
            run.outcome = UserError(
                f"{run.folder.path} was begun in another precision than the others: train it alone."
            )
            runs.remove(run)
        if runs:
            with Session(runs) as session, session.interruption:
                if session.arms:
                    run_session(session)
    return [run.outcome if isinstance(run, Run) else run for run in found]


def find(config: Config, folders: contextlib.ExitStack) -> Run | dict[str, Any] | Exception:
    """What is to do for a run; or what a finished one left, or why it cannot begin."""
    try:
        path = Path(config.output_dir) / config.name
        config, precision = settle(config, path)
        folder = folders.enter_context(RunFolder(path, to_plain(config), is_main_process()))
        resume_from = where_to_resume(folder, config.train.resume) if folder.is_main else None
        result = finished_result(folder)
    except Exception as error:
        return error
    return Run(config, precision, folder, resume_from) if result is None else result


def run_session(session: Session) -> None:
    """Trains the arms of a session to their ends."""
    for arm in session.arms[:]:
        with session.alone(arm.run):
            arm.begin()
    console.print_start(session)
    for arm in session.arms[:]:
        with session.alone(arm.run):
            prove_coverage(arm)
            if arm.progress.update == 0 or arm.progress.evaluation_pending:
                evaluate(arm)
    end_arms(session)
    session.start()
    while session.arms:
        signal = update(session)
        for arm in session.arms:
            is_last = arm.progress.update == arm.updates
            arm.progress.evaluation_pending = is_last or arm.is_due(arm.config.train.eval_every)
        if signal is not None and any(arm.progress.update < arm.updates for arm in session.arms):
            stop(session, signal)  # without the evaluations: whoever sent the signal may not wait for them
        for arm in session.arms[:]:
            with session.alone(arm.run):
                if arm.progress.evaluation_pending:
                    evaluate(arm)
                if arm.is_due(arm.config.train.save_every) and not arm.is_done:
                    save(arm)
        end_arms(session)


def end_arms(session: Session) -> None:
    """Lets go of the arms that are done, and of those that `train.stop_at` pauses."""
    for arm in session.arms[:]:
        if arm.is_done or arm.is_paused:
            with session.alone(arm.run):
                session.leave(arm.run, finish(arm) if arm.is_done else pause(arm))


# --- one update ------------------------------------------------------------------------------------------------------


def update(session: Session) -> int | None:
    """One step of each arm's optimizer, each on its `train.batch_size` sequences, by passes that all arms share.
    Returns the signal that a process heard meanwhile."""
    started, arms = time.perf_counter(), session.arms[:]
    rows = [arm.order.sequences(arm.progress.update) for arm in arms]
    session.seed_dropout()
    losses, signal = agree(session, backward(session, rows))
    tokens = [sum(session.batches.lengths[row] for row in rows_of_arm) for rows_of_arm in rows]
    seconds = time.perf_counter() - started
    lines = []
    for arm, *numbers in zip(arms, rows, losses, tokens, strict=True):
        with session.alone(arm.run):
            lines.append(step(arm, *numbers, seconds * numbers[-1] / sum(tokens)))
    if lines:
        session.bar.step(console.describe_updates(lines, session.seconds_left()), len(lines))
    return signal


def backward(session: Session, rows: list[list[int]]) -> torch.Tensor:
    """For each arm the gradient of the mean loss over the supervised tokens of its rows; returns this process's part of
    these losses, [arms]."""
    team, batches = session.team, session.batches
    supervised = [sum(batches.supervised[row] for row in rows_of_arm) for rows_of_arm in rows]
    # A mean over the tokens of all processes, whose gradients are averaged.
    scale = team.processes / torch.tensor(supervised, device=team.device)
    total = torch.zeros(len(rows), device=team.device)
    for (group, counts), is_last in team.passes(session.passes(rows)):
        with contextlib.nullcontext() if is_last else session.accelerator.no_sync(session.loss):
            losses = counts * scale * session.loss(batches.load(group))
            session.accelerator.backward(losses.sum())
        total += losses.detach()
    return total


def agree(session: Session, losses: torch.Tensor) -> tuple[list[float], int | None]:
    """The losses over all processes, and the signal that one of them heard: all stop at the same update."""
    heard = torch.tensor(session.interruption.heard(), device=session.team.device)
    numbers = session.team.reduce(torch.cat([losses, heard]), reduction="mean").tolist()
    return numbers[: len(losses)], first_heard(numbers[len(losses) :])


def step(arm: Arm, rows: list[int], loss: float, tokens: int, seconds: float) -> UpdateMetrics:
    """Moves the weights of an arm along their gradient. `seconds`: its share, by tokens, of the passes."""
    config, progress, started = arm.config, arm.progress, time.perf_counter()
    lr = learning_rate(config.optimizer, progress.update, arm.updates)
    set_learning_rate(arm.optimizer, lr)
    grad_norm = float(arm.session.accelerator.clip_grad_norm_(arm.weights, config.optimizer.max_grad_norm))
    check_finite(arm, rows, loss, grad_norm)
    arm.stepper.step()
    arm.stepper.zero_grad()

    seconds += time.perf_counter() - started
    progress.updated(tokens, seconds, arm.order)
    metrics = UpdateMetrics(
        progress.update, progress.epoch, loss, perplexity(loss), grad_norm, lr, tokens / seconds, progress.seconds
    )
    arm.log(metrics)
    return metrics


def check_finite(arm: Arm, rows: list[int], loss: float, grad_norm: float) -> None:
    """Raises UserError where training has diverged."""
    # A gradient scaler (float16) skips an update whose gradient overflows, and halves its scale. A scale below 1 is not
    # what makes it overflow.
    scaler = arm.session.accelerator.scaler
    if math.isfinite(loss) and (math.isfinite(grad_norm) or (scaler is not None and scaler.get_scale() >= 1)):
        return
    checkpoints = arm.folder.checkpoints()
    kept = f"The last checkpoint, {checkpoints[-1]}, is kept" if checkpoints else "There was no checkpoint yet"
    raise UserError(
        f"the loss of update {arm.progress.update + 1} or its gradient is not finite (training rows {rows}). "
        f"{kept}. Lower optimizer.lr, add optimizer.warmup_ratio, or look at these rows."
    )


# --- beside the updates ----------------------------------------------------------------------------------------------


def evaluate(arm: Arm) -> None:
    """Losses on the held-out rows, the spectra of the adapter, and answers to the tasks that are due. Keeps the adapter
    if it is the best so far. Before the first update and after the last, also writes each token's loss, which studies
    compare."""
    session, progress, folder = arm.session, arm.progress, arm.folder
    losses = session.token_losses(arm)
    loss = losses.mean
    spectra = arm.spectra()
    is_best = progress.evaluated(perplexity(loss))
    tasks = evaluate_tasks(arm, is_last=arm.is_done)
    if session.team.is_main:
        for name, is_due in ((LOSSES_BEFORE, progress.update == 0), (LOSSES_AFTER, arm.is_done)):
            if is_due:
                losses.write(folder.path / name)
    metrics = EvaluationMetrics(progress.update, progress.epoch, loss, perplexity(loss), summary(spectra), tasks)
    arm.log(metrics)
    if session.team.is_main and spectra:
        records = spectrum_records(spectra)
        modules = {name: replace(module, singular_values=None).to_json() for name, module in records.items()}
        folder.append_spectra({"update": progress.update, "modules": modules})
    if is_best:
        folder.save_best(arm.model, EvaluationMetrics(progress.update, perplexity=metrics.perplexity))
    arm.note(describe_evaluation(metrics))


def summary(spectra: dict[str, ModuleSpectrum]) -> SpectrumSummary:
    return SpectrumSummary.from_json(spectrum_metrics(spectra), "spectra")


def spectrum_records(spectra: dict[str, ModuleSpectrum]) -> dict[str, ModuleSpectrumRecord]:
    """The spectrum of each module, as it is written."""
    return {
        name: ModuleSpectrumRecord(
            *(module.effective_rank, module.manifold_dimension, module.dead_units),
            *(module.singular_values.tolist(), module.linear_share, module.gamma),
        )
        for name, module in spectra.items()
    }


def save(arm: Arm) -> None:
    """A checkpoint of this update."""
    session = arm.session
    session.team.arrive()
    digest, keep, scaler = session.data.train.digest, arm.config.train.keep, session.accelerator.scaler
    arm.folder.save_checkpoint(arm.model, arm.optimizer, arm.progress, digest, keep, scaler)


def stop(session: Session, signal: int) -> None:
    """Saves and ends all runs: always raises Interrupted."""
    for arm in session.arms:
        save(arm)
    session.bar.close()
    if session.team.is_main:
        updates = " ".join(str(arm.progress.update) for arm in session.arms)
        command = "same command" if session.config.train.resume == "auto" else "command with train.resume=auto"
        print_line("stopped", f"after update {updates}, saved. The {command} goes on.")
    for arm in session.arms:
        arm.tracker.finish()
    session.accelerator.wait_for_everyone()  # a launcher ends all as soon as one has ended
    raise Interrupted(signal)


def pause(arm: Arm) -> dict[str, Any]:
    """Evaluates and saves at `train.stop_at`. This evaluation is no candidate for the best and takes no patience: the
    run ends as if it had not been paused."""
    progress = arm.progress
    if arm.is_due(arm.config.train.eval_every):  # it was evaluated in the loop
        metrics = EvaluationMetrics(progress.update, progress.epoch, perplexity=progress.perplexity)
    else:
        loss = arm.held_out.token_losses().mean
        metrics = EvaluationMetrics(progress.update, progress.epoch, loss, perplexity(loss))
        arm.log(metrics)
        arm.note(describe_evaluation(metrics))
    save(arm)
    arm.note(f"paused after update {progress.update:,} of {arm.updates:,}, saved. Without train.stop_at it goes on.")
    return metrics.to_json()


def finish(arm: Arm) -> dict[str, Any]:
    """The final adapter, its spectrum, card and picture, and result.json, which marks the run as finished."""
    session, config, folder, progress = arm.session, arm.config, arm.folder, arm.progress
    if not session.is_joint:
        session.bar.close()
    save(arm)
    spectra = arm.spectra()
    result = RunResult(
        perplexity=progress.perplexity,
        perplexity_before=progress.perplexity_before,
        best_perplexity=progress.best_perplexity,
        best_update=progress.best_update,
        spectrum=summary(spectra),
        tasks=TaskFigures(progress.tasks),
        adapter_kind=config.adapter.kind.value,
        adapter_r=config.adapter.r,
        trainable_parameters=arm.trainable_count,
        trainable_share=arm.trainable_count / arm.total_count,
        updates=progress.update,
        epochs=progress.update / arm.order.updates_per_epoch,
        tokens=progress.tokens,
        tokens_per_s=progress.tokens / progress.seconds,
        seconds=progress.seconds,
        peak_memory_bytes=peak_memory(session.team.device),
        folder=str(folder.path),
    )
    session.team.arrive()
    folder.save_final(arm.model, session.tokenizer)
    if session.team.is_main:
        modules = spectrum_records(spectra)
        if modules:  # a method may have no spectrum
            results.write_spectrum(folder.path / "spectrum.json", modules)
        write_card(folder.path, result)
        picture = draw_run(folder.path, results.mean_spectrum(modules), config.name)
        result.write(folder.path / "result.json")  # the last file: from here on the run is finished
        arm.tracker.picture("run", picture, progress.update)
        arm.tracker.adapter(folder.path / "adapter")
        if session.is_joint:
            arm.note(f"finished: {console.describe_result(result)}")
        else:
            console.print_result(result, config)
    return result.to_json()


# --- where a run begins ----------------------------------------------------------------------------------------------


def finished_result(folder: RunFolder) -> dict[str, Any] | None:
    """What a finished run left, printed in a line."""
    result = folder.standing_result()
    if result is None:
        return None
    if folder.is_main:
        print_line("finished", f"{folder.path}: perplexity {result.perplexity:.2f}. Its result stands.")
    return result.to_json()


def where_to_resume(folder: RunFolder, resume: str) -> Path | None:
    """The checkpoint to go on from, or None for a new run. Raises UserError where the folder holds a run that must not
    be overwritten or has another config, or only damaged checkpoints."""
    folder.check_may_run(resume)
    if resume == "auto":
        return None if folder.standing_result() is not None else folder.last_sound_checkpoint()
    if resume == "never":
        return None
    if (damage := find_damage(Path(resume))) is not None:
        raise UserError(f"train.resume={resume} is damaged ({damage}). Restore it, or go on from another checkpoint.")
    return Path(resume)
