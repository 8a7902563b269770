"""What a run prints at its start and its end. `runs.results` formats the progress between them."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from cera_train.adapters.build import rank
from cera_train.adapters.families import family
from cera_train.adapters.spectrum import find_branches
from cera_train.cera.experts import expert_parameters
from cera_train.common.terminal import (
    FIELD_WIDTH,
    TEXT_WIDTH,
    counted,
    duration,
    print_fields,
    print_line,
    terminal_width,
)
from cera_train.data.look import print_data
from cera_train.data.tokens import stop_ids
from cera_train.evaluation.tasks.task import describe_trained_on
from cera_train.model.attention import BY_SEQUENCE, VARLEN
from cera_train.model.folder import model_ends
from cera_train.model.language_model import LanguageModel
from cera_train.runs.folder import Progress
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
from cera_train.settings.data import DataConfig, Layout
from cera_train.settings.model import ModelConfig, Quantization
from cera_train.settings.run import Config, has_prompts
from cera_train.training.build import Data, Evaluator, Model, look_at_data
from cera_train.training.resolve import Resolved


def print_start(
    resolved: Resolved,
    folder: Path,
    data: Data,
    model: Model,
    evaluator: Evaluator,
    progress: Progress,
) -> None:
    """The run in a few lines: folder, model, adapter, device, speed, data."""
    accelerator = model.accelerator
    if not accelerator.is_main_process:
        return
    config = resolved.config
    updates = f"{counted(data.updates, 'update')} of {config.train.batch_size} {config.work.unit}"
    already = f", {progress.update:,} done" if progress.update else ""
    print_line("run", f"{folder}, {updates}{already}")
    print_model(config.model, model)
    print_line("precision", f"{config.model.dtype}: {resolved.why['model.dtype']}")
    print_adapter(config.adapter, model, is_new=progress.update == 0)
    if reason := resolved.why["optimizer.lr"]:
        print_line("rate", f"{config.optimizer.lr:g}: {reason}")
    print_device(model)
    print_line("speed", describe_speed(model.language_model, resolved.why["train.compile"]))
    generation = model.language_model.causal_lm.generation_config
    stops = stop_ids(data.tokenizer, generation.eos_token_id)
    print_line("data", describe_source(config.data))
    print_data(config.data, data.rows, data.tokenizer, stops, data.questions)
    if evaluator.tasks.plan:
        print_line("answers", evaluator.tasks.plan)
    for evaluation in evaluator.tasks.evaluations:
        if shared := describe_trained_on(evaluation.problems, config.data):
            print_line("shared", f"{evaluation.name}: {shared}")


def print_run_rows(config: Config) -> None:
    """The rows as a new run would train on them. Their tokens are cached for the run."""
    config, data = look_at_data(config)
    stops = stop_ids(data.tokenizer, model_ends(config.model))
    print_data(config.data, data.rows, data.tokenizer, stops, data.questions, at_length=True)


def print_model(config: ModelConfig, model: Model) -> None:
    frozen = model.total_count - model.trainable_count
    weights = frozen or model.total_count  # full fine-tuning freezes none
    parts = [config.path, str(config.dtype)]
    if config.quantization != Quantization.none:
        parts.append(str(config.quantization))
    print_line("model", ", ".join([*parts, f"{weights:,} parameters"]))


def print_adapter(config: AdapterConfig, model: Model, is_new: bool) -> None:
    """The adapter, and the projections and experts that it adapts."""
    adapted = model.adapted
    print_line(
        "adapter", f"{describe_adapter(config, rank(adapted))}: {model.trainable_count:,} trainable"
    )
    if config.start_from is not None and is_new:
        weights = f"from {config.start_from}, digest {config.start_digest}"
        print_line("start", f"{weights}; the optimizer starts anew")
    if not find_branches(adapted):
        reason = "the adapter adds no B h with hidden units h beside a linear projection"
        print_line("spectrum", f"none: {reason}")
    if coverage := describe_coverage(adapted):
        print_line("coverage", coverage)


def describe_coverage(model: nn.Module) -> str:
    """How many projections and experts have an adapter, of all with the same names: `q_proj v_proj:
    60 of 60; k_proj o_proj: 0 of 60`. A head without one is not counted. Empty for a model without
    adapter layers."""
    head = model.get_output_embeddings()
    total = Counter()
    adapted = Counter()
    for kind, module in projections(model):
        has_adapter = isinstance(module, BaseTunerLayer)
        if has_adapter or module is not head:
            total[kind] += 1
            adapted[kind] += has_adapter
    groups: dict[tuple[int, int], list[str]] = {}
    for kind, count in total.items():
        groups.setdefault((adapted[kind], count), []).append(kind)
    parts = [
        f"{' '.join(kinds)}: {len(kinds) * part} of {len(kinds) * whole}"
        for (part, whole), kinds in groups.items()
    ]
    return "; ".join(parts) if adapted.total() else ""


def projections(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Adapted layers, and the projections and modules of experts without an adapter, with the last
    part of their names."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, f"{name}.")
        if isinstance(module, (BaseTunerLayer, nn.Linear, Conv1D)) or expert_parameters(module):
            yield name.rpartition(".")[2], module


def print_device(model: Model) -> None:
    accelerator = model.accelerator
    mixed = accelerator.mixed_precision
    layout = "flat" if model.language_model.is_flat else "padded"
    parts = [f"{accelerator.num_processes} x {accelerator.device.type}"]
    if accelerator.is_fsdp2:
        parts.append("FSDP2")
    parts.append("no autocast" if mixed == "no" else f"{mixed} autocast")
    parts.append(f"{layout} micro-batches of up to {model.micro_batch_tokens:,} tokens")
    print_line("device", ", ".join(parts))


def describe_adapter(adapter: AdapterConfig, r: int | None) -> str:
    parts = [adapter.method or str(adapter.kind)]
    if r is not None:
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


def describe_source(data: DataConfig) -> str:
    """Where the rows come from. The quickstart's, which a bare command trains on, with the way to
    others."""
    if data.layout == Layout.dates:
        return "dates, computed; 'data.train_files=[FILE]' trains on your rows"
    return f"{data.title}, computed" if data.is_computed else data.title


def describe_attention(attention: str) -> str:
    """Attention in words, by transformers' name of it."""
    ours = {
        BY_SEQUENCE: "attention within each sequence",
        VARLEN: "attention within each sequence, in one kernel",
    }
    return ours.get(attention, f"{attention} attention")


