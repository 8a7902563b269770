"""The training loop, top to bottom: build everything, then update, evaluate, save; then leave what the next command
needs."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn

from cera_train.adapters.build import build, choose_kernels, parameter_counts, parameter_groups, use_kernels
from cera_train.adapters.spectrum import mean_spectrum, measure_spectra, module_spectra, spectrum_metrics
from cera_train.common.errors import UserError
from cera_train.common.files import find_damage
from cera_train.common.settings import to_plain
from cera_train.common.terminal import ProgressBar, print_line
from cera_train.config import Config
from cera_train.data.batches import Batch, MicroBatches, Plan
from cera_train.data.config import BatchLayout
from cera_train.data.prepare import prepare_data
from cera_train.distributed.accelerator import forget_earlier_runs, peak_memory, quiet_libraries, start_accelerator
from cera_train.distributed.processes import is_main_process
from cera_train.distributed.sharding import load_optimizer_state
from cera_train.distributed.signals import Interrupted, Interruption, first_heard
from cera_train.distributed.watchdog import Watchdog
from cera_train.model.loss import SupervisedLoss, choose_layout
from cera_train.model.perplexity import mean_loss, perplexity
from cera_train.model.weights import check_length, fingerprint, load_model, load_tokenizer
from cera_train.runs.card import write_card
from cera_train.runs.folder import Progress, RunFolder, environment, load_checkpoint
from cera_train.training import console
from cera_train.training.optimizer import build_optimizer, learning_rate, set_learning_rate
from cera_train.training.picture import draw_run
from cera_train.training.tracking import Tracker, start_tracker


def train(config: Config) -> dict[str, Any]:
    """Fine-tunes an adapter as the config says, or goes on where an earlier call was cut.

    Returns:
        The content of result.json: `eval/perplexity`, `perplexity_before`, `spectrum/effective_rank/mean`, ...

    Raises:
        ValueError: the config, the data or the run's folder is not usable; the message says how to mend it.
        Interrupted: by SIGINT, SIGTERM, SIGUSR1 or SIGUSR2, after the update in progress was saved.
    """
    quiet_libraries()
    forget_earlier_runs()
    is_main = is_main_process()
    path = Path(config.output_dir) / config.name
    with RunFolder(path, to_plain(config), is_main) as folder, contextlib.ExitStack() as at_exit:
        # --- is there anything to do? ---
        resume_from = where_to_resume(folder, config.train.resume) if is_main else None
        if (result := finished_result(folder)) is not None:
            return result

        # --- build everything; the rows before a process group exists ---
        tokenizer = load_tokenizer(config.model)
        check_length(config.model, config.data.max_length, "data.max_length")
        data = prepare_data(config.data, tokenizer)
        limit = config.distributed.timeout
        accelerator = start_accelerator(
            config.model, config.train.autocast, timedelta(seconds=2 * limit), config.distributed.strategy
        )
        device, processes, process = accelerator.device, accelerator.num_processes, accelerator.process_index
        is_sharded = accelerator.is_fsdp2
        (resume_from,) = broadcast_object_list([resume_from])
        base = load_model(config.model, device, is_sharded)
        machine = environment() | {"processes": processes, "base_fingerprint": fingerprint(base)}
        torch.manual_seed(config.train.seed)
        model = build(base, config.adapter)
        trainable, total = parameter_counts(model)
        progress, moments = Progress(), None
        goes_on_here = resume_from is not None and folder.holds(resume_from)
        if resume_from is not None:
            progress, moments = load_checkpoint(resume_from, model, data.train.digest)
            if not goes_on_here:
                progress.forget_best()  # that adapter lies in another folder

        optimizer = build_optimizer(parameter_groups(model, config.adapter), config.optimizer, device)
        loss, stepper = accelerator.prepare(SupervisedLoss(model, base, accelerator.autocast), optimizer)
        local_loss = accelerator.unwrap_model(loss)  # of DDP: evaluates without waiting for other processes
        parameters = trainable_parameters(model)  # which sharding replaced
        if moments is not None:
            load_optimizer_state(optimizer, moments)
        is_flat = choose_layout(config.train.batch_layout, local_loss, device) == BatchLayout.flat
        if config.train.compile:
            local_loss.compile_layers()
        kernels = choose_kernels(config.adapter, device, local_loss.is_compiled)
        use_kernels(model, kernels)
        train_batches = MicroBatches(data.train, is_flat, config.train.micro_batch_tokens, device)
        eval_batches = MicroBatches(data.evaluation, is_flat, config.train.micro_batch_tokens, device)
        eval_rows = range(len(data.evaluation.rows))
        probe_rows = eval_batches.first(config.train.probe_tokens)
        plan = Plan(len(data.train.rows), config.train.batch_size, config.train.seed)
        updates = config.train.max_updates or config.train.epochs * plan.updates_per_epoch

        tracker = Tracker()
        if is_main:
            folder.rewind(progress.update if goes_on_here else None)
            folder.write_config(machine | {"updates": updates})
            tracker = start_tracker(config.tracker, folder.config, config.name, path, progress.update)
            console.say_start(config, path, (trainable, total), accelerator, is_flat, updates, progress.update)
            print_line(
                "speed",
                console.describe_speed(
                    config.train.batch_layout, local_loss, is_flat, "Triton kernels" if kernels == "triton" else ""
                ),
            )
            console.say_data(data, tokenizer)
        at_exit.callback(tracker.finish)
        bar = ProgressBar("update", updates, progress.update, visible=is_main)
        at_exit.callback(bar.close)
        watchdog = Watchdog(processes, process, limit)
        at_exit.callback(watchdog.close)

        # --- what happens beside updates ---
        def log(metrics: dict[str, float]) -> None:
            if is_main:
                folder.append_metrics({"update": progress.update, "epoch": progress.epoch} | metrics)
                tracker.log({name: value for name, value in metrics.items() if is_summary(name)}, progress.update)

        def own_batches(rows: Sequence[int]) -> Iterator[tuple[Batch, bool]]:
            for group, counts in eval_batches.passes(rows, processes, process, in_step=is_sharded):
                if is_sharded:
                    watchdog.arrive()
                yield eval_batches.load(group), counts
            watchdog.arrive()

        def measure() -> dict[str, Any]:
            return measure_spectra(model, local_loss.eagerly, own_batches(probe_rows), accelerator.reduce)

        def evaluate() -> None:
            loss_per_token = mean_loss(local_loss, own_batches(eval_rows), accelerator)
            metrics = {"eval/loss": loss_per_token, "eval/perplexity": perplexity(loss_per_token)}
            metrics |= spectrum_metrics(measure())
            log(metrics)
            if progress.evaluated(metrics["eval/perplexity"]):
                folder.save_best(model, {"update": progress.update, "eval/perplexity": progress.perplexity})
            bar.note(
                f"evaluation at update {progress.update}: perplexity {progress.perplexity:.3f}, effective rank "
                f"{metrics['spectrum/effective_rank/mean']:.1f} mean, {metrics['spectrum/effective_rank/max']:.1f} max"
            )

        def save() -> None:
            watchdog.arrive()
            folder.save_checkpoint(model, optimizer, progress, data.train.digest, config.train.keep)

        # --- the loop ---
        interruption = at_exit.enter_context(Interruption())
        if progress.update == 0 or progress.evaluation_pending:
            evaluate()
        loss.train()
        clock = console.Clock(progress.update, updates)
        while progress.update < updates and not progress.out_of_patience(config.train.patience):
            started = time.perf_counter()
            rows = plan.sequences(progress.update)
            supervised = sum(train_batches.supervised[row] for row in rows)
            seed_update(config.train.seed, progress.update, process)
            set_learning_rate(optimizer, learning_rate(config.optimizer, progress.update, updates))

            loss_per_token = torch.zeros((), device=device)
            passes = train_batches.passes(rows, processes, process, in_step=is_sharded)
            watchdog.arrive()  # DDP's first pass of an update waits for the buffers of process 0
            for number, (group, counts) in enumerate(passes, start=1):
                is_last = number == len(passes)
                if is_last or is_sharded:
                    watchdog.arrive()
                with contextlib.nullcontext() if is_last else accelerator.no_sync(loss):
                    # The loss is a mean over the tokens of all processes, whose gradients are averaged.
                    batch_loss = counts * processes / supervised * loss(train_batches.load(group))
                    accelerator.backward(batch_loss)
                loss_per_token += batch_loss.detach()
            heard = torch.tensor(interruption.heard(), device=device)
            loss_per_token, *heard = accelerator.reduce(
                torch.stack([loss_per_token, *heard]), reduction="mean"
            ).tolist()
            interrupted = first_heard(heard)  # a signal to one process stops all at the same update
            grad_norm = float(accelerator.clip_grad_norm_(parameters, config.optimizer.max_grad_norm))
            # A gradient scaler (float16) skips an update whose gradient overflows, and lowers its scale.
            gradient_is_finite = accelerator.scaler is not None or math.isfinite(grad_norm)
            if not (math.isfinite(loss_per_token) and gradient_is_finite):
                raise UserError(not_finite(progress.update + 1, rows, folder.checkpoints()))
            stepper.step()
            stepper.zero_grad()

            tokens = sum(train_batches.lengths[row] for row in rows)
            seconds = time.perf_counter() - started
            progress.updated(tokens, seconds, plan)
            metrics = {
                "train/loss": loss_per_token,
                "train/perplexity": perplexity(loss_per_token),
                "train/grad_norm": grad_norm,
                "train/lr": optimizer.param_groups[0]["lr"],
                "train/tokens_per_s": tokens / seconds,
                "train/seconds": progress.seconds,
            }
            log(metrics)
            bar.step(console.describe_update(metrics, clock.seconds_left(progress.update)))

            is_evaluation = is_due(progress.update, config.train.eval_every) or progress.update == updates
            if interrupted is not None and progress.update < updates:
                progress.evaluation_pending = is_evaluation  # whoever sent the signal may not wait for it
                save()
                if is_main:
                    command = "same command" if config.train.resume == "auto" else "command with train.resume=auto"
                    print_line("stopped", f"after update {progress.update}, saved. The {command} goes on.")
                tracker.finish()
                accelerator.wait_for_everyone()  # a launcher ends all as soon as one has ended
                raise Interrupted(interrupted)
            if is_evaluation:
                evaluate()
            if is_due(progress.update, config.train.save_every) and progress.update < updates:
                save()  # the last update is saved below
        bar.close()

        # --- leave what the next command needs ---
        save()
        spectra = measure()
        result = {
            "eval/perplexity": progress.perplexity,
            "perplexity_before": progress.perplexity_before,
            "best_perplexity": progress.best_perplexity,
            "best_update": progress.best_update,
            **{name: value for name, value in spectrum_metrics(spectra).items() if is_summary(name)},
            "adapter_kind": config.adapter.kind.value,
            "adapter_r": config.adapter.r,
            "trainable_parameters": trainable,
            "trainable_share": trainable / total,
            "updates": progress.update,
            "epochs": progress.update / plan.updates_per_epoch,
            "tokens": progress.tokens,
            "tokens_per_s": progress.tokens / progress.seconds,
            "seconds": progress.seconds,
            "peak_memory_bytes": peak_memory(device),
            "folder": str(path),
        }
        watchdog.arrive()
        folder.save_final(model)
        if is_main:
            folder.write_json("spectrum.json", module_spectra(spectra))
            write_card(path, result)
            picture = draw_run(path, mean_spectrum(spectra), config.name)
            folder.write_json("result.json", result)  # the last file: from here on the run is finished
            tracker.picture("run", picture, progress.update)
            tracker.adapter(path / "adapter")
            console.say_result(result)
        return result


def finished_result(folder: RunFolder) -> dict[str, Any] | None:
    """What a finished run left, said in a line."""
    result = folder.result()
    if result is not None and folder.is_main:
        print_line("finished", f"{folder.path}: perplexity {result['eval/perplexity']:.2f}. Its result stands.")
    return result


def where_to_resume(folder: RunFolder, resume: str) -> Path | None:
    """The checkpoint to go on from, or None for a new run.

    Raises:
        ValueError: the folder holds a finished run that must not be overwritten, or a run with another config; or there
            is no sound checkpoint.
    """
    folder.check_may_run(resume)
    if resume == "auto":
        return None if folder.result() is not None else folder.last_sound_checkpoint()
    if resume == "never":
        return None
    if (damage := find_damage(Path(resume))) is not None:
        raise UserError(f"{resume} is damaged ({damage}). Restore it, or go on from another checkpoint.")
    return Path(resume)


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def seed_update(seed: int, update: int, process: int) -> None:
    """Dropout follows from (seed, update, process): a resumed run draws what an uninterrupted one draws."""
    torch.manual_seed((seed * 1_000_003 + update) * 1_009 + process)


def is_due(update: int, every: int | None) -> bool:
    return every is not None and update % every == 0


def is_summary(name: str) -> bool:
    """Whether a metric is about the whole model rather than one module."""
    return not name.startswith("spectrum/") or name.endswith(("/mean", "/max"))


def not_finite(update: int, rows: list[int], checkpoints: list[Path]) -> str:
    kept = f"The last checkpoint, {checkpoints[-1]}, is kept" if checkpoints else "There was no checkpoint yet"
    return (
        f"the loss of update {update} or its gradient is not finite (training rows {rows}). {kept}. "
        "Lower optimizer.lr, add optimizer.warmup_ratio, or look at these rows."
    )
