"""A training run, top to bottom: build everything, then update, evaluate, save; then leave what the
next command needs."""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cera_train.adapters.build import rank
from cera_train.adapters.spectrum import spectrum_metrics
from cera_train.cera.coverage import Coverage
from cera_train.common.errors import UserError
from cera_train.common.files import write_text
from cera_train.common.settings import to_plain
from cera_train.common.terminal import duration, print_line
from cera_train.distributed.accelerator import forget_earlier_runs, peak_memory, quiet_libraries
from cera_train.distributed.processes import in_processes, is_main_process
from cera_train.distributed.signals import Interrupted, first_heard
from cera_train.evaluation.held_out import shared_out
from cera_train.model.loss import perplexity
from cera_train.runs.card import push, write_card
from cera_train.runs.folder import RunFolder
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
from cera_train.settings.run import Config
from cera_train.settings.training import Resume
from cera_train.training import console
from cera_train.training.objectives import Drawn
from cera_train.training.optimizer import learning_rate, set_learning_rate
from cera_train.training.session import Session, settle


def launch(config: Config) -> dict[str, Any]:
    """Runs `train` in `launch.processes` processes, one a GPU, then uploads the adapter to
    `hub.push`."""
    result = in_processes(train, config)
    if is_main_process():
        push(config)
    return result


def train(config: Config) -> dict[str, Any]:
    """Fine-tunes an adapter by the config, or resumes where an earlier call was cut.

    Returns:
        The content of result.json: `eval/perplexity`, `perplexity_before`,
        `spectrum/effective_rank/mean`, ...

    Raises:
        UserError: the config, the data or the run's folder is not usable; the message has the fix.
        Interrupted: by SIGINT, SIGTERM, SIGUSR1 or SIGUSR2, after the update in progress was saved.
    """
    quiet_libraries()
    forget_earlier_runs()
    path = Path(config.output_dir) / config.name
    settled = settle(config, path)
    config = settled.config
    with RunFolder.open(path, to_plain(config), is_main_process()) as folder:
        if folder.is_main:
            folder.check_may_run(config.train.resume)
        if (result := folder.result()) is not None:
            if folder.is_main:
                print_line(
                    "finished",
                    f"{path}: perplexity {figure(result.perplexity, 2)}. Its result stands.",
                )
            return result.to_json()
        resumes = folder.is_main and config.train.resume == Resume.auto
        checkpoint = folder.newest_checkpoint() if resumes else None
        with Session(settled, folder, checkpoint) as session, session.interruption:
            return run(session)


def run(session: Session) -> dict[str, Any]:
    """Trains from the first update, or the one after the checkpoint, to the last."""
    config = session.config.train
    progress = session.progress
    session.begin()
    console.print_start(session)
    prove_coverage(session)
    if progress.update == 0 or progress.evaluation_pending:
        evaluate(session)
    session.loss.train()
    while not session.is_done:
        signal = update(session)
        is_last = progress.update == session.updates
        progress.evaluation_pending = is_last or session.is_due(config.eval_every)
        if signal is not None and not is_last:
            stop(session, signal)  # without the evaluation: the sender may not wait for it
        if progress.evaluation_pending:
            with saved_before_errors(session):
                evaluate(session)
        if session.is_due(config.save_every) and not session.is_done:
            save(session)
    return finish(session)


def update(session: Session) -> int | None:
    """An update on `train.batch_size` sequences: one step of the optimizer, or more where the
    objective takes several.

    Returns:
        The signal that one of the processes received meanwhile: all of them stop after the same
        update.
    """
    started = time.perf_counter()
    config = session.config.optimizer
    accelerator = session.accelerator
    progress = session.progress
    rows = session.order.sequences(progress.update)
    torch.manual_seed(session.seed())
    lr = learning_rate(config, progress.update, session.updates)
    set_learning_rate(session.optimizer, lr)
    with saved_before_errors(session):
        drawn = session.objective.begin(rows)
    for _ in range(drawn.passes):
        loss = backward(session, drawn)
        heard = torch.tensor(session.interruption.heard(), device=accelerator.device)
        loss, *heard = accelerator.reduce(torch.cat([loss[None], heard]), reduction="mean").tolist()
        accelerator.unscale_gradients()  # Accelerate's own clipping does so twice under FSDP
        grad_norm = float(torch.nn.utils.clip_grad_norm_(session.weights, config.max_grad_norm))
        check_finite(session, rows, loss, grad_norm)
        session.stepper.step()
        session.stepper.zero_grad()

    tokens = sum(drawn.batches.lengths[row] for row in drawn.rows)
    seconds = time.perf_counter() - started
    progress.updated(tokens, seconds, session.order)
    metrics = UpdateMetrics(
        progress.update,
        progress.epoch,
        loss,
        perplexity(loss),
        grad_norm,
        lr,
        tokens / seconds,
        progress.seconds,
        **drawn.figures,
        **{
            name: float(accelerator.reduce(value, reduction="mean"))
            for name, value in drawn.sums.items()
        },
    )
    session.log(metrics)
    if session.local_loss.stop_compiling():
        session.bar.note(
            "speed      layers run uncompiled from here: torch compiles no further variant of them"
        )
    numbers = drawn.headline or f"loss {figure(loss)}  perplexity {figure(metrics.perplexity, 2)}"
    left = duration(progress.seconds / progress.update * (session.updates - progress.update))
    session.bar.step(f"{numbers}  {figure(metrics.tokens_per_s, 0)} tokens/s  {left} left")
    return first_heard(heard)