def describe_speed(language_model: LanguageModel, why_not_compiled: str) -> str:
    """Attention and padding of the micro-batches; compilation; what fell back to a slower way."""
    padding = "no padding" if language_model.is_flat else "padding"
    compiled = "the first updates compile the layers"
    if not language_model.is_compiled:
        compiled = f"layers not compiled ({why_not_compiled})"
    parts = [f"{describe_attention(language_model.attention)}, {padding}", compiled]
    if language_model.allowed.refused:
        parts.append(f"fallback: {'; '.join(language_model.allowed.refused)}")
    return "; ".join(parts)


def print_result(result: RunResult, config: Config) -> None:
    """The final figures, and commands for the run's folder."""
    rank = describe_rank(result.spectrum)
    folder = Path(result.folder)
    first = read_metrics(folder / METRICS).evaluations[0]
    fitting = "held_out" if has_short_answers(config.data) else "perplexity"
    task = next(iter(config.train.tasks), fitting)
    run = [f"run={result.folder}"]
    if config.model.trust_remote_code:
        run.append("trust_remote_code=true")
    layers = "layers not compiled"
    if result.compiled_graphs:
        layers = f"layers compiled as {counted(result.compiled_graphs, 'graph')}"
    rows = {
        "perplexity": f"{result.perplexity_before:.2f} before, {result.perplexity:.2f} after",
        "tasks": describe_tasks(result.tasks, first.tasks if first.update == 0 else {}),
        **describe_sample(folder / SAMPLES),
        "best": f"{result.best_perplexity:.2f} at update {result.best_update}",
        "trainable": f"{result.trainable_parameters:,} parameters, {result.trainable_share:.2%} "
        f"of the model",
        "speed": f"{result.tokens_per_s:,.0f} tokens/s; {describe_attention(result.attention)}, "
        f"{layers}",
        "fallback": "; ".join(result.fallbacks),
        "time": f"{duration(result.seconds)} for {counted(result.updates, 'update')}",
        "effective rank": rank and f"{rank}, of {result.adapter_r} directions",
        "linear share": describe_linear_share(result),
        "folder": result.folder,
        "ask it": shlex.join(["cera-chat", *run]),
        "grade it": shlex.join(["cera-eval", *run, f"task={task}"]),
    }
    print()
    print_fields({label: row for label, row in rows.items() if row})


def has_short_answers(data: DataConfig) -> bool:
    """Whether rows are questions whose answers can be right to the letter: no chats."""
    parts = [part for _, part in data.parts()]
    return not data.is_paired and all(
        has_prompts(part) and (part.is_computed or part.layout == Layout.text) for part in parts
    )


def describe_sample(path: Path) -> dict[str, str]:
    """A task's first question in samples.jsonl, with its first and its last answer; empty without
    one."""
    samples = read_lines(path, Sample) if path.is_file() else []
    same = [sample for sample in samples if sample.task and sample.prompt == samples[0].prompt]
    if not same:
        return {}
    texts = {
        "asked": same[0].prompt,
        "before": same[0].answer,
        "after": same[-1].answer,
        "right": same[0].gold,
    }
    lines = {label: " ".join(text.split()) for label, text in texts.items()}
    room = min(TEXT_WIDTH, terminal_width() - FIELD_WIDTH)
    return {
        label: line if len(line) <= room else f"{line[: room - 3]}..."
        for label, line in lines.items()
    }
