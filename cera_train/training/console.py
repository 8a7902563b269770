"""What a run says in the terminal: what it is about to do, how far it is, what came out."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.text import Text

from cera_train.adapters.config import AdapterKind
from cera_train.common.terminal import console, highlighted, print_fields, print_line
from cera_train.common.text import duration, targets
from cera_train.config import Config
from cera_train.data.config import BatchLayout
from cera_train.data.prepare import TokenizedData
from cera_train.model.attention import BY_SEQUENCE, VARLEN
from cera_train.model.config import Quantization
from cera_train.model.loss import SupervisedLoss


def say_start(
    config: Config,
    path: Path,
    parameters: tuple[int, int],
    accelerator: Accelerator,
    is_flat: bool,
    updates: int,
    done: int,
) -> None:
    """The run in a few lines: folder, model, adapter, device."""
    trainable, total = parameters
    model, adapter = config.model, config.adapter
    quantization = "" if model.quantization == Quantization.none else f", {model.quantization}"
    gate = f", {adapter.activation}" if adapter.kind == AdapterKind.cera else ""
    print_line(
        "run", f"{path}, {updates:,} updates of {config.train.batch_size} sequences" + f", {done:,} done" * bool(done)
    )
    print_line("model", f"{model.path}, {model.dtype}{quantization}, {total - trainable:,} parameters")
    print_line(
        "adapter",
        f"{adapter.kind} r={adapter.r}{gate}, dropout {adapter.dropout:g}, on {targets(adapter.target_modules)}: "
        f"{trainable:,} trainable",
    )
    device = f"{accelerator.num_processes} x {accelerator.device.type}" + ", FSDP2" * accelerator.is_fsdp2
    precision = {"no": "no autocast"}.get(accelerator.mixed_precision, f"{accelerator.mixed_precision} autocast")
    layout = "flat" if is_flat else "padded"
    print_line(
        "device", f"{device}, {precision}, {layout} micro-batches of up to {config.train.micro_batch_tokens:,} tokens"
    )


def describe_speed(wanted: BatchLayout, loss: SupervisedLoss, is_flat: bool, kernels: str) -> str:
    """What makes this run fast, and why it does without the rest.

    Args:
        wanted: the layout that was asked for; `is_flat` is what came of it.
        kernels: `choose_kernels`'s answer, empty without CeRA.
    """
    if is_flat:
        batches = {
            VARLEN: "attention by sequence in one kernel, no padding",
            BY_SEQUENCE: "attention by sequence, no padding",
            None: "no padding, no attention by sequence (this model's own is not plain causal sdpa)",
        }[loss.attention]
    elif not loss.flattens:
        batches = "padding (this model mixes sequences that share a row)"
    elif wanted == BatchLayout.padded:
        batches = "padding (train.batch_layout=padded)"
    else:
        batches = "padding (costs less here than a mask over one long row)"
    compiled = "compiled layers" if loss.is_compiled else "not compiled (train.compile=false)"
    return "; ".join(filter(None, (batches, compiled, kernels)))


def say_data(data: TokenizedData, tokenizer: Any) -> None:
    """Rows kept, dropped and truncated, the supervised share, shared prompts, and one rendered example."""
    for label, split in (("train", data.train), ("eval", data.evaluation)):
        counts = split.counts
        dropped = counts.empty + counts.answer_truncated
        print_line(
            label,
            f"{counts.kept:,} rows, {counts.tokens:,} tokens, {counts.supervised_tokens / counts.tokens:.0%} supervised"
            f"; {dropped:,} dropped ({counts.empty:,} empty, {counts.answer_truncated:,} beyond max_length)"
            f", {counts.truncated:,} truncated",
        )
    print_line("shared", f"{data.shared_prompts:,} evaluation prompts are also training prompts")
    [row] = data.train.rows.slice(0, 1).to_pylist()
    console().print(f"{'example':<11}", render_example(row["input_ids"], row["loss_mask"], tokenizer), sep="")


def render_example(input_ids: list[int], loss_mask: list[bool], tokenizer: Any) -> Text:
    """A row's text with its supervised parts marked."""
    runs = itertools.groupby(zip(input_ids, loss_mask, strict=True), key=lambda token: token[1])
    return highlighted(((tokenizer.decode([id for id, _ in run]), is_supervised) for is_supervised, run in runs), 11)


def describe_update(metrics: dict[str, float], seconds_left: float) -> str:
    return (
        f"loss {metrics['train/loss']:.3f}  perplexity {metrics['train/perplexity']:.2f}  "
        f"{metrics['train/tokens_per_s']:,.0f} tokens/s  {duration(seconds_left)} left"
    )


class Clock:
    """How long the rest takes, evaluations and checkpoints included, if it goes on as since the start."""

    def __init__(self, done: int, total: int) -> None:
        self.first, self.total, self.started = done, total, time.perf_counter()

    def seconds_left(self, done: int) -> float:
        return (time.perf_counter() - self.started) / (done - self.first) * (self.total - done)


def say_result(result: dict[str, Any]) -> None:
    """The table at the end."""
    rank = f"{result['spectrum/effective_rank/mean']:.1f} mean, {result['spectrum/effective_rank/max']:.1f} max"
    rows = {
        "perplexity": f"{result['perplexity_before']:.2f} before, {result['eval/perplexity']:.2f} after",
        "best": f"{result['best_perplexity']:.2f} at update {result['best_update']}",
        "effective rank": f"{rank} (of {result['adapter_r']})",
        "trainable": f"{result['trainable_parameters']:,} parameters, {result['trainable_share']:.2%} of the model",
        "speed": f"{result['tokens_per_s']:,.0f} tokens/s",
        "time": f"{duration(result['seconds'])} for {result['updates']:,} updates",
        "folder": result["folder"],
    }
    print()
    print_fields(rows)
