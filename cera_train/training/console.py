"""What a run prints at its start and its end. Progress between them is a line of `runs.results`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from cera_train.adapters.build import rank
from cera_train.adapters.families import family
from cera_train.adapters.spectrum import why_no_spectrum
from cera_train.adapters.targets import (
    describe_left_out,
    describe_targets,
    layers_without_adapted_experts,
)
from cera_train.common.terminal import TEXT_WIDTH, counted, duration, print_fields, print_line
from cera_train.data.look import print_data
from cera_train.data.prepare import stop_ids
from cera_train.evaluation.tasks.task import describe_trained_on
from cera_train.model.attention import BY_SEQUENCE, VARLEN
from cera_train.model.loss import SupervisedLoss
from cera_train.runs.records import read_lines
from cera_train.runs.results import (
    METRICS,
    SAMPLES,
    RunResult,
    Sample,
    describe_linear_share,
    describe_rank,
    describe_tasks,
    read_metrics,
)
from cera_train.settings.adapters import AdapterConfig
from cera_train.settings.model import Quantization
from cera_train.settings.run import Config

if TYPE_CHECKING:
    from cera_train.training.session import Session


def print_start(session: Session) -> None:
    """The run in a few lines: folder, model, adapter, device, speed, data."""
    if not session.accelerator.is_main_process:
        return
    config = session.config
    accelerator = session.accelerator
    loss = session.local_loss
    folder = session.folder.path
    done = session.progress.update
    updates = session.updates
    already = f", {done:,} done" if done else ""
    steps = counted(updates, "update")
    print_line("run", f"{folder}, {steps} of {config.train.batch_size} {config.work.unit}{already}")
    quantization = (
        "" if config.model.quantization == Quantization.none else f", {config.model.quantization}"
    )
    frozen = session.total_count - session.trainable_count
    weights = frozen or session.total_count  # full fine-tuning freezes none
    print_line(
        "model", f"{config.model.path}, {config.model.dtype}{quantization}, {weights:,} parameters"
    )
    print_line("precision", f"{session.precision.dtype}: {session.precision.reason}")
    print_adapter(session)
    if session.rate.reason:
        print_line("rate", f"{session.rate.value:g}: {session.rate.reason}")
    device = (
        f"{accelerator.num_processes} x {accelerator.device.type}"
        + ", FSDP2" * accelerator.is_fsdp2
    )
    mixed = accelerator.mixed_precision
    autocast = "no autocast" if mixed == "no" else f"{mixed} autocast"
    layout = "flat" if loss.is_flat else "padded"
    tokens = config.train.micro_batch_tokens
    print_line("device", f"{device}, {autocast}, {layout} micro-batches of up to {tokens:,} tokens")
    print_line("speed", describe_speed(loss))
    stops = stop_ids(session.tokenizer, loss.causal_lm.generation_config.eos_token_id)
    print_data(config.data, session.data, session.tokenizer, stops)
    if session.exams.plan:
        print_line("answers", session.exams.plan)
    for exam in session.exams.tasks:
        if shared := describe_trained_on(exam.problems, config.data):
            print_line("shared", f"{exam.name}: {shared}")


def print_adapter(session: Session) -> None:
    """The adapter and the projections and experts that it is on, or that all-linear leaves out."""
    adapter = session.config.adapter
    model = session.model
    print_line("adapter", f"{describe_adapter(adapter)}: {session.trainable_count:,} trainable")
    if adapter.start_from is not None and session.progress.update == 0:
        weights = f"from {adapter.start_from}, digest {adapter.start_digest}"
        print_line("start", f"{weights}; the optimizer starts anew")
    if (reason := why_no_spectrum(model)) is not None:
        print_line("spectrum", f"none: {reason}")
    is_all = adapter.target_modules == "all-linear"
    for line in filter(None, [describe_targets(model), describe_left_out(model) if is_all else ""]):
        print_line("coverage", line)
    if is_all and (layers := layers_without_adapted_experts(model)):
        fix = "; adapter.experts=true adds them" if "experts" in family(adapter.kind).uses else ""
        print_line("experts", f"all-linear leaves out the experts of {layers} layers{fix}")


def describe_adapter(adapter: AdapterConfig) -> str:
    parts = [adapter.method or str(adapter.kind)]
    if (r := rank(adapter)) is not None:
        parts[0] += f" r={r}"
    kind = family(adapter.kind)
    if "activation" in kind.uses:
        others = [variant for variant in kind.variants(adapter) if variant != adapter.activation]
        parts += [str(adapter.activation), *others]
    if "dropout" in kind.uses:
        parts.append(f"dropout {adapter.dropout:g}")
    if adapter.places:
        parts.append(f"on {adapter.places}")
    return ", ".join(parts)


def describe_speed(loss: SupervisedLoss) -> str:
    """Attention and padding of the micro-batches; compilation."""
    batches = "padding"
    if loss.is_flat:
        batches = {
            VARLEN: "attention by sequence in one kernel, no padding",
            BY_SEQUENCE: "attention by sequence, no padding",
            None: "no padding, no attention by sequence (this model's attention is not plain "
            "causal sdpa)",
        }[loss.allowed.attention]
    return (
        f"{batches}; "
        f"{'compiled layers' if loss.is_compiled else 'not compiled (train.compile=false)'}"
    )


def print_result(result: RunResult, config: Config) -> None:
    """The figures at the end, and commands for the run's folder."""
    rank = describe_rank(result.spectrum)
    folder = Path(result.folder)
    first = read_metrics(folder / METRICS).evaluations[0]
    task = next(iter(config.train.tasks), "held_out" if config.data.is_computed else "perplexity")
    rows = {
        "perplexity": f"{result.perplexity_before:.2f} before, {result.perplexity:.2f} after",
        "tasks": describe_tasks(result.tasks, first.tasks if first.update == 0 else {}),
        **describe_sample(folder / SAMPLES),
        "best": f"{result.best_perplexity:.2f} at update {result.best_update}",
        "effective rank": rank and f"{rank} (of {result.adapter_r})",
        "linear share": describe_linear_share(result),
        "trainable": f"{result.trainable_parameters:,} parameters, {result.trainable_share:.2%} "
        f"of the model",
        "speed": f"{result.tokens_per_s:,.0f} tokens/s",
        "time": f"{duration(result.seconds)} for {counted(result.updates, 'update')}",
        "folder": result.folder,
        "ask it": shlex.join(["cera-chat", f"run={result.folder}"]),
        "grade it": shlex.join(["cera-eval", f"run={result.folder}", f"task={task}"]),
    }
    print()
    print_fields({label: row for label, row in rows.items() if row})


def describe_sample(path: Path) -> dict[str, str]:
    """The first question of samples.jsonl, with its first and its last answer; empty without such a
    file."""
    samples = read_lines(path, Sample) if path.is_file() else []
    same = [
        sample
        for sample in samples
        if (sample.task, sample.prompt) == (samples[0].task, samples[0].prompt)
    ]
    if not same:
        return {}
    texts = {
        "asked": same[0].prompt,
        "before": same[0].answer,
        "after": same[-1].answer,
        "right": same[0].gold,
    }
    lines = {label: " ".join(text.split()) for label, text in texts.items()}
    return {
        label: line if len(line) < TEXT_WIDTH else f"{line[:TEXT_WIDTH]}..."
        for label, line in lines.items()
    }