def backward(session: Session, drawn: Drawn) -> torch.Tensor:
    """Accumulates the gradient of the objective; returns this process's part of the loss, a
    scalar."""
    accelerator = session.accelerator
    objective = session.objective
    total = torch.zeros((), device=accelerator.device)
    micro_batches = shared_out(drawn.batches, drawn.rows, accelerator)
    for number, (group, counts) in enumerate(micro_batches, start=1):
        is_last = number == len(micro_batches)  # it reduces the gradients over the processes
        with contextlib.nullcontext() if is_last else accelerator.no_sync(session.loss):
            losses = session.loss(drawn.batches.load(group), by_token=True)
            loss = objective.loss(losses, group) if counts else 0 * losses.sum()
            accelerator.backward(loss)
        total += loss.detach()
    return total


def check_finite(session: Session, rows: list[int], loss: float, grad_norm: float) -> None:
    """Raises UserError where training has diverged."""
    # A gradient scaler (float16) skips an update whose gradient overflows, and halves its scale. A
    # scale below 1 is not what makes it overflow.
    scaler = session.accelerator.scaler
    if math.isfinite(loss) and (
        math.isfinite(grad_norm) or (scaler is not None and scaler.get_scale() >= 1)
    ):
        return
    checkpoints = session.folder.checkpoints()
    kept = (
        f"The last checkpoint, {checkpoints[-1]}, is kept"
        if checkpoints
        else "There was no checkpoint yet"
    )
    message = (
        f"the loss of update {session.progress.update + 1} or its gradient is not finite "
        f"(training rows {rows}). "
        f"{kept}. Lower optimizer.lr, add optimizer.warmup_ratio, or look at these rows."
    )
    session.folder.mark_diverged(message)
    raise UserError(message)


# --- beside the updates ---------------------------------------------------------------------------


def prove_coverage(session: Session) -> None:
    """Runs one forward and backward pass over a short row for each process, and leaves no trace of
    it.

    Raises:
        UserError: an adapter did not run, or the loss does not depend on it.
    """
    coverage = Coverage(session.model)
    if (
        not session.config.train.check_coverage or not coverage.layers
    ):  # full fine-tuning has no adapters
        return
    accelerator = session.accelerator
    batches = session.batches
    rows = session.order.sequences(session.progress.update)
    rows = sorted(
        rows, key=lambda row: abs(batches.lengths[row] - 64)
    )  # rows of about 64 tokens: attention matters
    session.loss.train()
    with session.local_loss.uncompiled(), coverage.watch():
        for group, _ in shared_out(session.batches, rows[: accelerator.num_processes], accelerator):
            accelerator.backward(
                session.loss(batches.load(group)) / sum(batches.supervised[i] for i in group)
            )
    session.optimizer.zero_grad()
    if (problem := coverage.problem()) is not None:
        raise UserError(
            f"adapter.target_modules: {problem} Leave them out, with all-linear by "
            "adapter.settings.exclude_modules=[...], or set train.check_coverage=false."
        )


def evaluate(session: Session) -> None:
    """Logs the loss on the held-out rows, the spectra of the adapter and the accuracy on the tasks
    that are due. Keeps the adapter if it is the best so far. Before the first update and after the
    last, also writes each token's loss, which studies compare."""
    progress = session.progress
    folder = session.folder
    losses, judged = session.objective.judge(session.held_out.token_losses())
    session.spectra = spectra = session.held_out.spectra()
    loss = losses.mean
    is_last = session.ends_after(progress.since_best(perplexity(loss)))
    scores = answer_tasks(session, is_last)  # before anything is counted: a server may be away
    figures = spectrum_metrics(spectra)
    is_best = progress.evaluated(perplexity(loss), figures.get("spectrum/linear_share/mean"))
    figures |= judged | scores
    progress.tasks |= {name: value for name, value in figures.items() if is_task_figure(name)}
    if session.accelerator.is_main_process:
        for name, is_due in ((LOSSES_BEFORE, progress.update == 0), (LOSSES_AFTER, is_last)):
            if is_due:
                losses.write(folder.path / name)
    metrics = EvaluationMetrics(progress.update, progress.epoch, loss, perplexity(loss), **figures)
    session.log(metrics)
    if session.accelerator.is_main_process and spectra:
        modules = {name: spectrum.figures() for name, spectrum in spectra.items()}
        folder.append(SPECTRA, {"update": progress.update, "modules": modules})
    if is_best:
        folder.save_best(
            session.model, EvaluationMetrics(progress.update, perplexity=metrics.perplexity)
        )
    rank = describe_rank(metrics.spectrum)
    numbers = f"perplexity {figure(metrics.perplexity)}" + (
        f", effective rank {rank}" if rank else ""
    )
    session.bar.note(f"evaluation at update {progress.update}: {numbers}")


def answer_tasks(session: Session, is_last: bool) -> dict[str, float]:
    """Answers the tasks that are due, and the samples; keeps them in the run's folder and the
    tracker."""
    progress = session.progress
    folder = session.folder
    results = session.exams.take(progress.update, is_last)
    if session.accelerator.is_main_process:
        for name, problems in results.graded.items() if is_last else ():
            write_grades(folder.path, name, problems)
        for sample in results.samples:
            folder.append(SAMPLES, sample.to_json())
        if results.samples:
            session.tracker.table(
                "samples", [sample.to_json() for sample in results.samples], progress.update
            )
    if results.notes:
        session.bar.note(f"answers at update {progress.update}: {'; '.join(results.notes)}")
    return results.figures


def save(session: Session) -> None:
    """A checkpoint of this update."""
    keep = session.config.train.keep
    scaler = session.accelerator.scaler
    session.folder.save_checkpoint(session.model, session.optimizer, session.progress, keep, scaler)


@contextlib.contextmanager
def saved_before_errors(session: Session) -> Iterator[None]:
    """Saves the updates so far where a UserError ends the run, such as a failing reward or an
    unreachable server."""
    try:
        yield
    except UserError:
        if session.progress.update > 0:
            save(session)
        raise


def stop(session: Session, signal: int) -> None:
    """Saves and ends the run: always raises Interrupted."""
    save(session)
    session.bar.close()
    if session.accelerator.is_main_process:
        command = (
            "same command"
            if session.config.train.resume == Resume.auto
            else "command with train.resume=auto"
        )
        print_line(
            "stopped", f"after update {session.progress.update}, saved. The {command} resumes it."
        )
    session.tracker.finish()
    session.accelerator.wait_for_everyone()  # a launcher ends all as soon as one has ended
    raise Interrupted(signal)


def finish(session: Session) -> dict[str, Any]:
    """The final adapter, its spectrum and card, and result.json, which marks the run as
    finished."""
    config = session.config
    folder = session.folder
    progress = session.progress
    session.bar.close()
    save(session)
    spectra = (
        session.spectra or session.held_out.spectra()
    )  # none where a run resumes after its last evaluation
    result = RunResult(
        **progress.model_dump(include={*RunResult.model_fields}),
        adapter_kind=config.adapter.kind.value,
        adapter_r=rank(config.adapter),
        trainable_parameters=session.trainable_count,
        trainable_share=session.trainable_count / session.total_count,
        updates=progress.update,
        epochs=progress.update / session.order.updates_per_epoch,
        tokens_per_s=progress.tokens / progress.seconds,
        peak_memory_bytes=peak_memory(session.accelerator.device),
        folder=str(folder.path),
        **spectrum_metrics(spectra) | progress.tasks,
    )
    folder.save_final(session.model, session.tokenizer)
    if session.accelerator.is_main_process:
        if spectra:  # a method may have none
            modules = {
                name: spectrum.figures() | {"singular_values": spectrum.singular_values.tolist()}
                for name, spectrum in spectra.items()
            }
            write_text(folder.path / SPECTRUM, json.dumps(modules, indent=2) + "\n")
        write_card(folder.path, result)
        result.write(folder.path / "result.json")  # the last file: from here on the run is finished
        console.print_result(result, config)
    session.accelerator.wait_for_everyone()  # a study looks for result.json in every process
    return result.to_json()
